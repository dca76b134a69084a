import keras
import numpy as np
import pytest
import tensorflow as tf

from dae import models
from dae.config import RunConfig
from dae.layers import fused
from dae.losses import LOSSES
from dae.pipeline import training_batches


@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_and_gradients_are_those_of_the_plain_keras_graph(loss, mnist):
    noisy, clean = next(iter(training_batches(mnist.train, RunConfig(batch_size=33))))
    model = models.build(RunConfig(), (28, 28, 1))

    def outputs_and_gradients(denoise):
        @tf.function
        def compute(noisy, clean):
            with tf.GradientTape() as tape:
                denoised = denoise(noisy)
                mean_loss = tf.reduce_mean(LOSSES[loss](clean, denoised))
            return denoised, tape.gradient(mean_loss, model.trainable_variables)

        return compute(noisy, clean)

    plain, plain_gradients = outputs_and_gradients(model)
    fast, fast_gradients = outputs_and_gradients(fused(model))
    np.testing.assert_allclose(fast, plain, atol=1e-5)
    for mine, keras_own in zip(fast_gradients, plain_gradients, strict=True):
        assert np.linalg.norm(mine - keras_own) <= 1e-4 * np.linalg.norm(keras_own)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("sides", [(4, 7), (5, 3)])
def test_upsampling_and_convolution_are_fused_for_any_size(padding, use_bias, sides):
    convolution = keras.layers.Conv2D(
        5, 3, padding=padding, use_bias=use_bias, activation="tanh", bias_initializer="normal"
    )
    model = keras.Sequential([keras.Input((*sides, 3)), keras.layers.UpSampling2D(2), convolution])
    images = tf.random.stateless_normal((2, *sides, 3), seed=(1, 2))
    denoise = fused(model)
    np.testing.assert_allclose(denoise(images), model(images), atol=1e-5)
    operations = {
        operation.type for operation in tf.function(denoise).get_concrete_function(images).graph.get_operations()
    }
    assert "DepthToSpace" in operations


@pytest.mark.parametrize(
    "layers",
    [
        [keras.layers.UpSampling2D(3), keras.layers.Conv2D(2, 3)],
        [keras.layers.UpSampling2D(2, interpolation="bilinear"), keras.layers.Conv2D(2, 3)],
        [keras.layers.UpSampling2D(2), keras.layers.Conv2D(2, 5)],
        [keras.layers.UpSampling2D(2), keras.layers.Conv2D(2, 3, strides=2)],
        [keras.layers.UpSampling2D(2), keras.layers.BatchNormalization(), keras.layers.Conv2D(2, 3)],
    ],
)
def test_what_cannot_be_fused_is_called_as_it_is(layers):
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    images = tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2))
    np.testing.assert_array_equal(fused(model)(images), model(images, training=True))


def test_a_branching_model_is_called_as_it_is():
    image = keras.Input((6, 6, 2))
    branch = keras.layers.Conv2D(2, 3, padding="same")(image)
    model = keras.Model(image, keras.layers.Add()([image, branch]))
    images = tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2))
    np.testing.assert_array_equal(fused(model)(images), model(images))
