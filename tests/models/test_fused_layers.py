from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import objective
from keras import layers

from dae.config import RunConfig
from dae.data.pipeline import training_batches
from dae.models import fused_layers, networks
from dae.models.fused_layers import Outputs, fused, with_latents


def fused_when_called(model: keras.Model) -> Callable[[tf.Tensor], tf.Tensor]:
    """Return the fused form of `model`, made anew in each call, within the graph and the tape of the caller."""
    return lambda images: fused(model)(images).denoised


def graph_of(function, images) -> list[str]:
    """Return the types of the operations of the graph that TensorFlow makes of `function`, in order."""
    graph = tf.function(function).get_concrete_function(images).graph
    return [operation.type for operation in graph.get_operations()]


def check_outputs_and_gradients(model: keras.Model, images: tf.Tensor, tolerance: float = 1e-5) -> None:
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


@pytest.mark.parametrize("loss", ["sure", "contractive"])
def test_gradients_of_losses_that_call_the_network_equal_those_of_keras(loss, mnist):
    config = RunConfig(batch_size=9, clip_noise=False)
    (batch,) = training_batches(mnist.train[:100], config).take(1)
    model, minimized = networks.build(config, (28, 28, 1)), objective(loss, config)

    @tf.function
    def loss_and_gradients(is_fused):
        with tf.GradientTape() as tape:
            network = fused(model) if is_fused else lambda images: Outputs(**with_latents(model)(images))
            value, _ = minimized(network, batch)
        return value, *tape.gradient(value, model.trainable_variables)

    for result, expected in zip(loss_and_gradients(True), loss_and_gradients(False), strict=True):
        assert (result is None) == (expected is None)  # of the decoder, if the loss depends on the latents alone
        if expected is not None:
            assert np.linalg.norm(result - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-7


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
    assert "MatMul" in graph_of(denoise, images)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("use_bias", [True, False])
def test_bias_and_relu_follow_the_pooling_and_change_neither_outputs_nor_gradients(padding, strides, use_bias):
    convolution = keras.layers.Conv2D(
        5, 3, strides, padding, activation="relu", use_bias=use_bias, bias_initializer="normal"
    )
    model = keras.Sequential([keras.Input((9, 12, 3)), convolution, keras.layers.MaxPooling2D(2, padding=padding)])
    images = tf.random.stateless_normal((4, 9, 12, 3), seed=(1, 2))
    check_outputs_and_gradients(model, images)
    operations = graph_of(fused_when_called(model), images)
    assert operations.index("Relu") > operations.index("MaxPool")


@pytest.mark.parametrize(
    "layers",
    [
        [keras.layers.UpSampling2D(3), keras.layers.Conv2D(2, 3)],
        [keras.layers.UpSampling2D(2, interpolation="bilinear"), keras.layers.Conv2D(2, 3)],
        [keras.layers.UpSampling2D(2), keras.layers.Conv2D(2, 5)],
        [keras.layers.UpSampling2D(2), keras.layers.Conv2D(2, 3, strides=2)],
        [keras.layers.Conv2D(2, 3, activation="tanh"), keras.layers.MaxPooling2D(2)],
        [keras.layers.Conv2DTranspose(3, 2, strides=2, padding="same")],
    ],
)
def test_layers_that_cannot_be_fused_are_called_unchanged(layers):
    model = keras.Sequential([keras.Input((6, 6, 2)), *layers])
    images = tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2))
    np.testing.assert_array_equal(fused(model)(images).denoised, model(images, training=True))


@pytest.mark.parametrize(("name", "side"), [("conv", 28), *((name, 21) for name in networks.MODELS)])
def test_every_fused_network_equals_that_of_keras(name, side):
    """In training mode, in which dncnn normalizes with the means of the batch."""
    model = networks.build(RunConfig(model=name), (side, side, 1))
    images = tf.random.stateless_uniform((3, side, side, 1), seed=(1, 2))
    check_outputs_and_gradients(model, images, tolerance=1e-4)
    np.testing.assert_allclose(fused(model, training=False)(images).denoised, model(images), atol=1e-5)


def convolution(**settings) -> keras.layers.Conv2D:
    return keras.layers.Conv2D(2, 3, padding="same", **settings)


def branching(image):
    return keras.layers.Add()([image, convolution()(image)])


def pooling_after_upsampling(image):
    """A convolution that could be fused with the layer before it or with the one after it."""
    x = convolution(activation="relu")(keras.layers.UpSampling2D(2)(image))
    return convolution()(keras.layers.MaxPooling2D(2)(x))


def pooling_after_operation(image):
    return keras.layers.MaxPooling2D(2)(convolution(activation="relu")(keras.ops.sin(image)))


def upsampling_used_twice(image):
    layer = keras.layers.UpSampling2D(2)
    return keras.layers.Add()([convolution()(layer(image)), layer(convolution()(image))])


def operation(image):
    return keras.ops.sin(convolution()(image))


def network_within(image):
    return keras.Sequential([keras.Input((6, 6, 2)), keras.layers.UpSampling2D(2), convolution()])(image)


@pytest.mark.parametrize(
    "function",
    [branching, pooling_after_upsampling, pooling_after_operation, upsampling_used_twice, operation, network_within],
)
def test_networks_of_any_form_equal_those_of_keras(function):
    image = keras.Input((6, 6, 2))
    model, images = keras.Model(image, function(image)), tf.random.stateless_normal((2, 6, 6, 2), seed=(1, 2))
    check_outputs_and_gradients(model, images)
    assert fused(model)(images).latents is None  # without a layer `encoder`


def residual(activation: Callable, connect: str = "conv_add") -> keras.Model:
    """Return a network with an activation after layers that TensorFlow fuses with some activations."""
    noisy = keras.Input((12, 12, 4))
    settings = {"padding": "same", "bias_initializer": keras.initializers.RandomNormal(0, 0.5, seed=1)}
    x: dict[str, Callable] = {
        "conv": lambda: layers.Conv2D(4, 3, **settings)(noisy),
        "conv_add": lambda: layers.Add()([noisy, layers.Conv2D(4, 3, **settings)(noisy)]),
        "conv_1x1_add": lambda: layers.Add()([layers.Conv2D(4, 1, **settings)(noisy), noisy]),
        "pad_conv_add": lambda: layers.Add()([noisy, layers.Conv2D(4, 3)(layers.ZeroPadding2D(1)(noisy))]),
        "conv_normalized": lambda: layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(noisy)),
        "conv_normalized_add": lambda: layers.Add()([noisy, x["conv_normalized"]()]),
        "depthwise_add": lambda: layers.Add()([noisy, layers.DepthwiseConv2D(3, **settings)(noisy)]),
        "separable_add": lambda: layers.Add()([noisy, layers.SeparableConv2D(4, 3, **settings)(noisy)]),
        "dense_add": lambda: layers.Add()([noisy, layers.Dense(4)(noisy)]),
        "transposed_add": lambda: layers.Add()([noisy, layers.Conv2DTranspose(4, 3, **settings)(noisy)]),
    }
    return keras.Model(noisy, layers.Conv2D(4, 1)(activation(x[connect]())))


def check_graph(model: keras.Model, tolerance: float = 1e-5) -> None:
    """Assert that the graph of the fused form computes what Keras computes without a graph."""
    images = tf.random.stateless_normal([2, 12, 12, 4], seed=(1, 2))
    compiled = tf.function(lambda images: fused(model, training=False)(images).denoised)(images)
    np.testing.assert_allclose(compiled, model(images, training=False), atol=tolerance)


@pytest.mark.parametrize(
    "activation",
    [
        layers.LeakyReLU(0.3),
        layers.ReLU(negative_slope=0.1),
        layers.Activation("mish"),
        layers.Activation("leaky_relu"),
    ],
    ids=["LeakyReLU", "ReLU", "mish", "leaky_relu"],
)
def test_an_activation_after_the_sum_of_a_residual_block_is_computed_as_keras_does(activation):
    check_graph(residual(activation))
    model = residual(activation)
    images = tf.random.stateless_normal([2, 12, 12, 4], seed=(1, 2))
    reduced = fused_layers.in_bfloat16(model)
    compiled = tf.function(lambda images: reduced(images).denoised)(images)
    np.testing.assert_allclose(compiled, model(images, training=True), atol=0.1)


ACTIVATIONS = [
    *("relu", "relu6", "elu", "selu", "gelu", "silu", "mish", "softplus", "softsign", "tanh", "sigmoid", "leaky_relu"),
    *("hard_sigmoid", "hard_silu", "hard_tanh", "log_sigmoid", "exponential", "celu", "sparse_plus", "squareplus"),
    *("soft_shrink", "tanh_shrink", "softmax"),
]
CONNECTIONS = [
    *("conv", "conv_add", "conv_1x1_add", "pad_conv_add", "conv_normalized", "conv_normalized_add"),
    *("depthwise_add", "separable_add", "dense_add", "transposed_add"),
]


def test_an_operation_after_the_sum_of_a_residual_block_is_computed_as_keras_does():
    check_graph(residual(lambda x: keras.ops.leaky_relu(x, 0.7)))


@pytest.mark.slow
@pytest.mark.parametrize("connect", CONNECTIONS)
def test_every_activation_of_keras_is_computed_in_graphs_as_without(connect):
    others = layers.LeakyReLU(0.05), layers.PReLU(), layers.ELU(2.0), layers.ReLU(max_value=1.0)
    for activation in (*map(layers.Activation, ACTIVATIONS), *others):
        check_graph(residual(activation, connect), tolerance=1e-4)
