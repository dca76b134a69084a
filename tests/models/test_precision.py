"""Training in 16 bits, and with XLA."""

from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import TINY, new_state, new_train_step
from keras import layers

from dae import runtime
from dae.analysis.reproducibility import first_difference
from dae.config import RunConfig
from dae.data.pipeline import Batch, training_batches
from dae.errors import Diverged, UsageError
from dae.models import networks
from dae.models.fused_layers import fused
from dae.models.precision import in_precision
from dae.replicas import Replicas
from dae.training import trainer

CHANGES = [{"precision": "bfloat16"}, {"precision": "float16"}, {"compile": True}]


@pytest.fixture
def batch(mnist) -> Batch:
    return next(iter(training_batches(mnist.train, RunConfig(batch_size=32))))


@pytest.mark.parametrize("name", networks.MODELS)
@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 4e-2), ("float16", 5e-3)])
def test_outputs_agree_with_those_of_the_network_and_are_float32(name, precision, tolerance, batch):
    model = networks.build(RunConfig(model=name), (28, 28, 1))
    reduced, full = in_precision(model, precision)(batch.noisy), fused(model)(batch.noisy)
    assert reduced.denoised.dtype == tf.float32
    np.testing.assert_allclose(reduced.denoised, full.denoised, atol=tolerance)
    assert (reduced.latents is None) == (full.latents is None)
    if reduced.latents is not None and full.latents is not None:
        assert reduced.latents.dtype == tf.float32
        np.testing.assert_allclose(reduced.latents, full.latents, atol=tolerance * np.abs(full.latents).max())
    assert not np.array_equal(reduced.denoised, full.denoised)
    assert all(weight.dtype == "float32" for weight in model.weights)


def normalized(image_shape, dropped=0.2):
    image = layers.Input(image_shape)
    x = layers.Conv2D(8, 3, padding="same", kernel_regularizer=keras.regularizers.L2(1e-4))(image)
    x = layers.Dropout(dropped)(layers.ReLU()(layers.BatchNormalization()(x)))
    return keras.Model(image, layers.Conv2D(image_shape[-1], 3, padding="same", activation="sigmoid")(x))


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_is_nearly_that_of_float32_without_xla(change, batch):
    """The gradients of each weight point nearly the same way, also those of batch normalization."""
    moved = []
    for config in (RunConfig(loss="mse", bce_steps=0), replace(RunConfig(loss="mse", bce_steps=0), **change)):
        keras.utils.set_random_seed(0)
        model = normalized((28, 28, 1), dropped=0.0)  # XLA draws other random numbers
        optimizer = keras.optimizers.SGD(1.0)
        if config.precision == "float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        state = new_state(config, optimizer, model)
        before = model.get_weights()
        new_train_step(state, config)(batch)
        moved.append([after - each for after, each in zip(model.get_weights(), before, strict=True)])
    for expected, got in zip(*moved, strict=True):
        if np.linalg.norm(expected) > 1e-6:  # the bias before batch normalization has no gradient
            assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_resumed_run_has_the_same_bits(change, tmp_path):
    config = replace(TINY, epochs=2, checkpoint_every=3, shards=2, **change)

    def stop(line):
        raise KeyboardInterrupt

    trainer.train(config, tmp_path / "whole", model=normalized, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, tmp_path / "resumed", model=normalized, quiet=True, on_epoch_end=stop)
    devices = ["cpu:0"] if config.compile else ["cpu:0", "cpu:1"]
    trainer.train(config, tmp_path / "resumed", model=normalized, quiet=True, resume=True, devices=devices)
    assert first_difference(tmp_path / "whole", tmp_path / "resumed") is None
    exported = keras.models.load_model(tmp_path / "whole" / "model.keras")
    assert {layer.dtype_policy.name for layer in exported.layers} == {"float32"}


def test_xla_computes_on_one_device():
    with pytest.raises(UsageError, match=r"^--compile: needs a single device, got CPU:0, CPU:1; choose one"):
        runtime.resolve(replace(TINY, compile=True), replicas=Replicas(("CPU:0", "CPU:1")))


def test_float16_skips_steps_until_gradients_are_finite(mnist):
    config = replace(RunConfig(precision="float16", loss="mse", bce_steps=0, batch_size=32))
    state = new_state(config)
    state.optimizer.dynamic_scale.assign(2.0**40)
    train_step, changed, before = new_train_step(state, config), [], state.model.get_weights()
    for batch in training_batches(mnist.train, config).take(40):
        train_step(batch)
        after = state.model.get_weights()
        changed.append(any(not np.array_equal(old, new) for old, new in zip(before, after, strict=True)))
        before = after
    assert not changed[0]
    assert changed[-5:] == [True] * 5
    assert 2**10 < float(state.optimizer.dynamic_scale) < 2**40
    assert np.isfinite(list(state.means.result().values())).all()


def test_float16_with_gradients_that_are_never_finite_fails(tmp_path):
    def steep(clean, denoised, *, step):
        """A gradient of nan after step 5, which the check before the run does not see."""
        distance = tf.reduce_mean(tf.square(clean - denoised), axis=[1, 2, 3])
        return distance + tf.sqrt(tf.where(step > 5, 0.0, 1.0) * (distance + 0.01))

    config = replace(TINY, train_examples=6400, precision="float16", bce_steps=0)
    with pytest.raises(Diverged, match=r"the gradient of step \d+ is not finite"):
        trainer.train(config, tmp_path / "run", loss=steep, quiet=True)


def test_regularizers_of_activities_need_float32(tmp_path):
    def regularized(image_shape):
        image = layers.Input(image_shape)
        x = layers.Conv2D(4, 3, padding="same", activity_regularizer="l2")(image)
        return keras.Model(image, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))

    with pytest.raises(UsageError, match=r"^--precision: .*regularizers of activities"):
        trainer.train(replace(TINY, precision="bfloat16"), tmp_path / "run", model=regularized, quiet=True)
    assert not (tmp_path / "run").exists()


def test_layers_that_are_used_twice_compute_in_16_bits(batch):
    image = layers.Input((28, 28, 1))
    twice = layers.Conv2D(1, 3, padding="same", activation="relu")
    model = keras.Model(image, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(twice(twice(image))))
    denoised = in_precision(model, "bfloat16")(batch.noisy).denoised
    assert denoised.dtype == tf.float32
    np.testing.assert_allclose(denoised, model(batch.noisy), atol=2e-2)
