import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from conftest import TINY
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler as ListHandler

from dae.data import pipeline
from dae.losses import losses
from dae.models import networks
from dae.reporting import tensorboard
from dae.training import trainer
from dae.workdir.workdir import read_metrics


def events(folder: Path) -> EventAccumulator:
    """All that TensorBoard would show of a folder."""
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def values(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in accumulator.Tensors(tag)]


def check_curves(folder: Path) -> None:
    """TensorBoard's curves are the lines of metrics.jsonl, one value an epoch."""
    lines = read_metrics(folder)
    for name in ("train", "validation"):
        shown = events(folder / "tensorboard" / name)
        for tag in tensorboard.scalars(lines[0], name):
            expected = [
                (line["epoch"], pytest.approx(tensorboard.scalars(line, name)[tag], rel=1e-6)) for line in lines
            ]
            assert values(shown, tag) == expected, (name, tag)


def test_steps_and_values_read_back_right(tiny_run):
    check_curves(tiny_run)
    test, report = events(tiny_run / "tensorboard" / "test"), json.loads((tiny_run / "report.json").read_text())
    assert values(test, "quality/psnr") == [(report["epoch"], pytest.approx(report["test_psnr"], rel=1e-6))]
    train = events(tiny_run / "tensorboard" / "train")
    (config,) = train.Tensors("run/configuration")
    assert "| batch_size | 64 |" in tf.make_ndarray(config.tensor_proto).item().decode()


def test_every_figure_has_one_tag():
    line = {"epoch": 2, "step": 9, "seconds": 1.0, "summary_seconds": 0.1, "images_per_second": 5.0}
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


def test_the_readme_describes_every_tag_as_tensorboard_does():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    table = readme.partition("| tag | meaning |\n| --- | --- |\n")[2].partition("\n\n")[0]
    rows = (re.fullmatch(r"\| `(\S+)` \| (.*) \|", row) for row in table.splitlines())
    assert {row[1]: row[2] for row in rows if row} == tensorboard.TAGS


def test_gradient_norm_and_update_ratio_are_those_of_the_steps(mnist, tmp_path):
    """One epoch of one step: the gradient computed anew, and Adam's first step of its rate for each weight."""
    config = replace(TINY, train_examples=64, epochs=1)
    trainer.train(config, tmp_path / "run")
    (line,) = read_metrics(tmp_path / "run")
    model = networks.build(config, (28, 28, 1))
    ((noisy, clean),) = pipeline.training_batches(mnist.train[:64], config)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(losses.bce(clean, model(noisy)))
    gradients = tape.gradient(loss, model.trainable_variables)
    assert line["gradient_norm"] == pytest.approx(float(tf.linalg.global_norm(gradients)), rel=1e-4)
    # Whose epsilon, 1e-7, stands beside the root of (1 - 0.999) g^2.
    updates = [1e-3 * gradient / (abs(gradient) + 1e-7 / 0.001**0.5) for gradient in gradients]
    ratio = tf.linalg.global_norm(updates) / tf.linalg.global_norm(model.trainable_variables)
    assert line["update_to_weight_ratio"] == pytest.approx(float(ratio), rel=1e-3)


def test_the_image_grid_shows_noisy_denoised_clean_and_error(tiny_run, mnist):
    shown = events(tiny_run / "tensorboard" / "validation").Tensors("images/noisy_denoised_clean_error")
    assert [event.step for event in shown] == [1, 2, 3]
    width, height, *pictures = tf.make_ndarray(shown[-1].tensor_proto)
    assert (int(width), int(height), len(pictures)) == (4 * 30, 8 * 30, 1)
    picture = tf.io.decode_png(pictures[0]).numpy()
    np.testing.assert_array_equal(picture[1:29, 61:89], mnist.validation[-256])
    assert abs(picture[1:29, 1:29].astype(float) - mnist.validation[-256]).mean() > 20
    error = abs(picture[1:29, 31:59].astype(float) - picture[1:29, 61:89])
    assert abs(picture[1:29, 91:119] - error).max() <= 1


def test_what_a_kill_left_beyond_the_checkpoint_is_dropped_and_written_again(tmp_path, tiny_run):
    folder = tmp_path / "run"
    trainer.train(replace(TINY, epochs=2), folder)
    for path in (folder / "checkpoints" / "newest").glob("ckpt-20.*"):
        path.unlink()  # as if killed after the summaries of epoch 2, before its checkpoint
    for file in (folder / "tensorboard").glob("*/events*"):
        file.write_bytes(file.read_bytes()[:-7])  # and in the middle of a record
    trainer.train(TINY, folder, resume=True)
    check_curves(folder)
    assert (folder / "report.json").read_text() == (tiny_run / "report.json").read_text()


def test_dropping_twice_or_interrupted_doubles_nothing(tmp_path, tiny_run):
    folder = tmp_path / "events"
    shutil.copytree(tiny_run / "tensorboard" / "train", folder)
    (file,) = folder.iterdir()
    shutil.copy(file, file.with_name(file.name + ".copy"))
    for _ in range(2):
        tensorboard.drop_after(folder, 2)
    assert [step for step, _ in values(events(folder), "loss/total")] == [1, 2]
    assert len(list(folder.iterdir())) == 1


def test_the_hparams_tab_shows_settings_and_last_metrics_of_every_run_once_also_after_a_resume(tmp_path):
    """Through TensorBoard's own backend, as its web page asks it."""
    for loss in ("bce", "mse"):
        config = replace(TINY, loss=loss, noise_level=(0.1, 0.8), epochs=1)
        trainer.train(config, tmp_path / loss)
    trainer.train(replace(config, epochs=2), tmp_path / "mse", resume=True)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    context = base_plugin.TBContext(
        logdir=str(tmp_path), data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))
    )
    backend = Context(context)
    request = RequestContext()
    experiment = backend.experiment_from_metadata(request, "", True, backend.hparams_metadata(request, ""), None)
    listing = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=[api_pb2.STATUS_UNKNOWN], include_metrics=True
    )
    groups = ListHandler(request, backend, "", listing).run().session_groups
    shown = {group.hparams["loss"].string_value: group for group in groups}
    assert sorted(shown) == ["bce", "mse"]
    assert shown["mse"].hparams["epochs"].number_value == 2
    assert shown["mse"].hparams["clip_noise"].bool_value
    assert shown["mse"].hparams["noise_level"].string_value == "(0.1, 0.8)"
    report = json.loads((tmp_path / "mse" / "report.json").read_text())
    metrics = {(value.name.group, value.name.tag): value.value for value in shown["mse"].metric_values}
    assert metrics["test", "quality/psnr"] == pytest.approx(report["test_psnr"], rel=1e-6)
    assert metrics["validation", "quality/ssim"] > 0
    assert metrics["train", "loss/total"] > 0
    assert len(experiment.metric_infos) >= len(metrics)
