"""Tests of losses that are Keras layers: their weights, the training of these, checkpoints, and the examples."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    EXPERIMENTS,
    TINY,
    new_train_step,
    objective,
    rejected,
    run_in_process,
    run_subprocess,
    small_network,
)
from runs import config_of

from dae.data.images import Images
from dae.data.pipeline import Batch, training_batches
from dae.errors import UsageError
from dae.losses import composite, contract
from dae.losses.composite import CompositeLoss
from dae.losses.objective import Objective
from dae.models.fused_layers import fused
from dae.training import task
from dae.training.train_state import TrainState

EXAMPLES = EXPERIMENTS / "examples"
ADVERSARIAL = f"bce + 0.01*{EXAMPLES}/adversarial.py:Adversarial"
LEARNED = f"{EXAMPLES}/learned_weights.py:LearnedWeights"
PERCEPTUAL = f"bce + 0.1*{EXAMPLES}/perceptual.py:Perceptual"

HEAD = """
import keras
import numpy as np
import tensorflow as tf


class Mine(keras.Layer):
    def __init__(self):
        super().__init__()
        {init}

    def call(self, clean, denoised):
        error = tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])
        return {call}
"""
FEATURES = {
    "init": "self.dense = keras.layers.Dense(3)",
    "call": "error + tf.reduce_mean(self.dense(denoised) ** 2, axis=[1, 2, 3])",
}
SCALED = "self.scale = self.add_weight(shape=(4,), initializer=tf.constant_initializer({}), trainable=False)"


def write(folder: Path, init: str, call: str = "error", update: str = "") -> str:
    """Return the name of a user's layer in a new file, whose methods hold these lines."""
    text = HEAD.format(init=init, call=call)
    if update:
        text += f"\n    def update(self, clean, denoised):\n        {update}\n"
    (folder / "mine.py").write_text(text)
    return f"{folder}/mine.py:Mine"


@pytest.fixture(scope="module")
def batch(mnist) -> Batch:
    images = Images(mnist.train.pixels[:64, 8:20, 8:20])
    return next(iter(training_batches(images, replace(TINY, batch_size=16))))


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return small_network((12, 12, 1))


@pytest.fixture
def checked(model, batch) -> Callable[..., Objective]:
    """A function that returns the objective of a loss once its contract was checked, as at the start of a run."""

    def check(loss: str, seed: int = 0) -> Objective:
        config = replace(TINY, seed=seed)
        made, again = objective(loss, config), objective(loss, config)
        contract.check(made, model, batch)
        contract.check_initial_weights(made, again, model, batch)
        return made

    return check


def weights(made: Objective) -> list[np.ndarray]:
    return [weight for layer in made.loss.layers for weight in layer.get_weights()]


@pytest.mark.parametrize(
    "init",
    [
        "self.dense = lambda images: images @ self.matrix\n"
        "        self.matrix = self.add_weight(shape=(1, 3), initializer='random_normal')",
        "\n    def build(self, shape):\n        self.dense = keras.layers.Dense(3)",
    ],
)
def test_initial_weights_are_a_function_of_the_seed(init, checked, tmp_path):
    loss = write(tmp_path, init, FEATURES["call"])
    random.seed(5)
    first, again, other = weights(checked(loss)), weights(checked(loss)), weights(checked(loss, seed=1))
    assert len(first) > 0
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_two_terms_have_different_initial_weights(checked, tmp_path):
    loss = write(tmp_path, FEATURES["init"], FEATURES["call"])
    shutil.copy(tmp_path / "mine.py", tmp_path / "other.py")
    first, _, second, _ = weights(checked(f"{loss} + {tmp_path}/other.py:Mine"))
    assert not np.array_equal(first, second)


def test_building_a_loss_leaves_pythons_random_numbers_alone(tmp_path):
    loss = write(tmp_path, FEATURES["init"] + "; self.dense.build((None, 28, 28, 1))", FEATURES["call"])
    before = random.getstate()
    composite.build(loss)
    assert random.getstate() == before
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        composite.build(write(tmp_path, "1 / 0"))
    assert random.getstate() == before


def test_initial_weights_from_other_random_numbers_are_rejected(files, tmp_path):
    loss = write(tmp_path, SCALED.format("np.random.default_rng().normal()"), "self.scale[0] * error")
    with pytest.raises(UsageError, match=r"^--loss: .*/mine\.py:Mine: has other initial weights .*--seed$"):
        task.prepare(config_of(files, loss=f"bce + {loss}"))


@pytest.mark.parametrize(
    ("source", "name", "words"),
    [
        ("class Mine: ...", "Mine", "expected a function or a subclass of keras.Layer itself"),
        ("class Mine(dict): ...", "Mine", "a subclass of keras.Layer itself"),
        ("import keras\nmine = keras.layers.Dense(1)", "mine", "a subclass of keras.Layer itself"),
        ("import keras\nclass Mine(keras.Layer):\n    def __init__(self, size): ...", "Mine", "TypeError"),
    ],
)
def test_other_classes_and_instances_are_rejected_in_one_line(source, name, words, tmp_path):
    (tmp_path / "mine.py").write_text(source + "\n")
    with rejected(f"--loss: {tmp_path}/mine.py:{name}: ", words):
        composite.build(f"{tmp_path}/mine.py:{name}")


TRAINED = (
    "with tf.GradientTape() as tape:\n"
    "            loss = tf.reduce_mean(tf.square(self.dense(clean)))\n"
    "        weights = self.dense.trainable_variables\n"
    "        self.optimizer.apply(tape.gradient(loss, weights), weights)"
)


def test_update_that_creates_variables_is_rejected(checked, tmp_path):
    init = FEATURES["init"] + "; self.optimizer = keras.optimizers.Adam()"
    loss = write(tmp_path, init, FEATURES["call"], TRAINED)
    with rejected(match=r"Mine: the first `update` creates \d+ variables; .*optimizer\.build"):
        checked(loss)
    build = "; self.dense.build((None, 28, 28, 1)); self.optimizer.build(self.dense.trainable_variables)"
    checked(write(tmp_path, init + build, FEATURES["call"], TRAINED))


@pytest.mark.parametrize("loss", [ADVERSARIAL, LEARNED, PERCEPTUAL])
def test_examples_keep_the_contract_without_a_warning(loss, checked, capsys):
    made = checked(loss)
    assert len(weights(made)) > 0
    assert capsys.readouterr().err == ""
    trained = state_of(made.loss).trainable_variables  # none of a discriminator, nor of a frozen network
    assert len(trained) == 4 + (loss == LEARNED)


def test_check_leaves_the_weights_of_the_loss_as_they_were(model, batch):
    made = objective(ADVERSARIAL)
    made(fused(model), batch)  # creates the weights
    (layer,) = made.loss.layers
    variables = [*layer.weights, *layer.optimizer.variables]
    before = [variable.numpy() for variable in variables]
    contract.check(made, model, batch)
    assert [*layer.weights, *layer.optimizer.variables] == variables
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    # The update that was taken back is one that changes them.
    layer.update(batch.clean, model(batch.noisy))
    assert not all(np.array_equal(variable.numpy(), value) for variable, value in zip(variables, before, strict=True))


def state_of(loss: CompositeLoss) -> TrainState:
    """Return the state of a run of a small network with a checked loss."""
    keras.utils.set_random_seed(0)
    return TrainState(small_network((12, 12, 1)), loss, keras.optimizers.SGD(0.1))


def test_learned_weights_are_trained_with_the_network(checked, batch):
    loss = checked(LEARNED).loss
    state = state_of(loss)
    (layer,) = loss.layers
    assert layer.get_weights()[0].tolist() == [0, 0]
    assert len(state.trainable_variables) == len(state.model.trainable_variables) + 1
    denoised = state.model(batch.noisy)
    values = [float(tf.reduce_mean(composite.LOSSES[name](batch.clean, denoised))) for name in ("bce", "mae")]
    new_train_step(state, replace(TINY, bce_steps=0), loss)(batch)
    # The gradient of exp(-s) v + s at s = 0 is 1 - v.
    (after,) = layer.get_weights()
    np.testing.assert_allclose(after, [-0.1 * (1 - value) for value in values], rtol=1e-4)


def test_update_trains_the_loss_alone_with_the_updated_network_after_each_step(checked, batch, tmp_path):
    """The checkpoint then holds the discriminator and its optimizer."""
    loss = checked(ADVERSARIAL).loss
    state = state_of(loss)
    (layer,) = loss.layers
    assert len(state.trainable_variables) == len(state.model.trainable_variables)
    before, expected = layer.get_weights(), composite.build(ADVERSARIAL).layers[0]
    expected.build(batch.clean.shape)
    expected.discriminator.set_weights(before)
    new_train_step(state, replace(TINY, bce_steps=0), loss)(batch)
    expected.update(batch.clean, state.model(batch.noisy))
    assert int(layer.optimizer.iterations) == 1
    for start, now, wanted in zip(before, layer.get_weights(), expected.get_weights(), strict=True):
        assert not np.array_equal(start, now)
        np.testing.assert_allclose(now, wanted, atol=1e-5)

    path = state.write(str(tmp_path / "checkpoint"))
    variables = [*layer.discriminator.variables, *layer.optimizer.variables]
    assert len(layer.discriminator.variables) == 6
    assert len(layer.optimizer.variables) >= 2 * 6 + 2
    other = checked(ADVERSARIAL, seed=1).loss
    state_of(other).read(path).assert_consumed()
    (other_layer,) = other.layers
    restored = [*other_layer.discriminator.variables, *other_layer.optimizer.variables]
    for variable, same in zip(variables, restored, strict=True):
        np.testing.assert_array_equal(variable.numpy(), same.numpy())


@pytest.mark.slow
def test_run_with_the_weights_of_a_loss_can_be_evaluated(finished_run, tmp_path):
    done = run_in_process("evaluate.py", finished_run("sum"), "--figure", tmp_path / "a.png")
    assert "PSNR" in done.stdout


@pytest.mark.slow
def test_train_features_writes_a_network_that_the_example_can_load(tmp_path, checked):
    file = tmp_path / "features.keras"
    done = run_subprocess(
        "examples/train_features.py", "--train-examples", 256, "--epochs", 1, "--output", file, cwd=tmp_path
    )
    assert f"features: {file}" in done.stdout
    shutil.copy(EXAMPLES / "perceptual.py", tmp_path)
    made = checked(f"{tmp_path}/perceptual.py:Perceptual")
    (layer,) = made.loss.layers
    loaded = keras.models.load_model(file, compile=False)
    assert loaded(tf.zeros((1, 28, 28, 1))).shape == (1, 7, 7, 32)
    assert all(map(np.array_equal, layer.get_weights(), loaded.get_weights()))
    assert not all(map(np.array_equal, loaded.get_weights(), weights(checked(PERCEPTUAL))))


def test_loss_that_changes_its_state_when_called_is_rejected(checked, tmp_path):
    init = "self.calls = self.add_weight(shape=(), trainable=False)"
    loss = write(tmp_path, init, "[self.calls.assign_add(1.0), error][1]")
    with pytest.raises(UsageError, match=r"mine\.py:Mine: changes its state"):
        checked(loss)
