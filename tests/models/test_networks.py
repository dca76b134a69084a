import inspect
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import dae
from dae import callables
from dae.config import RunConfig
from dae.errors import UsageError
from dae.models import networks, sizes
from dae.training import trainer

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
    assert model.count_params() == 4_385
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


@settings(max_examples=30)
@given(st.integers(11, 80), st.integers(11, 80), st.sampled_from([1, 3]))
def test_output_has_the_shape_of_the_input_for_any_sides(height, width, channels):
    model = networks.build(RunConfig(), (height, width, channels))
    assert model.output_shape == (None, height, width, channels)
    padding = model.get_layer("decoder_conv_3").padding
    assert padding == ("valid" if height % 8 == width % 8 == 4 else "same")
    assert ("cropped" in [layer.name for layer in model.layers]) == (
        padding == "same" and bool(height % 8 or width % 8)
    )


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


def test_unknown_model_is_refused_with_the_most_similar_name():
    with pytest.raises(UsageError, match=r"--model: .*'convv'.*'conv'"):
        networks.build(RunConfig(model="convv"), SHAPE)


@pytest.mark.parametrize("side", [28, 30])
@pytest.mark.parametrize("brightness", [0.01, 0.13, 0.5, 0.9])
def test_initial_brightness_is_the_mean_of_the_first_outputs(brightness, side, mnist):
    model = networks.build(RunConfig(initial_brightness=brightness), (side, side, 1))
    black = tf.zeros((1, side, side, 1))
    np.testing.assert_allclose(model(black), tf.fill(black.shape, brightness), rtol=1e-5)
    noisy = tf.image.resize_with_crop_or_pad(mnist.test.pixels[:50] / np.float32(255), side, side)
    assert float(tf.reduce_mean(model(noisy))) == pytest.approx(brightness, rel=0.1)


@pytest.mark.parametrize("side", [28, 30])
@pytest.mark.parametrize("brightness", [None, 0.13, 0.5])
def test_initial_brightness_changes_no_weight_but_the_last_bias(brightness, side):
    model = networks.build(RunConfig(initial_brightness=brightness), (side, side, 3))
    plain = networks.build(RunConfig(), (side, side, 3))
    for weight, expected in zip(model.get_weights()[:-1], plain.get_weights()[:-1], strict=True):
        np.testing.assert_array_equal(weight, expected)
    bias = model.get_weights()[-1]
    assert bias.shape == (3,)
    assert (bias == 0).all() == (brightness != 0.13)


def test_encoder_gives_the_output_of_its_layer(mnist):
    model = networks.build(RunConfig(), SHAPE)
    encoder = networks.encoder(model)
    assert encoder is not None
    assert encoder(tf.constant(mnist.test.pixels[:3] / np.float32(255))).shape == (3, 4, 4, 8)
    image = keras.Input(SHAPE)
    assert networks.encoder(keras.Model(image, keras.layers.Conv2D(1, 3, padding="same")(image))) is None


def test_model_whose_output_differs_from_its_input_is_refused(monkeypatch):
    def halves(image_shape: tuple[int, int, int]) -> keras.Model:
        return keras.Sequential([keras.Input(image_shape), keras.layers.MaxPooling2D(2)])

    monkeypatch.setitem(networks.MODELS, "halves", halves)
    with pytest.raises(UsageError, match=r"--model: halves: .*\(None, 28, 28, 1\).*\(None, 14, 14, 1\)"):
        networks.build(RunConfig(model="halves"), SHAPE)


PARAMETERS = {"conv": 4_385, "blog": 28_353, "patches": 38_689, "unet": 323_969, "dncnn": 56_673}


@pytest.mark.parametrize("name", networks.MODELS)
def test_parameters_are_as_documented(name):
    """In the docstring, and in the table of docs/networks.md."""
    parameters = networks.build(RunConfig(model=name), SHAPE).count_params()
    assert parameters == PARAMETERS[name]
    documented = inspect.getdoc(networks.MODELS[name]) or ""
    assert name in ("conv", "dncnn") or f"{parameters:,} parameters for digits" in documented
    page = (Path(__file__).parent.parent.parent / "docs" / "networks.md").read_text()
    assert f"| `{name}` | {parameters:,} |" in page


@pytest.mark.parametrize("name", networks.MODELS)
@settings(max_examples=4)
@given(st.sampled_from([11, 13, 21, 28, 30]), st.sampled_from([11, 13, 21, 28, 30]), st.sampled_from([1, 3]))
def test_every_network_returns_images_and_has_a_gradient_for_every_weight(name, height, width, channels):
    model = networks.build(RunConfig(model=name), (height, width, channels))
    noisy = tf.random.stateless_uniform((2, height, width, channels), (1, 2))
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


# How much the sides can be changed by: what each network halves and doubles.
MULTIPLES = {"conv": 8, "blog": 4, "patches": 2, "unet": 4, "dncnn": 1}


@pytest.mark.parametrize("name", networks.MODELS)
@pytest.mark.parametrize("side", [28, 21])
def test_exported_network_takes_other_sizes_and_gives_the_same_result_for_the_size_it_was_trained_on(name, side, mnist):
    model = networks.build(RunConfig(model=name, seed=3), (side, side, 1))
    exported = sizes.any_size(model)
    assert exported is not model
    assert [layer.name for layer in exported.layers[1:]] == [layer.name for layer in model.layers[1:]]
    noisy = tf.image.resize_with_crop_or_pad(mnist.test.pixels[:4] / np.float32(255), side, side)
    np.testing.assert_allclose(exported(noisy), model(noisy), atol=1e-6)
    larger = side + MULTIPLES[name], side + 2 * MULTIPLES[name]
    noisy = tf.image.resize_with_crop_or_pad(mnist.test.pixels[:4] / np.float32(255), *larger)
    of_that_size = networks.build(RunConfig(model=name), (*larger, 1))
    of_that_size.set_weights(model.get_weights())
    np.testing.assert_allclose(exported(noisy), of_that_size(noisy), atol=1e-6)


def test_exported_network_is_the_same_if_it_takes_one_size_only():
    noisy = keras.Input(SHAPE)
    dense = keras.layers.Dense(28 * 28, activation="sigmoid")(keras.layers.Flatten()(noisy))
    model = keras.Model(noisy, keras.layers.Reshape(SHAPE)(dense))
    assert sizes.any_size(model) is model


@pytest.mark.slow  # the graphs of unet take long to build
def test_plain_keras_loads_the_model_files_of_a_run(tmp_path, mnist):
    config = RunConfig(model="unet", train_examples=32, validation_examples=32, batch_size=32, epochs=1)
    trainer.train(config, tmp_path / "run", quiet=True)
    noisy = mnist.test.pixels[:3] / np.float32(255)
    expected = dae.load_model(tmp_path / "run")(noisy)
    for name in ("model.keras", "model.h5"):
        loaded = keras.models.load_model(tmp_path / "run" / name, compile=False)
        assert {type(layer).__module__.partition(".")[0] for layer in loaded.layers} == {"keras"}
        np.testing.assert_allclose(loaded(noisy), expected, atol=1e-6)
        assert loaded(tf.zeros((1, 36, 44, 1))).shape == (1, 36, 44, 1)


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
def test_initial_brightness_leaves_a_network_alone_whose_last_layer_has_no_bias_before_a_sigmoid(function, tmp_path):
    def network(image_shape):
        noisy = keras.Input(image_shape)
        return keras.Model(noisy, function(noisy, keras.initializers.Constant(0.25)))

    config = RunConfig(model=callables.record(network, "model")[0])
    plain = networks.build(config, SHAPE).get_weights()
    model = networks.build(replace(config, initial_brightness=0.1), SHAPE)
    assert any((weight == 0.25).all() for weight in plain)
    for weight, expected in zip(model.get_weights(), plain, strict=True):
        np.testing.assert_array_equal(weight, expected)
