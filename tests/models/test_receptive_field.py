import os
from functools import partial

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from dae.models.networks import MODELS
from dae.models.receptive_field import ReceptiveField, receptive_field

few_examples = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20")), deadline=None)
paddings = st.sampled_from(["same", "valid"])


@st.composite
def plain_layers(draw: st.DrawFn) -> partial:
    """A layer that keeps the scale, to be called: Keras draws seeds when it makes a layer."""
    kind = draw(st.sampled_from(["conv", "depthwise", "separable", "pad", "crop", "norm", "average"]))
    size, dilation, padding = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(paddings)
    options = {"padding": padding, "dilation_rate": dilation, "use_bias": False}
    if kind == "conv":
        return partial(layers.Conv2D, 2, size, **options)
    if kind == "depthwise":
        return partial(layers.DepthwiseConv2D, size, **options)
    if kind == "separable":
        return partial(layers.SeparableConv2D, 2, size, **options)
    if kind == "norm":
        return partial(draw(st.sampled_from([layers.BatchNormalization, layers.LeakyReLU])))
    if kind == "average":
        return partial(layers.AveragePooling2D, size, strides=1, padding=padding)
    sides = ((draw(st.integers(0, 3)), draw(st.integers(0, 3))), (1, 2))
    return partial(layers.ZeroPadding2D if kind == "pad" else layers.Cropping2D, sides)


@st.composite
def networks(draw: st.DrawFn) -> list[partial]:
    """The layers of a network that downsamples and upsamples."""
    factor = draw(st.integers(1, 3))
    size = draw(st.integers(factor, 4))
    down = {"strides": factor, "padding": draw(paddings)}
    up = {"strides": factor, "padding": draw(paddings)}
    pooling = partial(draw(st.sampled_from([layers.MaxPooling2D, layers.AveragePooling2D])), size, **down)
    upsampling = partial(layers.UpSampling2D, factor, interpolation=draw(st.sampled_from(["nearest", "bilinear"])))
    few = st.lists(plain_layers(), max_size=2)
    return [
        *draw(few),
        draw(st.sampled_from([pooling, partial(layers.Conv2D, 2, size, **down)])),
        *draw(few),
        draw(st.sampled_from([upsampling, partial(layers.Conv2DTranspose, 2, size, **up)])),
        *draw(few),
        partial(layers.Conv2D, 1, 1),
    ]


def build(network: list[partial]) -> tuple[keras.Model, ReceptiveField]:
    """Return the network, with a connection around its last two layers, and its receptive field."""
    keras.utils.set_random_seed(0)
    noisy = x = keras.Input((None, None, 1))
    for layer in network:
        x = layer()(x)
    x = layers.Concatenate()([x, layers.Conv2D(1, 3, padding="same")(x)])
    model = keras.Model(noisy, layers.Conv2D(1, 1)(x))
    field = receptive_field(model)
    assert field is not None
    return model, field


@few_examples
@given(network=networks(), rows=st.integers(30, 36), columns=st.integers(30, 36), data=st.data())
def test_a_changed_pixel_changes_only_outputs_whose_field_holds_it(network, rows, columns, data):
    model, field = build(network)
    noisy = np.random.default_rng(0).random((1, rows, columns, 1), np.float32)
    row, column = pixel = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    changed = noisy.copy()
    changed[0, row, column] += 100
    outputs = np.nonzero(np.any(model(noisy).numpy() != model(changed).numpy(), axis=-1)[0])
    for axis in (0, 1):
        assert all(outputs[axis] >= pixel[axis] - field.after[axis])
        assert all(outputs[axis] <= pixel[axis] + field.before[axis])


@few_examples
@given(network=networks(), extra=st.integers(0, 5), first=st.integers(1, 3))
def test_a_tile_gives_the_output_of_the_whole_image_inside_its_field(network, extra, first):
    model, field = build(network)
    (period, _), before, after = field.period, max(field.before), max(field.after)
    tile = 30 + extra + before + after
    whole = np.random.default_rng(0).random((1, tile + 4 * period, tile + 4 * period, 1), np.float32)
    offset = first * period
    expected = model(whole).numpy()[0, offset:, offset:]
    inside = slice(before, tile - after)
    got = model(whole[:, offset : offset + tile, offset : offset + tile]).numpy()[0, inside, inside]
    assert got.size
    np.testing.assert_allclose(got, expected[inside, inside][: len(got), : len(got[0])], atol=1e-4)


@pytest.mark.parametrize(("name", "side", "before", "after", "period"), [
    ("conv", 28, 27, 31, 8),
    ("conv", 32, 29, 29, 8),
    ("blog", 28, 13, 13, 4),
    ("patches", 28, 12, 12, 2),
    ("unet", 28, 48, 48, 4),
    ("dncnn", 28, 8, 8, 1),
])  # fmt: skip
def test_fields_of_the_networks_of_the_package(name, side, before, after, period):
    field = receptive_field(MODELS[name]((side, side, 1)))
    assert field == ReceptiveField((before, before), (after, after), (period, period))


def test_nested_models_are_followed():
    inner = keras.Sequential([keras.Input((28, 28, 2)), layers.Conv2D(1, 5, padding="same")])
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(2, 3, padding="same"), inner])
    assert receptive_field(model) == ReceptiveField((3, 3), (3, 3), (1, 1))


def test_there_is_no_field_with_global_or_unknown_layers_or_unequal_scales():
    noisy = keras.Input((28, 28, 1))
    same = layers.Conv2D(1, 3, padding="same")
    unknown = {
        "dense": layers.Reshape((28, 28, 1))(layers.Dense(784)(layers.Flatten()(noisy))),
        "global pooling": layers.Multiply()([noisy, layers.GlobalAveragePooling2D(keepdims=True)(noisy)]),
        "per image": layers.GroupNormalization(1)(noisy),
        "over rows": layers.BatchNormalization(axis=1)(noisy),
        "an operation": keras.ops.flip(noisy, axis=1),
        "a layer used twice": same(same(noisy)),
        "smaller": layers.AveragePooling2D(2)(noisy),
        "bicubic": layers.AveragePooling2D(2)(layers.UpSampling2D(2, interpolation="bicubic")(noisy)),
        "scales": layers.Add()([noisy, layers.Cropping2D(14)(layers.UpSampling2D(2)(noisy))]),
    }
    for name, output in unknown.items():
        assert receptive_field(keras.Model(noisy, output)) is None, name
