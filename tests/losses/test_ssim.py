import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from dae.losses.ssim import MAX_SIDE, ssim

SIDES = st.integers(11, 40)


def images(seed, shape, brightness, contrast, noise) -> tuple[tf.Tensor, tf.Tensor]:
    random = np.random.default_rng(seed)
    clean = np.clip(brightness + contrast * (random.random(shape) - 0.5), 0, 1)
    denoised = np.clip(clean + random.normal(0, noise, shape), 0, 1)
    return tf.constant(clean, tf.float32), tf.constant(denoised, tf.float32)


def ssim_of_the_paper(clean: np.ndarray, denoised: np.ndarray) -> float:
    """Compute the formulas of the paper, window by window, in float64, for images [H, W]."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for row, column in np.ndindex(clean.shape[0] - 10, clean.shape[1] - 10):
        x, y = (image[row : row + 11, column : column + 11].astype(np.float64) for image in (clean, denoised))
        mean_x, mean_y = (window * x).sum(), (window * y).sum()
        variances = (window * ((x - mean_x) ** 2 + (y - mean_y) ** 2)).sum()
        covariance = (window * (x - mean_x) * (y - mean_y)).sum()
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        values.append(luminance * (2 * covariance + 0.03**2) / (variances + 0.03**2))
    return float(np.mean(values))


@pytest.mark.parametrize("brightness", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("contrast", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("noise", [0.001, 0.3])
def test_ssim_equals_the_formulas_of_the_paper(brightness, contrast, noise):
    clean, denoised = images(0, (1, 14, 13, 1), brightness, contrast, noise)
    expected = ssim_of_the_paper(clean[0, :, :, 0].numpy(), denoised[0, :, :, 0].numpy())
    assert float(ssim(clean, denoised)[0]) == pytest.approx(expected, abs=1e-5 if contrast == 1 else 1e-4)


@settings(max_examples=10)
@given(st.integers(1, 3), SIDES, SIDES, st.sampled_from([1, 3]), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_ssim_and_its_gradient_equal_those_of_tensorflow(batch, height, width, channels, contrast, seed):
    clean, denoised = images(seed, (batch, height, width, channels), 0.5, contrast, 0.2)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(denoised)
        ours, theirs = ssim(clean, denoised), tf.image.ssim(clean, denoised, max_val=1.0)
    # The formulas in float64 differ by up to 0.6e-5 from ours, and by up to 1.1e-5 from TensorFlow's.
    np.testing.assert_allclose(ours, theirs, atol=3e-5)
    expected = tape.gradient(theirs, denoised).numpy()
    np.testing.assert_allclose(tape.gradient(ours, denoised), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("side", [MAX_SIDE, MAX_SIDE + 1])
def test_ssim_of_large_images_equals_that_of_tensorflow(side):
    clean, denoised = images(0, (1, side, 20, 3), 0.5, 1.0, 0.2)
    np.testing.assert_allclose(ssim(clean, denoised), tf.image.ssim(clean, denoised, max_val=1.0), atol=1e-5)
