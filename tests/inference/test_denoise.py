import math

import keras
import numpy as np
import pytest
from helpers import not_the_identity, small_network
from hypothesis import given, settings
from hypothesis import strategies as st

import dae
from dae.config import RunConfig
from dae.data.values import ValueRange
from dae.errors import UsageError
from dae.inference.denoise import Denoiser, _intervals
from dae.models import networks, sizes
from dae.workdir.model_files import save_model


@pytest.fixture(scope="module")
def patches() -> keras.Model:
    return not_the_identity(sizes.any_size(networks.build(RunConfig(model="patches"), (28, 28, 1))))


# Sizes that have at least four tiles, and the next larger ones that the networks take.
SIZES = {
    "conv": ((167, 151), (172, 156)),
    "blog": ((111, 93), (112, 96)),
    "patches": ((111, 93), (112, 94)),
    "unet": ((231, 217), (232, 220)),
    "dncnn": ((91, 77), (91, 77)),
}


@pytest.mark.parametrize("name", SIZES)
def test_tiles_give_the_result_of_the_whole_padded_image(name, mnist):
    model = not_the_identity(sizes.any_size(networks.build(RunConfig(model=name), (28, 28, 1))))
    digits = mnist.test.pixels[:240, ..., 0].reshape(12, 20, 28, 28).swapaxes(1, 2).reshape(336, 560) / np.float32(255)
    denoiser = Denoiser(model, tile_pixels=1)  # the smallest tiles that the receptive field allows
    (height, width), (rows, columns) = SIZES[name]
    noisy = digits[:height, :width]
    assert len(denoiser._tiles((rows, columns), 1)[1]) >= 4
    whole = np.pad(noisy, ((0, rows - height), (0, columns - width)), "symmetric")[None, ..., None]
    expected = np.clip(model(whole)[0, :height, :width, 0], 0, 1)
    np.testing.assert_allclose(denoiser(noisy), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "side", "values_per_pixel"), [("blog", 28, 32), ("patches", None, 8)])
def test_tiles_are_as_large_as_the_widest_layer_allows(name, side, values_per_pixel):
    model = networks.build(RunConfig(model=name), (28, 28, 1))
    _, tiles = Denoiser(model if side else sizes.any_size(model))._tiles((8188, 8188), 1)
    pixels = max(math.prod(part.stop - part.start for part, _ in tile) for tile in tiles)
    assert 0.6 * 2**20 < pixels * max(1, values_per_pixel / 16) <= 1.1 * 2**20


def test_self_ensemble_is_the_mean_over_flips_and_turns_also_in_tiles(patches, mnist):
    noisy = np.pad(mnist.test.pixels[0, ..., 0], ((30, 50), (20, 64)), "wrap") / np.float32(255)
    results = []
    for turns in range(4):
        for flip in (np.asarray, np.transpose):
            output = patches(np.rot90(flip(noisy), turns)[None, ..., None])[0, ..., 0]
            results.append(flip(np.rot90(output, -turns)))
    expected = np.clip(np.mean(results, axis=0), 0, 1)
    np.testing.assert_allclose(dae.denoise(noisy, patches, self_ensemble=True), expected, atol=1e-6)
    np.testing.assert_allclose(Denoiser(patches, tile_pixels=1, self_ensemble=True)(noisy), expected, atol=1e-6)
    assert np.abs(dae.denoise(noisy, patches) - expected).max() > 1e-4


@settings(max_examples=100)
@given(
    length=st.integers(1, 3000),
    side=st.integers(1, 500),
    radius=st.integers(0, 40),
    period=st.integers(1, 16),
)
def test_intervals_cover_the_length_and_keep_only_what_is_inside(length, side, radius, period):
    intervals = _intervals(length, side, radius, period)
    assert [kept.start for _, kept in intervals[1:]] == [kept.stop for _, kept in intervals[:-1]]
    assert (intervals[0][1].start, intervals[-1][1].stop) == (0, length)
    sizes = {part.stop - part.start for part, _ in intervals}
    assert len(sizes) == 1
    assert (sizes.pop() - length) % period == 0
    for part, kept in intervals:
        assert part.start % period == 0
        assert 0 <= part.start <= kept.start < kept.stop <= part.stop <= length
        assert part.start == 0 or kept.start >= part.start + radius
        assert part.stop == length or kept.stop <= part.stop - radius


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "float32", "float64", "float16"])
@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (31, 45, 3), (5, 28, 29), (2, 30, 29, 3)])
def test_shape_and_type_are_kept_and_values_are_those_of_the_network(shape, dtype, patches):
    white = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    noisy = (np.random.default_rng(0).random(shape) * white).astype(dtype)
    denoised = dae.denoise(noisy, patches)
    assert (denoised.shape, denoised.dtype) == (noisy.shape, noisy.dtype)
    channels = [noisy[..., channel] for channel in range(3)] if shape[-1] == 3 else [noisy.reshape(-1, *shape[-2:])]
    if shape == (28, 28, 1):
        channels = [noisy[..., 0]]
    for channel, image in enumerate(channels):
        batch = (image.reshape(-1, *image.shape[-2:], 1) / white).astype(np.float32)
        odd = ((0, 0), (0, batch.shape[1] % 2), (0, batch.shape[2] % 2), (0, 0))
        output = patches(np.pad(batch, odd, "symmetric")).numpy()[:, : batch.shape[1], : batch.shape[2]]
        got = (denoised[..., channel] if shape[-1] in (1, 3) else denoised).reshape(output.shape) / white
        np.testing.assert_allclose(got.astype(float), output, atol=1 / white if white > 1 else 1e-3)


def test_value_range_scales_black_and_white(patches, mnist):
    noisy = mnist.test.pixels[:3] / np.float32(255)
    expected = dae.denoise(noisy, patches)
    scaled = dae.denoise(noisy * 300 - 100, patches, value_range=(-100, 200))
    np.testing.assert_allclose((scaled + 100) / 300, expected, atol=1e-5)


def test_the_current_weights_of_the_model_are_used(mnist):
    model = small_network((28, 28, 1))
    before = dae.denoise(mnist.test.pixels[:2], model)
    model.layers[-1].bias.assign([3.0])
    after = dae.denoise(mnist.test.pixels[:2], model)
    assert after.mean() > before.mean() + 50


def test_the_outputs_of_a_colour_network_for_a_grey_image_are_averaged(mnist):
    model = small_network((28, 28, 3))
    noisy = mnist.test.pixels[:4] / np.float32(255)
    expected = model(noisy.repeat(3, axis=3)).numpy().mean(axis=3, keepdims=True)
    np.testing.assert_allclose(dae.denoise(noisy, model), expected, atol=1e-6)


def enlarging(noisy: keras.KerasTensor) -> keras.KerasTensor:
    large = keras.layers.UpSampling2D(2, interpolation="bilinear")(noisy)
    return keras.layers.Conv2D(1, 3, padding="same")(keras.layers.AveragePooling2D(2)(large))


def with_a_list() -> keras.Model:
    noisy = keras.Input((28, 28, 1))
    return keras.Model([noisy], enlarging(noisy))


def with_a_model_within() -> keras.Model:
    noisy, inner = keras.Input((28, 28, 1)), keras.Input((None, None, 1))
    return keras.Model(noisy, keras.Model(inner, enlarging(inner))(noisy))


def in_sequence() -> keras.Model:
    small = keras.layers.Conv2D(1, 3, strides=2, padding="same")
    return keras.Sequential([keras.Input((28, 28, 1)), small, keras.layers.UpSampling2D(2, interpolation="bicubic")])


@pytest.mark.parametrize("build", [with_a_list, with_a_model_within, in_sequence])
def test_layers_that_interpolate_and_models_of_any_structure_take_images_of_any_size(build):
    model, image = build(), np.random.default_rng(0).random((40, 52), np.float32)
    batch = image[None, ..., None]
    expected = sizes.any_size(model)([batch] if build is with_a_list else batch)
    np.testing.assert_allclose(dae.denoise(image, model), np.clip(expected[0, ..., 0], 0, 1), atol=1e-6)


def test_a_network_of_one_size_takes_that_size():
    image, noisy = np.random.default_rng(0).random((14, 14), np.float32), keras.Input((14, 14, 1))
    flat = keras.layers.Dense(196, activation="sigmoid")(keras.layers.Flatten()(noisy))
    model = keras.Model(noisy, keras.layers.Reshape((14, 14, 1))(flat))
    np.testing.assert_allclose(dae.denoise(image, model), model(image[None, ..., None]).numpy()[0, ..., 0], atol=1e-6)


def test_a_network_without_a_finite_field_computes_the_whole_image_or_refuses(monkeypatch):
    noisy = keras.Input((None, None, 1))
    mean = keras.layers.GlobalAveragePooling2D(keepdims=True)(noisy)
    model = keras.Model(noisy, keras.layers.Average()([noisy, keras.layers.Subtract()([noisy, mean])]))
    image = np.random.default_rng(0).random((50, 60), np.float32)
    expected = np.clip(image - image.mean() / 2, 0, 1)
    np.testing.assert_allclose(Denoiser(model, tile_pixels=1)(image), expected, atol=1e-6)
    Denoiser(model).check(5000, 5000, 1)
    wide = keras.Model(noisy, keras.layers.Conv2D(1, 1)(keras.layers.Conv2D(64, 1)(model(noisy))))
    for network, side in ((model, 40_000), (wide, 5000)):
        with pytest.raises(UsageError, match=f"{side} x {side} pixels are too many at once"):
            Denoiser(network).check(side, side, 1)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros(9), "expected images"),
        (np.zeros((2, 2, 28, 28, 1)), "expected images"),
        (np.zeros((28, 28, 2)), "C 1 or 3"),
        ([[0.5]], "NumPy array, got list"),
        (np.zeros((28, 28), np.int64), "int64"),
        (np.full((28, 28), np.nan), "NaN"),
        (np.full((28, 28), 255.0), "--value-range 0 255 fits"),
    ],
)
def test_images_of_other_kinds_are_rejected(image, words, patches):
    with pytest.raises(UsageError, match=words):
        dae.denoise(image, patches)


def test_progress_counts_every_pixel_once(patches):
    counted: list[int] = []
    Denoiser(patches, tile_pixels=1)(np.zeros((2, 151, 233, 3), np.uint8), progress=counted.append)
    assert len(counted) > 4
    assert sum(counted) == 2 * 151 * 233


@pytest.mark.parametrize(
    ("ends", "dtype", "name"),
    [((0, 4095), np.uint16, "a.keras"), ((-1, 1), np.float32, "a.h5"), ((-1000, 2000), np.int16, "a.keras")],
)
def test_a_model_denoises_its_type_of_images_in_its_range_and_others_in_theirs(ends, dtype, name, mnist, tmp_path):
    trained_on, model = ValueRange.requested(ends, dtype), small_network((28, 28, 1))
    save_model(model, tmp_path / name, trained_on)
    noisy = mnist.test.pixels[:3] / np.float32(255)
    expected = dae.denoise(noisy, model)
    for used in map(trained_on.of, (dtype, np.uint8)):
        denoised = dae.denoise(used.from_unit(noisy, np.dtype(used.dtype)), tmp_path / name)
        np.testing.assert_allclose(used.to_unit(denoised), expected, atol=4e-3)


def test_a_model_that_is_not_a_runs_must_take_and_return_values_from_0_to_1(tmp_path, capsys):
    image = keras.Input((None, None, 1))
    inside = keras.layers.Rescaling(255)(keras.layers.Activation("sigmoid")(keras.layers.Rescaling(1 / 255)(image)))
    save_model(keras.Model(image, inside), tmp_path / "bytes.keras")
    with pytest.raises(UsageError, match=r"outputs from 12\d to 12\d for images from 0 \(black\) to 1 \(white\)"):
        dae.denoise(np.zeros((28, 28)), tmp_path / "bytes.keras")
    save_model(keras.Model(image, keras.layers.Rescaling(1 / 255)(image)), tmp_path / "dark.keras")
    dae.denoise(np.zeros((28, 28), np.uint8), tmp_path / "dark.keras")
    assert "dark.keras: white images come out hardly brighter than black ones" in capsys.readouterr().err
    save_model(keras.Model(image, keras.layers.Activation("linear")(image)), tmp_path / "unchanged.keras")
    dae.denoise(np.zeros((28, 28), np.uint8), tmp_path / "unchanged.keras")
    assert capsys.readouterr().err == ""


def test_images_of_12_bits_in_16_are_denoised_with_a_warning(patches, mnist, capsys):
    dae.denoise(mnist.test.pixels[0].astype(np.uint16) * 16, patches)
    assert "--value-range 0 4095 if 4095 is white" in capsys.readouterr().err
