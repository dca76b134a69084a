"""Training in bfloat16."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import new_state, new_train_step, not_the_identity
from keras import layers
from runs import config_of

from dae.config import RunConfig
from dae.data.pipeline import Batch, training_batches
from dae.errors import UsageError
from dae.models import networks
from dae.models.fused_layers import fused, in_bfloat16
from dae.training import trainer


@pytest.fixture
def batch(mnist) -> Batch:
    return next(iter(training_batches(mnist.train[:100], RunConfig(batch_size=8))))


@pytest.mark.parametrize("name", networks.MODELS)
def test_outputs_agree_with_those_of_the_network_and_are_float32(name, batch):
    model = not_the_identity(networks.build(RunConfig(model=name), (28, 28, 1)))
    reduced, full = in_bfloat16(model)(batch.noisy), fused(model)(batch.noisy)
    assert reduced.denoised.dtype == tf.float32
    np.testing.assert_allclose(reduced.denoised, full.denoised, atol=4e-2)
    assert (reduced.latents is None) == (full.latents is None)
    if reduced.latents is not None and full.latents is not None:
        np.testing.assert_allclose(reduced.latents, full.latents, atol=4e-2 * np.abs(full.latents).max())
    assert not np.array_equal(reduced.denoised, full.denoised)
    assert all(weight.dtype == "float32" for weight in model.weights)


def normalized(image_shape):
    image = layers.Input(image_shape)
    x = layers.Conv2D(8, 3, padding="same", kernel_regularizer=keras.regularizers.L2(1e-4))(image)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    return keras.Model(image, layers.Conv2D(image_shape[-1], 3, padding="same", activation="sigmoid")(x))


def test_a_step_is_nearly_that_of_float32(batch):
    """The gradients of each weight point nearly the same way, also those of batch normalization."""
    moved = []
    for precision in ("float32", "bfloat16"):
        config = RunConfig(loss="mse", bce_steps=0, precision=precision)
        keras.utils.set_random_seed(0)
        model = normalized((28, 28, 1))
        state = new_state(config, keras.optimizers.SGD(1.0), model)
        before = model.get_weights()
        new_train_step(state, config)(batch)
        moved.append([after - weight for after, weight in zip(model.get_weights(), before, strict=True)])
    for expected, got in zip(*moved, strict=True):
        if np.linalg.norm(expected) > 1e-6:  # the bias before batch normalization has no gradient
            assert np.linalg.norm(got - expected) < 0.05 * np.linalg.norm(expected)


def test_regularizers_of_activities_need_float32(files, tmp_path):
    def regularized(image_shape):
        image = layers.Input(image_shape)
        x = layers.Conv2D(4, 3, padding="same", activity_regularizer="l2")(image)
        return keras.Model(image, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))

    with pytest.raises(UsageError, match=r"^--precision: .*regularizers of activities"):
        trainer.train(config_of(files, precision="bfloat16", model=regularized), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
