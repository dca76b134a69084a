"""Tests of networks on images of other sizes than those that they were built for."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

import dae
from dae.config import RunConfig
from dae.errors import UsageError
from dae.models import networks
from dae.models.fused_layers import fused
from dae.models.sizes import any_size, fitting_size, view_of_any_size

# By network and the side of the squares that it was built for: the sides that fit are this remainder of that divisor.
REMAINDERS = {
    ("conv", 28): (4, 8),
    ("conv", 30): (6, 8),
    ("blog", 28): (0, 4),
    ("patches", 29): (1, 2),
    ("unet", 31): (3, 4),
    ("dncnn", 28): (0, 1),
}
SIDES = st.integers(11, 70)


@pytest.fixture(scope="module")
def built() -> dict[tuple[str, int], keras.Model]:
    return {(name, side): networks.build(RunConfig(model=name), (side, side, 1)) for name, side in REMAINDERS}


@settings(max_examples=12)
@given(case=st.sampled_from(list(REMAINDERS)), height=SIDES, width=SIDES)
def test_fitting_size_is_the_smallest_that_fits(built, case, height, width):
    remainder, divisor = REMAINDERS[case]
    size = fitting_size(built[case], height, width)
    assert size == (height + (remainder - height) % divisor, width + (remainder - width) % divisor)


@pytest.mark.parametrize("case", REMAINDERS)
@pytest.mark.parametrize("size", [(33, 27), (3, 45)])  # 3 pixels are mirrored more than once
def test_images_of_any_size_are_mirrored_to_one_that_fits_and_cropped(built, case, size):
    model = built[case]
    noisy = np.random.default_rng(0).random((2, *size, 1)).astype(np.float32)
    fitting = fitting_size(model, *size)
    mirrored = np.pad(
        noisy, [(0, 0), *((0, to - side) for to, side in zip(fitting, size, strict=True)), (0, 0)], "symmetric"
    )
    expected = view_of_any_size(model)(mirrored, training=False)[:, : size[0], : size[1]]
    denoised = fused(model, training=False)(tf.constant(noisy)).denoised
    assert denoised.shape == noisy.shape
    np.testing.assert_allclose(denoised, expected, atol=1e-5)


def test_any_size_is_a_copy_and_its_view_has_the_same_weights(built):
    model = built["unet", 31]
    noisy = np.random.default_rng(0).random((2, 31, 31, 1)).astype(np.float32)
    copy, view = any_size(model), view_of_any_size(model)
    for free in (copy, view):
        assert free.input_shape == (None, None, None, 1)
        np.testing.assert_allclose(free(noisy), model(noisy), atol=1e-6)
    assert all(weight is other for weight, other in zip(view.weights, model.weights, strict=True))
    assert not {id(weight) for weight in copy.weights} & {id(weight) for weight in model.weights}


def test_network_for_one_size_takes_no_other():
    noisy = keras.Input((28, 28, 1))
    model = keras.Model(noisy, layers.Reshape((28, 28, 1))(layers.Dense(784, "sigmoid")(layers.Flatten()(noisy))))
    assert any_size(model) is view_of_any_size(model) is model
    assert fitting_size(model, 28, 28) == (28, 28)
    for size in ((28, 29), (14, 56), (29, 11), (27, 12)):
        with pytest.raises(UsageError, match=rf"takes images of \(28, 28, 1\), not of {size[0]} x {size[1]}$"):
            fitting_size(model, *size)


@pytest.mark.parametrize("side", [28, None])
def test_images_smaller_than_the_kernels_are_padded_to_a_size_that_fits(side):
    noisy = keras.Input((side, side, 1))
    x = layers.Conv2D(2, 9)(layers.Conv2D(2, 9)(noisy))  # without padding
    model = keras.Model(noisy, layers.Conv2DTranspose(1, 9)(layers.Conv2DTranspose(2, 9)(x)))
    assert fitting_size(model, 12, 12) == (17, 17)
    assert fitting_size(model, 19, 600) == (19, 600)
    assert dae.denoise(np.zeros((12, 12), np.float32), model).shape == (12, 12)


def concatenating(image_shape: tuple[int | None, int | None, int], depth: int = 1) -> keras.Model:
    """Return a U-Net of Keras's plainest layers, which takes only sides that 2^depth divides."""
    noisy = x = keras.Input(image_shape)
    skips = []
    for _ in range(depth):
        skips.append(x)
        x = layers.MaxPooling2D(2)(layers.Conv2D(2, 3, padding="same")(x))
    for skip in reversed(skips):
        x = layers.Concatenate()([skip, layers.UpSampling2D(2)(x)])
    return keras.Model(noisy, layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x))


@pytest.mark.parametrize("shape", [(16, 16, 1), (None, None, 1)])
@pytest.mark.parametrize(("height", "width", "fitting"), [(17, 23, (20, 24)), (20, 24, (20, 24))])
def test_images_are_padded_to_a_size_that_branches_agree_on_though_keras_computes_a_shape_for_others(
    shape, height, width, fitting
):
    model = concatenating(shape, depth=2)
    assert fitting_size(model, height, width) == fitting
    images = tf.random.stateless_uniform([1, height, width, 1], seed=(1, 2))
    assert fused(model, training=False)(images).denoised.shape == images.shape
