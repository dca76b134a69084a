"""Estimates of the noise in generated pictures whose noise is known."""

import io

import numpy as np
import pytest
from helpers import fuzz, run_in_process
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dae
from dae.data.noise_level import combined, estimate_noise


def picture(rng: np.random.Generator, side: int = 200) -> np.ndarray:
    """Smooth shading, edges and, in a corner, fine texture: float64 [side, side] from 0.2 to 0.8."""
    rows, columns = np.mgrid[:side, :side] / side
    shading = 0.5 + 0.1 * np.sin(6 * rows + 3 * rng.random()) * np.cos(5 * columns)
    edges = 0.15 * np.sign(np.sin(9 * columns * (1 + rows)))
    return shading + edges + 0.05 * rng.standard_normal((side, side)) * (rows + columns < 0.5)


def eight_bits(image: np.ndarray) -> np.ndarray:
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8)


def blurred(noise: np.ndarray) -> np.ndarray:
    """Average each pixel with its neighbours, weighted 1 2 1 in rows and columns."""
    for axis in (0, 1):
        noise = (np.roll(noise, 1, axis) + 2 * noise + np.roll(noise, -1, axis)) / 4
    return noise


@fuzz
@given(st.floats(0.02, 0.2), st.integers(0, 2**32), st.sampled_from([1, 3]), st.booleans())
def test_the_level_of_white_noise_is_found_and_nothing_is_wrong_with_it(sigma, seed, channels, is_rounded):
    rng = np.random.default_rng(seed)
    clean = np.repeat(picture(rng)[..., None], channels, axis=2)
    noisy = clean + sigma * rng.standard_normal(clean.shape)
    found = estimate_noise(eight_bits(noisy) if is_rounded and sigma < 0.1 else noisy)
    assert found.sigma == pytest.approx(sigma, rel=0.06)
    assert found.sigma_error < 0.1 * sigma
    assert [problem for problem in found.problems() if "clipped" not in problem] == []


@fuzz
@given(st.integers(0, 2**32))
def test_the_level_scales_with_the_values_and_the_noise_of_turned_pictures_is_the_same(seed):
    rng = np.random.default_rng(seed)
    noisy = picture(rng, 100) + 0.1 * rng.standard_normal((100, 100))
    sigma = estimate_noise(noisy).sigma
    assert estimate_noise(4095 * noisy, (0, 4095)).sigma == pytest.approx(sigma, rel=1e-3)
    assert estimate_noise(noisy / 2).sigma == pytest.approx(sigma / 2, rel=1e-3)
    assert estimate_noise(noisy.T).sigma == pytest.approx(sigma, rel=0.01)


@pytest.mark.parametrize("gain", [0.01, 0.05])
def test_gain_and_offset_of_poisson_gaussian_noise_are_found_from_several_pictures(gain):
    rng = np.random.default_rng(0)
    levels = []
    for _ in range(4):
        clean = picture(rng)
        levels.append(estimate_noise(gain * rng.poisson(clean / gain) + 0.03 * rng.standard_normal(clean.shape)))
    found = combined(levels)
    assert found.gain == pytest.approx(gain, rel=0.1)
    assert abs(found.gain - gain) < 4 * found.gain_error
    assert abs(found.offset - 0.03**2) < 4 * found.offset_error
    assert any("brightness" in problem for problem in found.problems())
    assert not any("brightness" in problem for problem in found.problems(needs_level=False))


def test_noise_that_is_correlated_is_reported_and_structure_is_not():
    rng = np.random.default_rng(0)
    noise = 0.1 * rng.standard_normal((200, 200))
    assert any("correlated" in problem for problem in estimate_noise(picture(rng) + blurred(noise)).problems())
    for clean in (picture(rng), blurred(blurred(picture(rng)))):
        assert not any("correlated" in problem for problem in estimate_noise(clean).problems())
        assert not any("correlated" in problem for problem in estimate_noise(clean + noise).problems())


@pytest.mark.parametrize("quality", [30, 70, 90])
@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_jpeg_is_found_also_in_a_part_of_a_picture_and_not_without_it(quality, sigma):
    rng = np.random.default_rng(0)
    pixels = eight_bits(picture(rng) + sigma * rng.standard_normal((200, 200)))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    assert estimate_noise(np.asarray(Image.open(file))[3:, 5:]).is_compressed
    assert not estimate_noise(pixels).is_compressed


@pytest.mark.parametrize("value", [0, 100, 255])
def test_constant_and_saturated_pictures_have_no_noise(value):
    found = estimate_noise(np.full((64, 64), value, np.uint8))
    assert found.sigma < 1e-4
    assert found.problems()[0] == "no noise found"
    assert found.clipped == (value in (0, 255))


def test_pixels_that_are_clipped_do_not_lower_the_level():
    rng = np.random.default_rng(0)
    clean = picture(rng)
    clean[:, :100] = 0
    found = estimate_noise(eight_bits(clean + 0.1 * rng.standard_normal(clean.shape)))
    assert found.sigma == pytest.approx(0.1, rel=0.05)
    assert found.clipped == pytest.approx(0.25, abs=0.03)


def test_images_that_are_none_are_rejected():
    bad = np.full((32, 32), np.nan), np.full((32, 32), 200.0), np.zeros((32, 32), np.int32)
    for image in (np.zeros((8, 64)), np.zeros((32, 32, 2)), *bad):
        with pytest.raises(dae.UsageError, match=r"expected|cannot be those of images from 0 \(black\) to 1 \(white\)"):
            dae.estimate_noise(image)


def test_a_pattern_whose_blocks_are_equally_bright_has_no_gain():
    pattern = np.where(np.indices((64, 64)).sum(axis=0) % 2, 64, 192).astype(np.uint8)
    assert estimate_noise(pattern).gain == 0


def test_the_script_prints_a_line_per_image_and_the_flag_to_train_with(tmp_path):
    rng = np.random.default_rng(0)
    first, *others = np.stack([picture(rng) for _ in range(3)]) + 0.1 * rng.standard_normal((3, 200, 200))
    Image.fromarray(eight_bits(first)).save(tmp_path / "0.png")
    np.save(tmp_path / "stack.npy", others)
    done = run_in_process("noise_level.py", tmp_path)
    *lines, total, flag = done.stdout.splitlines()
    names = [line.partition(": ")[0].removeprefix(f"{tmp_path}/") for line in lines]
    assert names == ["0.png", "stack.npy, image 0", "stack.npy, image 1"]
    assert total.startswith("all (3): standard deviation 25.")
    assert flag.startswith("for run.py: --noise-level 25.")
