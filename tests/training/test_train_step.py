from dataclasses import replace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import batch_of, new_state, new_train_loop, new_train_step, small_network

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import Batch, training_batches
from dae.errors import Diverged
from dae.losses.composite import CompositeLoss, Term
from dae.losses.losses import LOSSES
from dae.models import networks
from dae.optimizers import optimizers
from dae.training.train_state import TrainState
from dae.training.train_step import make_train_loop

STEPS = 50
MSE = RunConfig(loss="mse", bce_steps=0)


def values(state: TrainState) -> list[np.ndarray]:
    """Return all that a train step changes."""
    variables = (*state.model.variables, *state.optimizer.variables, *state.means.variables, state.step)
    return [np.asarray(variable) for variable in variables]


class RunningLosses(keras.callbacks.Callback):
    """Keras's own mean loss of the epoch so far, after every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.values.append(logs["loss"])


# Adam magnifies rounding, so that the weights of two fits of `conv` may differ by several steps.
@pytest.mark.parametrize(
    ("model", "shards", "limit", "tolerance"),
    [(small_network, 1, None, 1e-5), pytest.param("conv", 2, 0.1, 0.1, marks=pytest.mark.slow)],
)
def test_fifty_steps_with_adam_equal_keras_fit(model, shards, limit, tolerance, mnist):
    """Also with fused layers, shards and a limit of the gradient's norm."""
    config = RunConfig(model=model, batch_size=64, shards=shards, max_gradient_norm=limit, learning_rate=0.01)
    batches = list(training_batches(mnist.train, config).take(STEPS))
    ours, theirs = (networks.build(config, (28, 28, 1)) for _ in range(2))
    theirs.set_weights(ours.get_weights())

    state = new_state(config, optimizers.build(config, STEPS), ours)
    train_step = new_train_step(state, config)
    mean_losses = [float(train_step(batch)) for batch in batches]
    assert int(state.step) == STEPS
    assert int(state.means.images) == STEPS * 64
    assert state.means.result()["loss"] == pytest.approx(np.mean(mean_losses), rel=1e-6)

    theirs.compile(keras.optimizers.Adam(0.01, global_clipnorm=limit), "binary_crossentropy")
    running = RunningLosses()
    noisy, clean = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("noisy", "clean"))
    theirs.fit(noisy, clean, batch_size=64, epochs=1, shuffle=False, verbose=0, callbacks=[running])

    np.testing.assert_allclose(np.cumsum(mean_losses) / np.arange(1, STEPS + 1), running.values, rtol=1e-4)
    assert mean_losses[-1] < 0.6 * mean_losses[0]  # the models learn
    for weight, keras_weight in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(weight, keras_weight, rtol=1e-4, atol=tolerance)


def first_batch(images: Images, size: int) -> Batch:
    return next(iter(training_batches(images, RunConfig(batch_size=size))))


def loss_and_gradients(model: keras.Model, batch: Batch) -> tuple[float, list[tf.Tensor]]:
    """Return the mean squared error of a plain call of `model`, and its gradients."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(LOSSES["mse"](batch.clean, model(batch.noisy)))
    return float(loss), tape.gradient(loss, model.trainable_variables)


@pytest.mark.parametrize(("images", "shards"), [(64, 2), (7, 3), (1, 2)])
def test_train_step_moves_the_weights_by_the_gradient_of_the_plain_model(images, shards, mnist):
    """With SGD, since Adam hides a wrong scale; at a learning rate of 1 the movement is the gradient."""
    batch, config = first_batch(mnist.train, images), replace(MSE, shards=shards)
    state = new_state(config, keras.optimizers.SGD(1.0))
    before = state.model.get_weights()
    loss, gradients = loss_and_gradients(state.model, batch)
    assert float(new_train_step(state, config)(batch)) == pytest.approx(loss, rel=1e-6)
    for old, new, gradient in zip(before, state.model.get_weights(), gradients, strict=True):
        # The movement is a difference of float32 weights of up to 1, so it has their rounding.
        np.testing.assert_allclose(old - new, gradient, atol=1e-4 * np.abs(gradient).max() + 1e-7)


@pytest.mark.parametrize("limit", [0.01, 1000.0])
def test_a_gradient_is_clipped_to_the_limit_and_its_norm_and_the_update_ratio_are_recorded(limit, mnist):
    batch, config = first_batch(mnist.train, 64), replace(MSE, max_gradient_norm=limit)
    state = new_state(config, keras.optimizers.SGD(1.0))
    before = state.model.get_weights()
    _, gradients = loss_and_gradients(state.model, batch)
    norm = float(tf.linalg.global_norm(gradients))
    assert 0.01 < norm < 1000
    new_train_step(state, config)(batch)
    movement = [old - new for old, new in zip(before, state.model.get_weights(), strict=True)]
    for moved, gradient in zip(movement, gradients, strict=True):
        expected = min(1, limit / norm) * gradient
        np.testing.assert_allclose(moved, expected, atol=1e-4 * np.abs(expected).max() + 1e-7)
    means = state.means.result()
    assert means["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    ratio = float(tf.linalg.global_norm(movement) / tf.linalg.global_norm(before))
    assert means["update_to_weight_ratio"] == pytest.approx(ratio, rel=1e-4)


def test_train_step_records_the_terms_of_a_loss(mnist):
    batch, config = first_batch(mnist.train, 10), RunConfig(loss="2*bce + 0.5*mse", shards=3)
    state = new_state(config, keras.optimizers.SGD(0.1))
    denoised = state.model(batch.noisy)
    bce, mse = (float(tf.reduce_mean(LOSSES[name](batch.clean, denoised))) for name in ("bce", "mse"))
    new_train_step(state, config)(batch)
    means = state.means.result()
    assert means["loss_bce"] == pytest.approx(bce, rel=1e-5)
    assert means["loss_mse"] == pytest.approx(mse, rel=1e-5)
    assert means["loss"] == pytest.approx(2 * bce + 0.5 * mse, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "soap"])  # others: test_exact_resume.py
def test_train_loop_gives_the_same_bits_for_any_number_of_steps_per_call(optimizer, mnist, tmp_path):
    """Over two epochs of six batches of 32 images and one of 10; SOAP updates its eigenvectors after ten steps."""
    config = RunConfig(batch_size=32, optimizer=optimizer, epochs=2, shards=2)
    images = mnist.train[: 6 * 32 + 10]
    state = new_state(config)
    train_loop = new_train_loop(state, config)
    state.write(str(tmp_path / "start"))
    results = []
    for counts in ([1] * 6, [6], [2, 4], [5, 1]):
        state.read(str(tmp_path / "start")).assert_consumed()
        batches = iter(training_batches(images, config))
        for _ in range(config.epochs):
            losses = [float(train_loop(batches, count, 32)) for count in counts]
            losses.append(float(train_loop(batches, 1, 10)))
        assert int(state.step) == 14
        assert int(state.means.images) == 2 * len(images)
        assert next(batches, None) is None
        results.append([np.array(losses[-2:]), *values(state)])
    for result in results[1:]:
        for value, expected in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(value, expected, strict=True)


def test_many_runs_in_a_process_are_not_taken_for_one_function_that_is_traced_again(mnist, caplog, monkeypatch):
    monkeypatch.setattr(tf.get_logger(), "propagate", True)
    config = RunConfig(batch_size=4)
    state = new_state(config)
    for _ in range(6):
        train_loop = make_train_loop(lambda batch: tf.reduce_mean(batch.clean), state)
        train_loop(iter(training_batches(mnist.train[:8], config)), 1, 4)
    assert caplog.messages == []


def test_train_loop_rejects_batches_of_another_size(mnist):
    config = RunConfig(batch_size=16)
    state = new_state(config)
    batches = iter(training_batches(mnist.train, config))
    with pytest.raises(tf.errors.InvalidArgumentError, match="shape"):
        new_train_loop(state, config)(batches, 1, 32)
    assert int(state.step) == 0


def test_train_loop_stops_before_the_step_that_is_not_finite(mnist):
    config = RunConfig(batch_size=32)
    state, expected = new_state(config), new_state(config)
    numbered = training_batches(mnist.train, config).enumerate(1)
    batches = numbered.map(lambda step, batch: batch._replace(noisy=tf.where(step == 5, np.nan, batch.noisy)))
    with pytest.raises(Diverged, match=r"^the (loss|gradient) of step 5 is not finite"):
        new_train_loop(state, config)(iter(batches), 8, 32)
    assert int(state.step) == 4
    new_train_loop(expected, config)(iter(training_batches(mnist.train, config)), 4, 32)
    for value, expected_value in zip(values(state), values(expected), strict=True):
        np.testing.assert_array_equal(value, expected_value, strict=True)


def finite_with_infinite_gradient(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Return 0 for every image; the derivative of the root at 0 is infinite."""
    return tf.sqrt(tf.reduce_sum((denoised - tf.stop_gradient(denoised)) * clean, axis=[1, 2, 3]))


@pytest.mark.parametrize(
    ("optimizer", "loss", "factor", "quantity"),
    [
        ("adam", LOSSES["mse"], np.inf, "loss"),
        ("adam", finite_with_infinite_gradient, 1.0, "gradient"),
        ("soap", LOSSES["mse"], np.nan, "loss"),
        *(
            pytest.param(name, LOSSES["mse"], np.nan, "loss", marks=pytest.mark.slow)
            for name in optimizers.OPTIMIZERS
            if name != "soap"
        ),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_is_taken(optimizer, loss, factor, quantity):
    """The clean images of the rejected step are multiplied by `factor`."""
    config = replace(MSE, optimizer=optimizer)
    state = new_state(config)
    before = values(state)
    images = tf.random.stateless_uniform((4, 28, 28, 1), (0, 1))
    train_step = new_train_step(state, config, CompositeLoss((Term(1.0, "", loss, ""),)))
    with pytest.raises(tf.errors.InvalidArgumentError, match=f"the {quantity} : Tensor had"):
        train_step(batch_of(images, images * factor))
    for value, expected in zip(values(state), before, strict=True):
        np.testing.assert_array_equal(value, expected, strict=True)
    if quantity == "loss":
        assert np.isfinite(train_step(batch_of(images, images)))
        assert int(state.step) == 1


def test_sparse_gradients_of_shards_are_added(mnist):
    """tf.gather has a sparse gradient, as of a codebook."""

    class Codebook(keras.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.codes = self.add_weight(shape=(4,), initializer="ones")

        def call(self, clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
            error = tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])
            return error * tf.gather(self.codes.value, [1, 2, 2])[tf.newaxis, 0]

    config = replace(MSE, shards=2)
    loss = CompositeLoss((Term(1.0, "codebook", Codebook(), "codebook"),))
    state = TrainState(small_network((28, 28, 1)), loss, keras.optimizers.SGD(1.0))
    new_train_step(state, config, loss)(first_batch(mnist.train, 64))
    codes = loss.layers[0].codes.numpy()
    assert codes[1] < 1
    assert (codes[[0, 2, 3]] == 1).all()
