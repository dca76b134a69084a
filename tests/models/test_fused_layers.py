from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.data.pipeline import training_batches
from dae.losses.losses import LOSSES
from dae.models import networks
from dae.models.fused_layers import fused


def fused_when_called(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the fused form of `model`, made anew in each call, within the graph and the tape of the caller."""
    return lambda images: fused(model)(images)


@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_and_gradients_equal_those_of_keras(loss, mnist):
    noisy, clean = next(iter(training_batches(mnist.train, RunConfig(batch_size=33))))
    model = networks.build(RunConfig(), (28, 28, 1))

    def outputs_and_gradients(denoise):
        @tf.function
        def compute(noisy, clean):
            with tf.GradientTape() as tape:
                denoised = denoise(noisy)
                mean_loss = tf.reduce_mean(LOSSES[loss](clean, denoised))
            return denoised, tape.gradient(mean_loss, model.trainable_variables)

        return compute(noisy, clean)

    keras_outputs, keras_gradients = outputs_and_gradients(model)
    outputs, gradients = outputs_and_gradients(fused_when_called(model))
    np.testing.assert_allclose(outputs, keras_outputs, atol=1e-5)
    for gradient, expected in zip(gradients, keras_gradients, strict=True):
        assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("sides", [(4, 7), (5, 3)])
def test_upsampling_and_convolution_are_fused_for_any_sides(padding, use_bias, sides):
    convolution = keras.layers.Conv2D(
        5, 3, padding=padding, use_bias=use_bias, activation="tanh", bias_initializer="normal"
    )
    model = keras.Sequential([keras.Input((*sides, 3)), keras.layers.UpSampling2D(2), convolution])
    images = tf.random.stateless_normal((2, *sides, 3), seed=(1, 2))
    denoise = fused_when_called(model)
    np.testing.assert_allclose(denoise(images), model(images), atol=1e-5)
    assert "Einsum" in {operation.type for operation in graph_of(denoise, images)}


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("use_bias", [True, False])
def test_bias_and_relu_follow_the_pooling_and_change_neither_outputs_nor_gradients(padding, strides, use_bias):
    convolution = keras.layers.Conv2D(
        5, 3, strides, padding, activation="relu", use_bias=use_bias, bias_initializer="normal"
    )
    model = keras.Sequential([keras.Input((9, 12, 3)), convolution, keras.layers.MaxPooling2D(2, padding=padding)])
    images = tf.random.stateless_normal((4, 9, 12, 3), seed=(1, 2))
    weights = tf.random.stateless_normal(model.compute_output_shape(images.shape), seed=(3, 4))

    def outputs_and_gradients(denoise):
        with tf.GradientTape() as tape:
            outputs = denoise(images)
        return outputs, *tape.gradient(outputs, model.trainable_variables, output_gradients=weights)

    results, expected = outputs_and_gradients(fused_when_called(model)), outputs_and_gradients(model)
    for result, keras_result in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, keras_result, rtol=1e-5, atol=1e-5)
    operations = [operation.type for operation in graph_of(fused_when_called(model), images)]
    assert operations.index("Relu") > operations.index("MaxPool")


def graph_of(function, images) -> list[tf.Operation]:
    """Return the operations of the graph that TensorFlow makes of `function`, in order."""
    return tf.function(function).get_concrete_function(images).graph.get_operations()


@pytest.mark.parametrize(
    "layers",
    [
        [keras.layers.UpSampling2D(3), keras.layers.Conv2D(2, 3)],
        [keras.layers.UpSampling2D(2, interpolation="bilinear"), keras.layers.Conv2D(2, 3)],
        [keras.layers.UpSampling2D(2), keras.layers.Conv2D(2, 5)],
        [keras.layers.UpSampling2D(2), keras.layers.Conv2D(2, 3, strides=2)],
        [keras.layers.UpSampling2D(2), keras.layers.BatchNormalization(), keras.layers.Conv2D(2, 3)],
        [keras.layers.Conv2D(2, 3, activation="tanh"), keras.layers.MaxPooling2D(2)],
    ],
)
def test_layers_that_cannot_be_fused_are_called_unchanged(layers):
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    images = tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2))
    np.testing.assert_array_equal(fused(model)(images), model(images, training=True))


def test_branching_model_is_called_unchanged():
    image = keras.Input((6, 6, 2))
    branch = keras.layers.Conv2D(2, 3, padding="same")(image)
    model = keras.Model(image, keras.layers.Add()([image, branch]))
    images = tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2))
    np.testing.assert_array_equal(fused(model)(images), model(images))
