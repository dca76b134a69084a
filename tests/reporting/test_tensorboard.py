import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from helpers import RESOLVED, TINY, check_curves, events, scalar_values, small_network
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler as ListHandler

from dae.config import RunConfig
from dae.data import pipeline
from dae.reporting import tensorboard
from dae.training import trainer
from dae.workdir.workdir import read_metrics

# The layers of the network `conv`.
LAYERS = [f"{half}_conv_{number}" for half in ("encoder", "decoder") for number in (1, 2, 3)] + ["denoised"]


def text(accumulator: EventAccumulator, tag: str) -> str:
    """Return the only text of `tag`, which is that of step 0."""
    (event,) = accumulator.Tensors(tag)
    assert event.step == 0
    return tf.make_ndarray(event.tensor_proto).item().decode()


def test_each_writer_is_a_run_and_each_plugin_of_tensorboard_finds_data(tiny_run):
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tiny_run)).Reload()
    writers = (f"tensorboard/{name}" for name in ("test", "train", "validation"))
    assert sorted(multiplexer.Runs()) == ["tensorboard", *writers]
    active = MultiplexerDataProvider(multiplexer, str(tiny_run)).list_plugins(RequestContext(), experiment_id="")
    assert {"scalars", "images", "histograms", "graphs", "text", "hparams"} == active


def test_curves_have_the_values_of_the_run(tiny_run):
    check_curves(tiny_run)
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


def test_the_graph_contains_the_gradient(tiny_run):
    assert b"Conv2DBackpropFilter" in events(tiny_run / "tensorboard" / "train").Graph().SerializeToString()


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
        for tag in accumulator.Tags()["tensors"]:
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


@pytest.mark.slow
def test_a_resume_drops_events_after_the_checkpoint_and_writes_them_again(tmp_path, tiny_run):
    folder = tmp_path / "run"
    shutil.copytree(tiny_run, folder)
    (folder / "report.json").unlink()
    checkpoint = list((folder / "checkpoints" / "latest").glob("ckpt-30.*"))
    assert checkpoint
    for path in checkpoint:
        path.unlink()  # as if killed between the events of epoch 3 and its checkpoint
    for file in (folder / "tensorboard").glob("*/events*"):
        file.write_bytes(file.read_bytes()[:-7])  # and in the middle of a record
    trainer.train(TINY, folder, resume=True)
    check_curves(folder)
    assert (folder / "report.json").read_text() == (tiny_run / "report.json").read_text()


def test_truncate_events_twice_or_interrupted_doubles_no_event(tmp_path, tiny_run):
    folder = tmp_path / "events"
    shutil.copytree(tiny_run / "tensorboard" / "train", folder)
    (file,) = folder.iterdir()
    shutil.copy(file, file.with_name(file.name + ".copy"))  # as if killed before the old file was removed
    for _ in range(2):
        tensorboard.truncate_events(folder, 2)
    assert [step for step, _ in scalar_values(events(folder), "loss/total")] == [1, 2]
    assert len(list(folder.iterdir())) == 1


def session_groups(logdir: Path) -> list[api_pb2.SessionGroup]:
    """Return the rows of the HParams tab, from TensorBoard's own backend as its web page asks it."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(logdir)).Reload()
    context = base_plugin.TBContext(logdir=str(logdir), data_provider=MultiplexerDataProvider(multiplexer, str(logdir)))
    backend, request = Context(context), RequestContext()
    experiment = backend.experiment_from_metadata(request, "", True, backend.hparams_metadata(request, ""), None)
    listing = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_UNKNOWN], include_metrics=True
    )
    groups = list(ListHandler(request, backend, "", listing).run().session_groups)
    assert all(len(experiment.metric_infos) >= len(group.metric_values) for group in groups)
    return groups


def last_metrics(group: api_pb2.SessionGroup) -> dict[tuple[str, str], float]:
    return {(value.name.group, value.name.tag): value.value for value in group.metric_values}


def test_hparams_shows_the_settings_and_last_metrics_of_a_run(tiny_run):
    (group,) = session_groups(tiny_run.parent)
    assert (group.name, len(group.sessions)) == (f"{tiny_run.name} ({tiny_run.parent})", 1)
    assert group.hparams["loss"].string_value == "bce"
    assert group.hparams["epochs"].number_value == 3
    assert group.hparams["clip_noise"].bool_value
    report, line = json.loads((tiny_run / "report.json").read_text()), read_metrics(tiny_run)[-1]
    metrics = last_metrics(group)
    assert metrics["test", "quality/psnr"] == pytest.approx(report["test_psnr"], rel=1e-6)
    assert metrics["validation", "quality/ssim"] == pytest.approx(line["validation_ssim"], rel=1e-6)
    assert metrics["train", "loss/total"] == pytest.approx(line["train_loss"], rel=1e-6)


@pytest.fixture
def write_events(tiny_run, mnist):
    """A function that writes the events of one epoch of a run."""
    model = small_network((28, 28, 1))
    samples = pipeline.sample_batch(mnist.validation[-8:], TINY, "validation")

    def write(run: Path, config: RunConfig, epoch: int, loss: float) -> None:
        run.mkdir(exist_ok=True)
        shutil.copy(tiny_run / "environment.json", run)
        board = tensorboard.TensorBoard(run, config, RESOLVED, model, samples, epochs_done=epoch - 1)
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
    assert group.hparams["value_range"].string_value == "(0.0, 255.0)"
    assert group.hparams["dtype"].string_value == "uint8"
    assert last_metrics(group) == {
        ("train", "loss/total"): 0.5,
        ("validation", "quality/psnr"): 10.0,
        ("test", "quality/psnr"): 5.0,
    }


def test_hparams_shows_runs_with_equal_settings_as_rows_named_by_name_and_folder(write_events, tmp_path):
    """Without a trial id, TensorBoard would show one row for both."""
    runs = [tmp_path / "first", tmp_path / "second"]
    for run, loss in zip(runs, (1.0, 0.5), strict=True):
        write_events(run, TINY, epoch=1, loss=loss)
    groups = sorted(session_groups(tmp_path), key=lambda group: group.name)
    assert [group.name for group in groups] == [f"{run.name} ({tmp_path})" for run in runs]
    assert groups[0].hparams == groups[1].hparams
    assert [len(group.sessions) for group in groups] == [1, 1]
    assert [last_metrics(group)["train", "loss/total"] for group in groups] == [1.0, 0.5]
