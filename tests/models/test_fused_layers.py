from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import objective

from dae.config import RunConfig
from dae.data.images import Images
from dae.data.pipeline import training_batches
from dae.losses.losses import LOSSES
from dae.models import fused_layers, networks
from dae.models.fused_layers import Network, Outputs, fused


def fused_when_called(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the fused form of `model`, made anew in each call, within the graph and the tape of the caller."""
    return lambda images: fused(model)(images).denoised


def unfused(model: keras.Model) -> Network:
    """Return the function that calls the layers of `model` one after the other."""
    both = keras.Model(model.inputs, [model.outputs[0], model.get_layer("encoder").output])
    return lambda images: Outputs(*both(images))


@pytest.mark.parametrize("loss", LOSSES)
def test_outputs_and_gradients_equal_those_of_keras(loss, mnist):
    config = RunConfig(batch_size=33, clip_noise=False)
    images = Images(np.tile(mnist.train.pixels[:33], (1, 6, 6, 1))) if loss == "ms_ssim" else mnist.train
    (batch,) = training_batches(images, config).take(1)
    model, minimized = networks.build(config, images.image_shape), objective(loss, config)

    def outputs_and_gradients(form):
        @tf.function
        def compute(batch):
            with tf.GradientTape() as tape:
                outputs, values = minimized(form(model), batch)
                mean_loss = tf.reduce_mean(values["loss"])
            return outputs, tape.gradient(mean_loss, model.trainable_variables)

        return compute(batch)

    keras_outputs, keras_gradients = outputs_and_gradients(unfused)
    outputs, gradients = outputs_and_gradients(fused)
    np.testing.assert_allclose(outputs.denoised, keras_outputs.denoised, atol=1e-5)
    np.testing.assert_allclose(outputs.latents, keras_outputs.latents, atol=1e-5)
    for gradient, expected in zip(gradients, keras_gradients, strict=True):
        assert (gradient is None) == (expected is None)  # of the decoder, if the loss depends on the latents alone
        if expected is not None:
            assert np.linalg.norm(gradient - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-7


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
    assert "MatMul" in {operation.type for operation in graph_of(denoise, images)}


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
    np.testing.assert_array_equal(fused(model)(images).denoised, model(images, training=True))


def same_outputs_and_gradients(model: keras.Model, images: tf.Tensor, tolerance: float = 1e-5) -> None:
    """Assert that the fused form equals Keras's model in training mode."""
    weights = tf.random.stateless_normal(model.compute_output_shape(images.shape), seed=(3, 4))
    results = []
    for form in (fused_when_called(model), lambda images: model(images, training=True)):
        with tf.GradientTape() as tape:
            outputs = form(images)
        sources = [weight.value for weight in model.trainable_weights]
        results.append([outputs, *tape.gradient(outputs, sources, output_gradients=weights)])
    for result, expected in zip(*results, strict=True):
        assert np.linalg.norm(result - expected) <= tolerance * np.linalg.norm(expected) + 1e-6


@pytest.mark.parametrize("name", networks.MODELS)
@pytest.mark.parametrize("side", [28, 21])
def test_every_network_is_fused_and_equals_that_of_keras(name, side):
    """In training mode, in which dncnn normalizes with the means of the batch."""
    model = networks.build(RunConfig(model=name), (side, side, 1))
    assert fused_layers._is_plain(model)
    images = tf.random.stateless_uniform((3, side, side, 1), seed=(1, 2))
    same_outputs_and_gradients(model, images, tolerance=1e-4)
    np.testing.assert_allclose(fused(model, training=False)(images).denoised, model(images), atol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, 2), (3, 3), (8, 4), ((3, 5), 2)])
def test_transposed_convolutions_equal_those_of_keras(kernel, stride, use_bias):
    layer = keras.layers.Conv2DTranspose(
        3, kernel, stride, "same", activation="tanh", use_bias=use_bias, bias_initializer="normal"
    )
    model = keras.Sequential([keras.Input((7, 5, 2)), layer])
    images = tf.random.stateless_normal((2, 7, 5, 2), seed=(1, 2))
    same_outputs_and_gradients(model, images)
    assert "Conv2DBackpropInput" not in {one.type for one in graph_of(fused_when_called(model), images)}


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 2, "strides": 3, "padding": "same"},
        {"kernel_size": 3, "strides": (1, 2), "padding": "same"},
        {"kernel_size": 3, "strides": 2, "padding": "valid"},
        {"kernel_size": 3, "strides": 2, "padding": "same", "output_padding": 0},
        {"kernel_size": 3, "dilation_rate": 2, "padding": "same"},
    ],
)
def test_other_transposed_convolutions_are_called_unchanged(settings):
    model = keras.Sequential([keras.Input((7, 5, 2)), keras.layers.Conv2DTranspose(3, **settings)])
    images = tf.random.stateless_normal((2, 7, 5, 2), seed=(1, 2))
    np.testing.assert_array_equal(fused(model)(images).denoised, model(images))


def convolution(**settings) -> keras.layers.Conv2D:
    return keras.layers.Conv2D(2, 3, padding="same", **settings)


def branching(image):
    return keras.layers.Add()([image, convolution()(image)])


def branching_after_upsampling(image):
    large = keras.layers.UpSampling2D(2)(image)
    return keras.layers.Concatenate()([large, convolution()(large)])


def pooling_after_upsampling(image):
    """A convolution that could be fused with the layer before it or with the one after it."""
    x = convolution(activation="relu")(keras.layers.UpSampling2D(2)(image))
    return convolution()(keras.layers.MaxPooling2D(2)(x))


def layer_used_twice(image):
    layer = convolution()
    return layer(layer(image))


def layer_used_before(image):
    """A layer whose first output is not part of the network."""
    layer = convolution()
    layer(image)
    return layer(keras.layers.ReLU()(image))


def operation(image):
    return keras.ops.sin(convolution()(image))


def operator(image):
    return image + convolution()(image)


def network_within(image):
    return keras.Sequential([keras.Input((6, 6, 2)), keras.layers.UpSampling2D(2), convolution()])(image)


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        (branching, True),
        (branching_after_upsampling, True),
        (pooling_after_upsampling, True),
        (layer_used_twice, False),
        (layer_used_before, False),
        (operation, False),
        (operator, False),
        (network_within, False),
    ],
)
def test_networks_of_any_form_equal_those_of_keras(function, plain):
    image = keras.Input((6, 6, 2))
    model = keras.Model(image, function(image))
    assert fused_layers._is_plain(model) == plain
    same_outputs_and_gradients(model, tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2)))


@pytest.mark.parametrize("side", [28, 30])
def test_latents_are_the_output_of_the_encoder_in_a_fused_and_an_unfused_network(side):
    model = networks.build(RunConfig(), (side, side, 1))
    layers = [type(layer).from_config(layer.get_config()) for layer in model.layers[1:]]
    unfusible = keras.Sequential([keras.Input((side, side, 1)), keras.layers.Activation("linear"), *layers])
    unfusible.set_weights(model.get_weights())
    images = tf.random.stateless_uniform((2, side, side, 1), seed=(1, 2))
    encoder = networks.encoder(model)
    assert encoder is not None
    expected = encoder(images)
    assert float(tf.reduce_max(expected)) > 0
    for each in (model, unfusible):
        outputs = fused(each)(images)
        assert outputs.latents is not None
        np.testing.assert_allclose(outputs.latents, expected, atol=1e-6)
        np.testing.assert_allclose(outputs.denoised, model(images), atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("last", [keras.layers.UpSampling2D, keras.layers.BatchNormalization])
def test_network_without_the_layer_encoder_has_no_latents(activation, last):
    layers = [keras.layers.Conv2D(2, 3, activation=activation), keras.layers.MaxPooling2D(2), last()]
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    assert fused(model)(tf.zeros((1, 6, 6, 2))).latents is None
