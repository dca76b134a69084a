"""Runs of users' networks: regularizers, Dropout, averaged weights, metrics, and networks as they are published."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EIGHT_BITS, batch_of, new_train_step
from keras import layers
from runs import config_of

import dae
from dae import config as config_module
from dae import plugins
from dae.config import RunConfig
from dae.data import datasets
from dae.data.pipeline import evaluation_batches, training_batches
from dae.errors import RunError, UsageError
from dae.evaluation.evaluate import make_evaluator
from dae.inference import export
from dae.losses import composite
from dae.models import networks
from dae.models.fused_layers import outputs, seed_layers
from dae.optimizers import optimizers
from dae.training.checkpoints import Checkpoints, restored_model
from dae.training.task import prepare
from dae.training.train_state import TrainState
from dae.workdir.model_files import MODEL_FILES, WEIGHTS, load_model, save_all
from dae.workdir.workdir import read_metrics, read_report


@pytest.fixture
def run(finished_run):
    """A finished run of a network with all of that."""
    return finished_run("network")


def test_regularization_is_the_sum_of_the_losses_of_keras(run):
    report, model = read_report(run), load_model(run)
    (regularization,) = model.losses
    assert report["test_loss_regularization"] == pytest.approx(float(regularization), rel=1e-6)
    assert report["test_loss"] == pytest.approx(report["test_bce"] + float(regularization), rel=1e-6)
    for line in read_metrics(run):
        assert line["train_loss"] == pytest.approx(line["train_loss_bce"] + line["train_loss_regularization"])


def test_moving_means_change_and_validation_uses_them(run):
    model = load_model(run)
    (normalization,) = (layer for layer in model.layers if isinstance(layer, layers.BatchNormalization))
    assert float(tf.reduce_min(tf.abs(normalization.moving_mean))) > 0
    config, report = config_module.read(run / "config.json"), read_report(run)
    line = read_metrics(run)[int(report["epoch"]) - 1]
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


def test_averaged_weights_follow_the_documented_formula(mnist):
    """Also the moving means of BatchNormalization are averaged, and the decay is lower in the first steps."""
    config = RunConfig(batch_size=8, ema_decay=0.3, shards=1, learning_rate=0.01)

    def network() -> keras.Model:
        image = keras.Input((28, 28, 1))
        x = layers.BatchNormalization()(layers.Conv2D(2, 3, padding="same")(image))
        return keras.Model(image, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))

    model, average = network(), network()
    average.set_weights(model.get_weights())
    optimizer = optimizers.build(config, 30)
    state = TrainState(model, composite.build("bce"), optimizer, averaged_model=average, ema_decay=config.ema_decay)
    train_step = new_train_step(state, config)
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


def test_averaged_weights_are_those_that_are_exported(run, files):
    state = prepare(config_of(files, "network")).new_state()
    Checkpoints(run / "checkpoints", state).restore_best()
    exported = load_model(run).get_weights()
    for weight, average, trained in zip(exported, state.average.get_weights(), state.model.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, average)
        assert not np.array_equal(weight, trained)


def test_losses_of_activities_and_of_averaged_weights_are_those_of_the_evaluated_network(files):
    """A loss of activities exists only after the network that is evaluated was called."""

    def network(image_shape):
        noisy = keras.Input(image_shape)
        x = layers.Conv2D(2, 3, padding="same", activity_regularizer="l1")(noisy)
        return keras.Model(noisy, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))

    task = prepare(config_of(files, model=network, ema_decay=0.9))
    for weight in task.evaluated_model.trainable_weights:
        weight.assign(2 * weight)
    evaluate = make_evaluator(task.evaluated_model, task.evaluated_objective(tf.Variable(0, dtype=tf.int64)))
    batch = batch_of(task.samples.noisy, task.samples.clean)
    value = evaluate("test", [batch])["test_loss_regularization"]
    task.evaluated_model(batch.noisy)
    assert value == pytest.approx(float(tf.add_n(task.evaluated_model.losses)), rel=1e-5)
    task.model(batch.noisy)
    assert value > 1.5 * float(tf.add_n(task.model.losses))


def test_a_run_starts_from_the_averaged_weights_of_another_without_a_warm_up(files, run):
    task = prepare(config_of(files, "network", start_from=str(run), loss="mae", bce_steps=9))
    for model in (task.model, task.evaluated_model):
        assert all(map(np.array_equal, model.get_weights(), load_model(run).get_weights()))
    assert not task.objective(tf.Variable(0, dtype=tf.int64)).warms_up


FIXED_SIZE = "the model takes images of (16, 16, 1), not of 20 x 24"

# A row of runs.py, the model files from which Keras alone restores the network, and the error for other sizes.
NETWORKS = [
    ("published_dncnn", [], None),
    ("published_nafnet", ["model.keras"], None),
    ("published_attention", [], None),
    ("published_spectral", [], None),
    ("published_variational", [], FIXED_SIZE),
    ("published_times", [], None),
]
FAST = "published_dncnn"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "alone", "problem"), [pytest.param(*row, id=row[0]) for row in NETWORKS])
def test_a_published_network_trains_reloads_denoises_and_is_exported(name, alone, problem, finished_run, tmp_path):
    run = finished_run(name)
    assert restored_model(run).count_params() == load_model(run).count_params()
    assert sorted(file.name for file in run.glob("model.*")) == sorted([*alone, WEIGHTS])
    for name_of_file in alone:
        assert keras.models.load_model(run / name_of_file, compile=False)
    model = load_model(run)
    (line,) = save_all(model, tmp_path, EIGHT_BITS, is_own=True)
    missing = [file for file in MODEL_FILES if file not in alone]
    assert line.startswith(f"model files: without {', '.join(missing)}, from which")

    image = np.random.default_rng(0).random((16, 16), np.float32)
    expected_image = np.clip(outputs(model, image[None, ..., None]), 0, 1)[0, ..., 0]
    np.testing.assert_allclose(dae.denoise(image, model), expected_image, atol=1e-6)
    np.testing.assert_array_equal(dae.denoise(image, model), dae.denoise(image, run))
    other = np.random.default_rng(1).random((20, 24), np.float32)
    if problem is None:
        assert dae.denoise(other, model).shape == other.shape
    else:
        with pytest.raises(UsageError) as caught:
            dae.denoise(other, model)
        assert str(caught.value) == problem
    if name == "published_variational":  # what it draws in inference is not part of a file
        with pytest.raises(RunError, match=r"^savedmodel: images \(1, 16, 16, 1\) differ by up to "):
            export.export(model, "savedmodel", tmp_path / "exported")
    else:
        assert export.export(model, "savedmodel", tmp_path / "exported")


def test_model_files_that_need_a_class_registered_in_this_process_are_not_kept(tmp_path):
    """Keras would restore the network here, but not in a process that has not registered the class."""
    noisy = keras.Input((16, 16, 1))
    with plugins.without_registered():  # of this test, for other tests
        own = keras.saving.register_keras_serializable("own")(type("Own", (layers.ReLU,), {}))
        (line,) = save_all(keras.Model(noisy, own()(noisy)), tmp_path, EIGHT_BITS, is_own=True)
    assert line.startswith("model files: without model.keras, model.h5, from which")
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]


@pytest.mark.parametrize("added", [b"", b"\nraise SystemExit\n"])
def test_a_run_builds_its_network_from_its_own_copy_of_the_file_once_the_digest_is_compared(
    added, finished_run, tmp_path
):
    run, copy = finished_run(FAST), tmp_path / "run"
    (copy / "code").mkdir(parents=True)
    for name in ("config.json", "resolved.json", "report.json", "model.weights.h5", "code/published.py"):
        (copy / name).write_bytes((run / name).read_bytes() + (added if name.startswith("code") else b""))
    if added:
        with pytest.raises(UsageError, match=r"published.py: differs from what the run was made with"):
            load_model(copy)
    else:
        assert all(map(np.array_equal, load_model(copy).get_weights(), load_model(run).get_weights()))


def test_names_that_two_files_register_with_keras_do_not_collide(files, tmp_path):
    """The class that each of the files registers as `Gain` is the one that its network uses."""
    other = tmp_path / "other.py"
    text = (files / "published.py").read_text()
    other.write_text(text.replace("class Gain(Scale):\n    pass", "class Gain(layers.ReLU):\n    pass"))
    counts = [
        networks.build(config_of(files, model=f"{file}:attention"), (16, 16, 1)).count_params()
        for file in (files / "published.py", other, files / "published.py")
    ]
    assert counts[0] == counts[2] == counts[1] + 4
    assert "Gain" not in "".join(keras.saving.get_custom_objects())


def test_loss_of_a_linear_network_sees_the_outputs_and_metrics_the_clipped_images(finished_run, files):
    run = finished_run(FAST)
    config = config_of(files, FAST)
    task, model = prepare(config), load_model(run)
    squared, clipped = [], []
    for batch in evaluation_batches(task.data.test, config, "test"):
        denoised = outputs(model, batch.noisy)
        squared.append(np.square(denoised - batch.clean).mean(axis=(1, 2, 3)))
        clipped.append(np.square(np.clip(denoised, 0, 1) - batch.clean).mean(axis=(1, 2, 3)))
    report = read_report(run)
    assert report["test_loss"] == pytest.approx(np.concatenate(squared).mean(), rel=1e-5)
    assert report["test_mse"] == pytest.approx(np.concatenate(clipped).mean(), rel=1e-5)
    assert report["test_mse"] < report["test_loss"]
    assert not task.objective(tf.Variable(0, dtype=tf.int64)).warms_up
