import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from dae.config import RunConfig
from dae.models import networks

SHAPE = (28, 28, 1)


def test_conv_has_the_layers_of_the_tutorial():
    model = networks.build(RunConfig(), SHAPE)
    rows = [(type(layer).__name__, *layer.output.shape[1:]) for layer in model.layers]
    assert rows == [
        ("InputLayer", 28, 28, 1),
        ("Conv2D", 28, 28, 16),
        ("MaxPooling2D", 14, 14, 16),
        ("Conv2D", 14, 14, 8),
        ("MaxPooling2D", 7, 7, 8),
        ("Conv2D", 7, 7, 8),
        ("MaxPooling2D", 4, 4, 8),
        ("Conv2D", 4, 4, 8),
        ("UpSampling2D", 8, 8, 8),
        ("Conv2D", 8, 8, 8),
        ("UpSampling2D", 16, 16, 8),
        ("Conv2D", 14, 14, 16),
        ("UpSampling2D", 28, 28, 16),
        ("Conv2D", 28, 28, 1),
    ]
    assert model.get_layer("encoder").output.shape == (None, 4, 4, 8)
    convolutions = [layer for layer in model.layers if type(layer).__name__ == "Conv2D"]
    assert all(layer.kernel_size == (3, 3) for layer in convolutions)
    assert [layer.activation.__name__ for layer in convolutions] == ["relu"] * 6 + ["sigmoid"]


def test_initial_weights_depend_on_the_seed_and_differ_between_layers():
    first, again = (networks.build(RunConfig(seed=5), SHAPE).get_weights() for _ in range(2))
    other = networks.build(RunConfig(seed=6), SHAPE).get_weights()
    for weights, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(weights, same)
    kernels = [index for index, weights in enumerate(first) if weights.ndim == 4]
    assert all(not np.array_equal(first[index], other[index]) for index in kernels)
    alike = [first[index] for index in kernels if first[index].shape == (3, 3, 8, 8)]
    assert len(alike) == 3
    assert not np.array_equal(alike[0], alike[1])


def test_padding_and_cropping_do_not_shift_the_image():
    """With weights that only copy the first channel, the network pools and upsamples in place."""
    model = networks.build(RunConfig(), (21, 30, 1))
    for layer in model.layers:
        if layer.weights:
            kernel = np.zeros(layer.kernel.shape, np.float32)
            kernel[1, 1, 0, 0] = 1
            layer.set_weights([kernel, np.zeros(layer.bias.shape)])
    image = np.zeros((1, 21, 30, 1), np.float32)
    image[0, 16:, 24:] = 1
    output = model(image).numpy()[0, :, :, 0]
    np.testing.assert_array_equal(output > 0.6, image[0, :, :, 0] == 1)


@pytest.mark.parametrize(("brightness", "side"), [(0.01, 28), (0.13, 30), (0.9, 28)])
def test_brightness_is_the_mean_of_the_first_outputs_and_changes_only_the_last_bias(brightness, side, mnist):
    model = networks.build(RunConfig(), (side, side, 3))
    before = model.get_weights()
    networks.set_brightness(model, brightness)
    for weight, expected in zip(model.get_weights()[:-1], before[:-1], strict=True):
        np.testing.assert_array_equal(weight, expected)
    black = tf.zeros((1, side, side, 3))
    np.testing.assert_allclose(model(black), tf.fill(black.shape, brightness), rtol=1e-5)
    digits = tf.image.resize_with_crop_or_pad(mnist.test.pixels[:50] / np.float32(255), side, side)
    assert float(tf.reduce_mean(model(tf.repeat(digits, 3, axis=3)))) == pytest.approx(brightness, rel=0.1)


@pytest.mark.parametrize("name", networks.MODELS)
def test_parameters_are_as_documented(name):
    parameters = networks.build(RunConfig(model=name), SHAPE).count_params()
    documented = inspect.getdoc(networks.MODELS[name]) or ""
    assert name in ("conv", "dncnn") or f"{parameters:,} parameters for digits" in documented
    page = (Path(__file__).parent.parent.parent / "docs" / "networks.md").read_text()
    assert f"| `{name}` | {parameters:,} |" in page


@pytest.mark.parametrize("shape", [(11, 30, 1), (21, 13, 3)])
@pytest.mark.parametrize("name", networks.MODELS)
def test_every_network_returns_images_and_has_a_gradient_for_every_weight(name, shape):
    model = networks.build(RunConfig(model=name), shape)
    noisy = tf.random.stateless_uniform((2, *shape), (1, 2))
    for training in (False, True):
        with tf.GradientTape() as tape:
            denoised = model(noisy, training=training)
        assert denoised.shape == noisy.shape
        assert float(tf.reduce_min(denoised)) >= 0
        assert float(tf.reduce_max(denoised)) <= 1
    gradients = tape.gradient(denoised, [weight.value for weight in model.trainable_weights])
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        assert gradient is not None, weight.path
        assert np.isfinite(gradient).all()


def gated(x, last_bias):
    """A sigmoid that is not the last activation."""
    gate = keras.layers.Dense(1, activation="sigmoid")(keras.layers.GlobalAveragePooling2D(keepdims=True)(x))
    x = keras.layers.Conv2D(1, 3, padding="same", bias_initializer=last_bias)(keras.layers.Multiply()([x, gate]))
    return keras.layers.ReLU(max_value=1)(x)


def without_last_bias(x, hidden_bias):
    """A last layer without a bias, after one with a bias."""
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu", bias_initializer=hidden_bias)(x)
    return keras.layers.Conv2D(1, 3, padding="same", use_bias=False, activation="sigmoid")(x)


def attending(x, bias):
    """A layer that has biases, but no attribute `bias`."""
    x = keras.layers.Reshape((28, 28))(x)
    x = keras.layers.MultiHeadAttention(1, 2, bias_initializer=bias)(x, x)
    return keras.layers.Activation("sigmoid")(keras.layers.Reshape(SHAPE)(x))


@pytest.mark.parametrize("function", [gated, without_last_bias, attending])
def test_brightness_leaves_a_network_alone_whose_last_layer_has_no_bias_before_a_sigmoid(function):
    noisy = keras.Input(SHAPE)
    model = keras.Model(noisy, function(noisy, keras.initializers.Constant(0.25)))
    before = model.get_weights()
    networks.set_brightness(model, 0.1)
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
