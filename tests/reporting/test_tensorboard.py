import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import RESOLVED, TINY, small_network
from runs import smallest_error
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler as ListHandler

from dae.config import RunConfig
from dae.data import pipeline
from dae.reporting import tensorboard
from dae.resolved import Resolved
from dae.workdir.workdir import read_metrics

# The layers of the network `conv`.
LAYERS = [f"{half}_conv_{number}" for half in ("encoder", "decoder") for number in (1, 2, 3)] + ["denoised"]


def events(folder: Path) -> EventAccumulator:
    """Return all events of a folder, as TensorBoard reads them."""
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def scalar_values(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """Return the steps and values of a scalar."""
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)]


def text(accumulator: EventAccumulator, tag: str) -> str:
    """Return the only text of `tag`, which is that of step 0."""
    (event,) = accumulator.Tensors(tag)
    assert event.step == 0
    return tf.make_ndarray(event.tensor_proto).item().decode()


def test_each_writer_is_a_run_and_each_plugin_of_tensorboard_finds_data(tiny_run):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tiny_run)).Reload()
    assert sorted(multiplexer.Runs()) == [f"tensorboard/{name}" for name in ("test", "train", "validation")]
    active = MultiplexerDataProvider(multiplexer, str(tiny_run)).list_plugins(RequestContext(), experiment_id="")
    assert {"scalars", "images", "histograms", "graphs", "graph_keras_model", "text", "hparams"} == active


def test_curves_have_the_values_of_the_run(tiny_run):
    """One for each line of metrics.jsonl."""
    lines = read_metrics(tiny_run)
    for name in ("train", "validation"):
        shown = events(tiny_run / "tensorboard" / name)
        for tag in tensorboard.scalars(lines[0], name):
            expected = [
                (line["epoch"], pytest.approx(tensorboard.scalars(line, name)[tag], rel=1e-6)) for line in lines
            ]
            assert scalar_values(shown, tag) == expected, (name, tag)
    test, report = events(tiny_run / "tensorboard" / "test"), json.loads((tiny_run / "report.json").read_text())
    assert report["test_psnr_of_mean_mse"] == pytest.approx(-10 * np.log10(report["test_mse"]))
    assert scalar_values(test, "quality/psnr") == [(report["epoch"], pytest.approx(report["test_psnr"], rel=1e-6))]


def test_the_text_describes_the_run(tiny_run):
    described = text(events(tiny_run / "tensorboard" / "train"), "run/configuration")
    for row in ("| batch_size | 64 |", "| validation_examples | 256 |", "| git_commit | "):
        assert row in described
    assert tf.__version__ in described


def test_histograms_show_the_weights_of_each_layer_and_the_latents_after_each_epoch(tiny_run):
    train, validation = (events(tiny_run / "tensorboard" / name) for name in ("train", "validation"))
    weights = {f"weights/{layer}/{kind}" for layer in LAYERS for kind in ("kernel", "bias")}
    assert {tag for tag in train.Tags()["tensors"] if tag.startswith("weights/")} == weights
    for accumulator, tags in ((train, weights), (validation, {"latents/encoder"})):
        for tag in tags:
            assert [event.step for event in accumulator.Tensors(tag)] == [1, 2, 3]
    *_, counts = tf.make_ndarray(validation.Tensors("latents/encoder")[-1].tensor_proto).T
    assert counts.sum() == 256 * 4 * 4 * 8


def test_the_graph_of_the_step_has_named_parts(tiny_run):
    graph = tf.compat.v1.GraphDef.FromString(events(tiny_run / "tensorboard" / "train").Graph().SerializeToString())
    gradients = [node.name for node in graph.node if node.op == "Conv2DBackpropFilter"]
    assert gradients
    for layer in LAYERS:
        assert any(node.name.startswith("shard_0/network/") and f"/{layer}_1/" in node.name for node in graph.node)
    assert all(name.startswith("gradient_tape/shard_") for name in gradients)
    parts = {node.name.partition("/")[0] for node in graph.node if "/" in node.name}
    assert {"shard_0", "optimizer", "running_means"} <= parts
    assert len({node.name.partition("/")[0] for node in graph.node}) < 60  # what the tab shows at first


def test_the_conceptual_graph_shows_the_layers(tiny_run):
    (event,) = events(tiny_run / "tensorboard" / "train").Tensors("run/network")
    graph = keras_model_to_graph_def(json.loads(tf.make_ndarray(event.tensor_proto).item()))
    names = [node.name.rpartition("/")[2] for node in graph.node]
    assert [name for name in names if name in LAYERS] == LAYERS
    assert all(node.input for node in graph.node[1:])


def test_a_network_that_keras_cannot_save_has_no_conceptual_graph(write_events, tmp_path):
    class Unsaved(keras.layers.Layer):
        def call(self, noisy):
            return noisy

        def get_config(self):
            raise TypeError("this layer cannot be saved")

    noisy = keras.Input((28, 28, 1))
    write_events(tmp_path / "run", TINY, epoch=1, loss=1.0, model=keras.Model(noisy, Unsaved()(noisy)))
    train = events(tmp_path / "run" / "tensorboard" / "train")
    assert "run/network" not in train.Tags()["tensors"]
    assert "| batch_size | 64 |" in text(train, "run/configuration")


def test_each_metric_has_one_tag():
    line = {"epoch": 2, "step": 9, "seconds": 1.0, "images_per_second": 5.0}
    line |= {"train_loss": 1.0, "train_loss_bce": 2.0, "train_psnr": 3.0, "validation_loss": 4.0, "learning_rate": 0.1}
    assert tensorboard.scalars(line, "train") == {
        "loss/total": 1.0,
        "loss/bce": 2.0,
        "quality/psnr": 3.0,
        "optimizer/learning_rate": 0.1,
        "speed/images_per_second": 5.0,
    }
    assert tensorboard.scalars(line, "validation") == {"loss/total": 4.0}
    assert tensorboard.scalars({"epoch": 2, "test_ssim": 0.5}, "test") == {"quality/ssim": 0.5}


def test_every_tag_of_a_run_has_a_description(tiny_run):
    for name in ("train", "validation", "test"):
        accumulator = events(tiny_run / "tensorboard" / name)
        for tag in (tag for tag in accumulator.Tags()["tensors"] if not tag.startswith("_hparams_/")):
            description = accumulator.SummaryMetadata(tag).summary_description
            assert description == tensorboard.description(tag) != "", tag


def test_the_image_grid_shows_noisy_denoised_clean_and_error(tiny_run, mnist):
    grids = events(tiny_run / "tensorboard" / "validation").Tensors("images/noisy_denoised_clean_error")
    assert [event.step for event in grids] == [1, 2, 3]
    width, height, *pictures = tf.make_ndarray(grids[-1].tensor_proto)
    assert (int(width), int(height), len(pictures)) == (4 * 30, 8 * 30, 1)
    picture = tf.io.decode_png(pictures[0]).numpy()
    np.testing.assert_array_equal(picture[1:29, 61:89], mnist.validation.pixels[-256])
    assert abs(picture[1:29, 1:29].astype(float) - mnist.validation.pixels[-256]).mean() > 20
    error = abs(picture[1:29, 31:59].astype(float) - picture[1:29, 61:89])
    assert abs(picture[1:29, 91:119] - error).max() <= 1


def test_truncate_events_twice_or_interrupted_doubles_no_event(tmp_path, tiny_run):
    folder = tmp_path / "events"
    shutil.copytree(tiny_run / "tensorboard" / "train", folder)
    (file,) = folder.iterdir()
    shutil.copy(file, file.with_name(file.name + ".copy"))  # as if killed before the old file was removed
    for _ in range(2):
        tensorboard.truncate_events(folder, 2)
    assert [step for step, _ in scalar_values(events(folder), "loss/total")] == [1, 2]
    assert len(list(folder.iterdir())) == 1


def hparams_tab(logdir: Path) -> tuple[api_pb2.Experiment, list[api_pb2.SessionGroup]]:
    """Return the columns and rows of the HParams tab, from TensorBoard's own backend as its web page asks it."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    context = base_plugin.TBContext(logdir=str(logdir), data_provider=MultiplexerDataProvider(multiplexer, str(logdir)))
    backend, request = Context(context), RequestContext()
    metadata = backend.hparams_metadata(request, "")
    experiment = backend.experiment_from_metadata(request, "", True, metadata, None, hparams_limit=1000)
    listing = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_UNKNOWN], include_metrics=True
    )
    groups = list(ListHandler(request, backend, "", listing).run().session_groups)
    return experiment, groups


def session_groups(logdir: Path) -> list[api_pb2.SessionGroup]:
    return hparams_tab(logdir)[1]


def last_metrics(group: api_pb2.SessionGroup) -> dict[str, float]:
    return {value.name.tag: value.value for value in group.metric_values}


def test_hparams_shows_few_settings_and_the_last_metrics_of_a_run(tiny_run):
    experiment, (group,) = hparams_tab(tiny_run.parent)
    names = [info.name for info in experiment.hparam_infos]
    assert names == sorted([*tensorboard.HPARAMS, "preset"])  # the page shows the first five
    assert set(group.hparams) == set(names)
    assert [info.name.tag for info in experiment.metric_infos] == ["quality/psnr", "quality/ssim", "loss/total"]
    assert (group.name, len(group.sessions)) == (f"{tiny_run.name} ({tiny_run.parent})", 1)
    assert group.hparams["loss"].string_value == "bce"
    assert group.hparams["epochs"].number_value == 3
    assert group.hparams["noise_level"].number_value == 0.5
    preset = group.hparams["preset"].string_value
    assert preset.startswith("default --train-examples 600 ")
    assert "--batch-size 64" in preset
    line, metrics = read_metrics(tiny_run)[-1], last_metrics(group)
    assert list(metrics) == ["quality/psnr", "quality/ssim", "loss/total"]
    for tag, name in (("quality/ssim", "validation_ssim"), ("loss/total", "validation_loss")):
        assert metrics[tag] == pytest.approx(line[name], rel=1e-6)


def test_hparams_shows_the_metrics_of_the_user_and_without_validation_those_on_training_images(write_events, tmp_path):
    metrics: Any = (smallest_error,)
    config, resolved = replace(TINY, metrics=metrics), replace(RESOLVED, validation_examples=0)
    write_events(tmp_path / "run", config, epoch=1, loss=0.5, resolved=resolved)
    experiment, (group,) = hparams_tab(tmp_path)
    assert [info.name.tag for info in experiment.metric_infos][-1] == "quality/smallest_error"
    assert last_metrics(group) == {"loss/total": 0.5}


@pytest.fixture
def write_events(tiny_run, mnist):
    """A function that writes the events of one epoch of a run."""
    model = small_network((28, 28, 1))
    samples = pipeline.sample_batch(mnist.validation[-8:], TINY, "validation")

    def write(
        run: Path,
        config: RunConfig,
        epoch: int,
        loss: float,
        model: keras.Model = model,
        resolved: Resolved = RESOLVED,
    ) -> None:
        run.mkdir(exist_ok=True)
        shutil.copy(tiny_run / "environment.json", run)
        board = tensorboard.TensorBoard(run, config, resolved, model, samples, epochs_done=epoch - 1)
        board.write_epoch({"epoch": epoch, "train_loss": loss, "validation_psnr": 20 * loss})
        board.close()
        tensorboard.write_test(run / "tensorboard", {"epoch": epoch, "test_psnr": 10 * loss})

    return write


def test_hparams_shows_a_resumed_run_once_with_its_last_settings_and_metrics(write_events, tmp_path):
    config = replace(TINY, epochs=1)
    write_events(tmp_path / "run", config, epoch=1, loss=1.0)
    for file in (tmp_path / "run").rglob("events*"):  # a resume happens in a later second, and with another process
        file.rename(file.with_name("events.out.tfevents.1000000000.host.1.1.v2"))
    write_events(tmp_path / "run", replace(config, epochs=2), epoch=2, loss=0.5)
    (group,) = session_groups(tmp_path)
    assert len(group.sessions) == 1
    assert group.hparams["epochs"].number_value == 2
    assert last_metrics(group) == {"quality/psnr": 10.0}


def test_hparams_shows_runs_with_equal_settings_as_rows_named_by_name_and_folder(write_events, tmp_path):
    """Without a trial id, TensorBoard would show one row for both."""
    runs = [tmp_path / "first", tmp_path / "second"]
    for run, loss in zip(runs, (1.0, 0.5), strict=True):
        write_events(run, TINY, epoch=1, loss=loss)
    groups = sorted(session_groups(tmp_path), key=lambda group: group.name)
    assert [group.name for group in groups] == [f"{run.name} ({tmp_path})" for run in runs]
    assert groups[0].hparams == groups[1].hparams
    assert [len(group.sessions) for group in groups] == [1, 1]
    assert [last_metrics(group)["quality/psnr"] for group in groups] == [20.0, 10.0]
