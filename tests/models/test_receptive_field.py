import os
from functools import partial

import keras
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from keras import layers

from dae.models import sizes
from dae.models.networks import MODELS
from dae.models.sizes import ReceptiveField, any_size, fitting_size, receptive_field

few_examples = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "4")), phases=[Phase.generate])
paddings = st.sampled_from(["same", "valid"])
# To be called: Keras draws seeds when it makes a layer.
plain_layers = st.sampled_from([
    partial(layers.Conv2D, 2, 3, dilation_rate=2),
    partial(layers.Conv2D, 2, 4, padding="same"),
    partial(layers.DepthwiseConv2D, 2, padding="same"),
    partial(layers.SeparableConv2D, 2, 3, padding="same", activation="relu"),
    partial(layers.AveragePooling2D, 3, strides=1, padding="same"),
    partial(layers.MaxPooling2D, 2, strides=1),
    partial(layers.ZeroPadding2D, ((0, 3), (1, 2))),
    partial(layers.Cropping2D, ((3, 0), (1, 2))),
    partial(layers.BatchNormalization),
])  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> list[partial]:
    """The layers of a network that downsamples and upsamples."""
    factor = draw(st.integers(1, 3))
    size = draw(st.integers(factor, 4))
    down = {"strides": factor, "padding": draw(paddings)}
    up = {"strides": factor, "padding": draw(paddings)}
    upsampling = partial(layers.UpSampling2D, factor, interpolation=draw(st.sampled_from(["nearest", "bilinear"])))
    few = st.lists(plain_layers, max_size=2)
    return [
        *draw(few),
        draw(st.sampled_from([partial(layers.MaxPooling2D, size, **down), partial(layers.Conv2D, 2, size, **down)])),
        *draw(few),
        draw(st.sampled_from([upsampling, partial(layers.Conv2DTranspose, 2, size, **up)])),
        *draw(few),
    ]


def build(network: list[partial]) -> tuple[keras.Model, ReceptiveField]:
    """Return the network, with a connection around its last two layers, and its receptive field."""
    keras.utils.set_random_seed(0)
    noisy = x = keras.Input((60, 60, 1))
    for layer in network:
        x = layer()(x)
    lost = [60 - side for side in x.shape[1:3]]
    x = layers.ZeroPadding2D([(max(0, pixels // 2), max(0, pixels - pixels // 2)) for pixels in lost])(x)
    x = layers.Cropping2D([(max(0, -pixels // 2), max(0, -pixels - -pixels // 2)) for pixels in lost])(x)
    x = layers.Concatenate()([x, layers.Conv2D(1, 3, padding="same")(x)])
    model = any_size(keras.Model(noisy, layers.Conv2D(1, 1)(x)))
    field = receptive_field(model)
    assert field is not None
    return model, field


@pytest.fixture
def short_images(monkeypatch):
    """Measure receptive fields of up to 128 pixels, and search few sizes that fit, in a fraction of the time."""
    monkeypatch.setattr(sizes, "_LENGTH", 512)
    monkeypatch.setattr(sizes, "_SEARCHED", 16)


@few_examples
@given(network=networks(), extra=st.integers(0, 5), first=st.integers(1, 3))
def test_inside_the_field_of_any_network_a_tile_gives_the_output_of_the_whole_image(network, extra, first):
    model, field = build(network)
    radius, period = field
    size, _ = fitting_size(model, 30 + extra + 2 * radius, 60)
    tile = (0, slice(first * period, first * period + size), slice(first * period, first * period + size))
    random = np.random.default_rng(0)
    whole, changed = (random.random((1, size + 4 * period, size + 4 * period, 1), np.float32) for _ in range(2))
    changed[tile] = whole[tile]
    inside = slice(radius, size - radius), slice(radius, size - radius)
    got = model(whole[tile][None]).numpy()[0][inside]
    for image in (whole, changed):
        np.testing.assert_allclose(got, model(image).numpy()[tile][inside], atol=1e-4)


@pytest.mark.parametrize(("name", "side", "radius", "period"), [
    ("conv", 28, 29, 8),
    ("conv", 32, 23, 8),
    ("blog", 28, 11, 4),
    ("patches", 28, 12, 2),
    ("unet", 28, 46, 4),
    ("dncnn", 28, 8, 1),
])  # fmt: skip
def test_fields_of_the_networks_of_the_package(name, side, radius, period):
    assert receptive_field(MODELS[name]((side, side, 1))) == ReceptiveField(radius, period)


def test_any_layers_are_measured(short_images):
    noisy = keras.Input((28, 28, 1))
    inner = keras.Sequential([keras.Input((None, None, 1)), layers.Conv2D(1, 5, padding="same")])
    twice = layers.Conv2D(1, 3, padding="same")
    small = layers.Conv2D(4, (3, 2), strides=(3, 2), padding="same", activation="hard_shrink")(noisy)
    shifted = layers.ZeroPadding2D(((7, 0), (0, 0)))(layers.Cropping2D(((7, 0), (0, 0)))(noisy))
    expected = {
        inner(layers.Conv2D(1, 3, padding="same")(noisy)): ReceptiveField(3, 1),
        twice(twice(noisy)): ReceptiveField(2, 1),
        keras.ops.maximum(noisy, layers.MaxPooling2D(3, 1, "same")(noisy)): ReceptiveField(1, 1),
        layers.Conv2DTranspose(1, (3, 2), strides=(3, 2))(small): ReceptiveField(0, 6),
        shifted: ReceptiveField(7, 1),  # black in each tile, but not in the whole image
    }
    for output, field in expected.items():
        assert receptive_field(any_size(keras.Model(noisy, output))) == field


@pytest.mark.slow
def test_there_is_no_field_with_global_layers_or_only_one_size(short_images):
    noisy = keras.Input((28, 28, 1))
    unknown = {
        "dense": layers.Reshape((28, 28, 1))(layers.Dense(784)(layers.Flatten()(noisy))),
        "global pooling": layers.Multiply()([noisy, layers.GlobalAveragePooling2D(keepdims=True)(noisy)]),
        "global maximum": layers.Multiply()([noisy, layers.GlobalMaxPooling2D(keepdims=True)(noisy)]),
        "per image": layers.GroupNormalization(1)(noisy),
        "over rows": layers.BatchNormalization(axis=1)(noisy),
        "flipped": keras.ops.flip(noisy, axis=1),
        "smaller": layers.AveragePooling2D(2)(noisy),
        "scales": layers.Add()([noisy, layers.Cropping2D(14)(layers.UpSampling2D(2)(noisy))]),
    }
    for name, output in unknown.items():
        assert receptive_field(keras.Model(noisy, output)) is None, name
