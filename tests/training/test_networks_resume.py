"""Runs of a user's network and metric: BatchNormalization, Dropout, regularizers, averaged weights; --start-from."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EXPERIMENTS, TINY, batch_of, objective
from keras import layers

from dae import callables
from dae import config as config_module
from dae.analysis.reproducibility import first_difference
from dae.config import RunConfig
from dae.data import datasets
from dae.data.pipeline import evaluation_batches, training_batches
from dae.errors import UsageError
from dae.evaluation.evaluate import make_evaluator
from dae.losses import composite
from dae.optimizers import optimizers
from dae.reporting.logger import Logger
from dae.training import trainer
from dae.training.checkpoints import Checkpoints, saved_in
from dae.training.task import prepare
from dae.training.train_state import TrainState
from dae.training.train_step import make_train_step, seed_layers
from dae.workdir.model_files import load_model
from dae.workdir.workdir import read_metrics, read_report

NETWORK = """
import keras
from keras import layers


def network(image_shape):
    noisy = keras.Input(image_shape)
    x = layers.Conv2D(4, 3, strides=2, padding="same", kernel_regularizer=keras.regularizers.L2(0.1))(noisy)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(x))
    x = layers.Dropout(0.3, name="encoder")(x)
    return keras.Model(noisy, layers.Conv2DTranspose(1, 4, strides=2, padding="same", activation="sigmoid")(x))
"""
METRIC = """
import tensorflow as tf


def largest_error(clean, denoised):
    return tf.reduce_max(tf.abs(clean - denoised), axis=[1, 2, 3])
"""


class Stop(Exception):
    """Raised in the place of a kill."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's files and a finished run, `run`."""
    folder = tmp_path_factory.mktemp("networks")
    (folder / "network.py").write_text(NETWORK)
    (folder / "metric.py").write_text(METRIC)
    trainer.train(config_in(folder), folder / "run", quiet=True)
    return folder


def config_in(folder: Path, **changes) -> RunConfig:
    files = {"model": f"{folder}/network.py:network", "metrics": (f"{folder}/metric.py:largest_error",)}
    small = {"train_examples": 300, "validation_examples": 100, "epochs": 2, "bce_steps": 2}
    return replace(TINY, **files, **small, ema_decay=0.6, checkpoint_every=2, **changes)  # type: ignore[arg-type]


def test_resumed_run_equals_an_uninterrupted_one(folder, tmp_path, monkeypatch):
    def progress_and_stop(self: Logger, epoch: int, images: int, loss: tf.Tensor) -> None:
        progress(self, epoch, images, loss)
        calls.append(epoch)
        if calls == [1, 1, 1]:  # after step 5, of which the checkpoint of step 4 knows nothing
            raise Stop

    calls: list[int] = []
    progress = Logger.progress
    with monkeypatch.context() as patch:
        patch.setattr(Logger, "progress", progress_and_stop)
        with pytest.raises(Stop):
            trainer.train(config_in(folder), tmp_path / "run", quiet=True)
    assert saved_in(tmp_path / "run" / "checkpoints" / "latest")[-1].name == "ckpt-4"
    trainer.train(config_in(folder), tmp_path / "run", resume=True, quiet=True)
    assert first_difference(tmp_path / "run", folder / "run") is None


@pytest.mark.slow
def test_killed_run_is_resumed_to_the_same_bits(folder, tmp_path):
    config = config_in(folder, intra_op_threads=1)  # as in this process
    (tmp_path / "config.json").write_text(config_module.to_json(config))
    command = [sys.executable, str(EXPERIMENTS / "run.py"), "--config", "config.json", "--run-dir", "run"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "latest" / "ckpt-2.index").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    trainer.train(config, tmp_path / "run", resume=True, quiet=True)
    assert first_difference(tmp_path / "run", folder / "run") is None


def test_batches_are_not_split_if_the_network_normalizes_them(folder):
    assert config_module.read(folder / "run" / "config.json").shards == 1


def test_regularization_is_the_sum_of_the_losses_of_keras(folder):
    report, model = read_report(folder / "run"), load_model(folder / "run")
    (regularization,) = model.losses
    assert report["test_loss_regularization"] == pytest.approx(float(regularization), rel=1e-6)
    assert report["test_loss"] == pytest.approx(report["test_bce"] + float(regularization), rel=1e-6)
    for line in read_metrics(folder / "run"):
        assert line["train_loss"] == pytest.approx(line["train_loss_bce"] + line["train_loss_regularization"])


def test_moving_means_change_and_validation_uses_them(folder):
    model = load_model(folder / "run")
    (normalization,) = (layer for layer in model.layers if isinstance(layer, layers.BatchNormalization))
    assert float(tf.reduce_min(tf.abs(normalization.moving_mean))) > 0
    config, report = config_module.read(folder / "run" / "config.json"), read_report(folder / "run")
    line = read_metrics(folder / "run")[int(report["epoch"]) - 1]
    images = datasets.load(config).validation

    def psnr(training: bool) -> float:
        values = [
            tf.image.psnr(batch.clean, model(batch.noisy, training=training), 1.0)
            for batch in evaluation_batches(images, config, "validation")
        ]
        return float(tf.reduce_mean(tf.concat(values, axis=0)))

    assert psnr(training=False) == pytest.approx(line["validation_psnr"], rel=1e-5)
    assert abs(psnr(training=True) - line["validation_psnr"]) > 1e-3


def masks(model: keras.Model, *seed: int) -> list[np.ndarray]:
    """Return what remains of two images of ones after Dropout, in two shards."""
    seed_layers(model, tf.constant(seed, tf.int64))
    return [model(tf.ones((2, 28, 28, 1)), training=True).numpy() for _ in range(2)]


def test_masks_of_dropout_are_a_function_of_the_step():
    image = keras.Input((28, 28, 1))
    model = keras.Model(image, layers.Add()([layers.Dropout(0.5)(image), layers.SpatialDropout2D(0.5)(image)]))
    first = masks(model, 3, 0)
    masks(model, 3, 1)
    for mask, again, other in zip(first, masks(model, 3, 0), masks(model, 3, 1), strict=True):
        np.testing.assert_array_equal(mask, again)
        assert not np.array_equal(mask, other)
    assert not np.array_equal(first[0], first[1])
    seeds = [generator.state.numpy().tolist() for layer in model.layers for generator in layer._seed_generators]
    assert len(seeds) == 2
    assert seeds[0] != seeds[1]


def new_averaged_state(config: RunConfig, model: keras.Model, average: keras.Model) -> TrainState:
    return TrainState(model, composite.build("bce"), optimizers.build(config, 30), average)


def test_averaged_weights_follow_the_documented_formula(mnist):
    """Also the moving means of BatchNormalization are averaged, and the decay is lower in the first steps."""
    config = RunConfig(batch_size=8, ema_decay=0.3, shards=1, learning_rate=0.01)

    def network() -> keras.Model:
        image = keras.Input((28, 28, 1))
        x = layers.BatchNormalization()(layers.Conv2D(2, 3, padding="same")(image))
        return keras.Model(image, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))

    model, average = network(), network()
    average.set_weights(model.get_weights())
    state = new_averaged_state(config, model, average)
    train_step = make_train_step(state, objective("bce", config, state.step), config)
    expected = [weight.astype(np.float64) for weight in model.get_weights()]
    decays = []
    for step, batch in enumerate(training_batches(mnist.train[:80], config).take(5), start=1):
        train_step(batch)
        decays.append(min(0.3, (1 + step) / (10 + step)))
        expected = [
            decays[-1] * old + (1 - decays[-1]) * new for old, new in zip(expected, model.get_weights(), strict=True)
        ]
    assert decays == [2 / 11, 3 / 12, 0.3, 0.3, 0.3]
    for weight, value, trained in zip(average.get_weights(), expected, model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, value, rtol=1e-5, atol=1e-7)
        assert not np.array_equal(weight, trained)


def test_averaged_weights_are_those_that_are_exported(folder):
    task = prepare(config_in(folder))
    state = TrainState(task.model, task.loss, task.optimizer, task.evaluated_model)
    Checkpoints(folder / "run" / "checkpoints", state).restore_best()
    exported = load_model(folder / "run").get_weights()
    for weight, average, trained in zip(exported, state.average.get_weights(), state.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, average)
        assert not np.array_equal(weight, trained)


def test_losses_of_activities_and_of_averaged_weights_are_those_of_the_evaluated_network():
    """A loss of activities exists only after the network that is evaluated was called."""

    def network(image_shape):
        noisy = keras.Input(image_shape)
        x = layers.Conv2D(2, 3, padding="same", activity_regularizer="l1")(noisy)
        return keras.Model(noisy, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))

    small = replace(TINY, train_examples=64, validation_examples=32, ema_decay=0.9)
    task = prepare(replace(small, model=callables.record(network, "model")[0]))
    for weight in task.evaluated_model.trainable_weights:
        weight.assign(2 * weight)
    evaluate = make_evaluator(task.evaluated_model, task.evaluated_objective(tf.Variable(0, dtype=tf.int64)))
    batch = batch_of(task.samples.noisy, task.samples.clean)
    value = evaluate([batch])["loss_regularization"]
    task.evaluated_model(batch.noisy)
    assert value == pytest.approx(float(tf.add_n(task.evaluated_model.losses)), rel=1e-5)
    task.model(batch.noisy)
    assert value > 1.5 * float(tf.add_n(task.model.losses))


def test_metric_of_a_users_file_is_reported_everywhere(folder):
    for line in read_metrics(folder / "run"):
        assert 0 < line["train_largest_error"] <= 1
        assert 0 < line["validation_largest_error"] <= 1
    model, config = load_model(folder / "run"), config_module.read(folder / "run" / "config.json")
    errors = [
        tf.reduce_max(tf.abs(batch.clean - model(batch.noisy)), axis=[1, 2, 3])
        for batch in evaluation_batches(datasets.load(config).test, config, "test")
    ]
    expected = float(tf.reduce_mean(tf.concat(errors, axis=0)))
    assert read_report(folder / "run")["test_largest_error"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "flag"), [("metric", "--metrics"), ("network", "--model")])
def test_resume_with_another_content_of_a_file_is_refused(name, flag, folder, tmp_path):
    for file in ("network.py", "metric.py"):
        shutil.copy(folder / file, tmp_path)
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    changed = tmp_path / f"{name}.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    with pytest.raises(UsageError, match=rf"--resume: .*{flag} was .*{name}\.py"):
        trainer.train(config_in(tmp_path), run, resume=True)
    shutil.copy(folder / f"{name}.py", tmp_path)
    trainer.train(config_in(tmp_path), run, resume=True, quiet=True)
    kept = run / "code" / f"{name}.py"
    kept.write_text(kept.read_text() + "\n# changed\n")
    (run / "report.json").unlink()
    with pytest.raises(
        UsageError, match=rf"{flag}: .*code/{name}\.py: differs from the file that the run was made with"
    ):
        trainer.train(config_in(tmp_path), run, resume=True)


@pytest.fixture
def started(tiny_run, tmp_path) -> tuple[Path, RunConfig]:
    """A run that started from the weights of another, and was stopped after its first epoch; and its configuration."""

    def stop(line):
        raise Stop

    shutil.copy(tiny_run / "model.keras", tmp_path / "start.keras")
    small = replace(TINY, train_examples=64, epochs=2, learning_rate=1e-12)
    config = replace(small, start_from=str(tmp_path / "start.keras"))
    with pytest.raises(Stop):
        trainer.train(config, tmp_path / "run", quiet=True, on_epoch_end=stop)
    return tmp_path / "run", config


def test_run_starts_from_the_weights_of_another_and_refuses_others_at_resume(started, tiny_run):
    run, config = started
    (line,) = read_metrics(run)
    best = int(read_report(tiny_run)["epoch"])
    expected = read_metrics(tiny_run)[best - 1]
    for name in ("validation_bce", "validation_psnr", "validation_ssim"):
        assert line[name] == pytest.approx(expected[name], rel=1e-4)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["start_from"] == config.start_from
    assert len(recorded["weights_digest"]) == 64

    model = keras.models.load_model(config.start_from)
    changed = [weight + 0.01 for weight in model.get_weights()]
    before = (run / "config.json").read_bytes()
    model.set_weights(changed)
    model.save(config.start_from)
    with pytest.raises(UsageError, match=r"--start-from: .*other weights than the run started from") as caught:
        trainer.train(config, run, resume=True)
    assert recorded["weights_digest"] in str(caught.value)
    assert (run / "config.json").read_bytes() == before


@pytest.mark.slow
def test_run_that_started_from_another_is_resumed_to_the_same_bits(started, tiny_run, tmp_path):
    run, config = started
    trainer.train(config, tmp_path / "uninterrupted", quiet=True)
    report = trainer.train(config, run, resume=True, quiet=True)
    assert report["test_bce"] == pytest.approx(read_report(tiny_run)["test_bce"], rel=1e-4)
    assert first_difference(run, tmp_path / "uninterrupted") is None


def test_start_from_takes_the_averaged_weights_of_a_run(folder, tmp_path):
    config = replace(config_in(folder), start_from=str(folder / "run"))
    task = prepare(config)
    for model in (task.model, task.evaluated_model):
        for weight, expected in zip(model.get_weights(), load_model(folder / "run").get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("none", {}, ["no such run's folder or model file"]),
        ("none.keras", {}, ["no such run's folder or model file"]),
        ("", {}, ["not a finished run"]),
        ("tiny", {"model": "blog"}, ["another network than --model blog"]),
        ("tiny", {"width": 2}, ["another network than --model conv"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(path, changes, words, tiny_run, tmp_path):
    start = tiny_run if path == "tiny" else tmp_path / path
    with pytest.raises(UsageError) as caught:
        trainer.train(replace(TINY, train_examples=64, start_from=str(start), **changes), tmp_path / "runs" / "run")
    assert str(caught.value).startswith(f"--start-from: {start}: ")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()
