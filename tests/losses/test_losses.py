import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dae.errors import UsageError
from dae.losses.losses import SUPERVISED, edges, frequency, ms_ssim, total_variation

# The losses of a clean and a denoised image of any size.
SMALL = {name: loss for name, loss in SUPERVISED.items() if name != "ms_ssim"}
# Often exactly 0 or 1, where logarithms, roots and quotients can fail.
IMAGES = arrays(np.float32, (2, 12, 12, 1), elements=st.sampled_from([0.0, 1.0]) | st.floats(0, 1, width=32))
BLACK = np.zeros((2, 12, 12, 1), np.float32)
LARGEST = {"bce": 16.2, "mse": 1, "mae": 1, "huber": 0.095, "charbonnier": 1.000001, "ssim": 2, "edges": 1}
# The mean over all 12 frequencies of a row is at most 1 (Parseval), so that over the 7 of a real transform is at most:
LARGEST["frequency"] = (12 / 7) ** 0.5
# Rounding error; that of SSIM is largest in flat bright images.
ROUNDING = {"ssim": 3e-4}


def values_and_gradients(loss, clean, denoised) -> tuple[tf.Tensor, tf.Tensor]:
    denoised = tf.constant(denoised)
    with tf.GradientTape() as tape:
        tape.watch(denoised)
        values = loss(tf.constant(clean), denoised)
    return values, tape.gradient(values, denoised)


def digits(mnist, first: int, count: int = 4) -> np.ndarray:
    """Return test images from number `first`."""
    return mnist.test.pixels[first : first + count] / np.float32(255)


@pytest.mark.parametrize("name", SMALL)
@given(clean=IMAGES, denoised=IMAGES)
@example(clean=BLACK, denoised=BLACK)
@example(clean=1 - BLACK, denoised=1 - BLACK)
@example(clean=1 - BLACK, denoised=BLACK)
@settings(max_examples=10)
def test_losses_are_one_value_per_example_in_range_with_finite_gradients(name, clean, denoised):
    values, gradients = values_and_gradients(SMALL[name], clean, denoised)
    assert values.shape == (2,)
    assert values.dtype == tf.float32
    assert values.numpy().min() >= -ROUNDING.get(name, 1e-6)
    assert values.numpy().max() <= LARGEST[name] * (1 + 1e-5)
    assert np.isfinite(gradients).all()


def test_edges_is_the_mean_absolute_difference_of_both_gradients(mnist):
    clean, denoised = digits(mnist, 0), digits(mnist, 4)
    error = clean.astype(np.float64) - denoised
    differences = np.abs(np.diff(error, axis=1)).sum((1, 2, 3)) + np.abs(np.diff(error, axis=2)).sum((1, 2, 3))
    for brighter in (0, 0.25):  # blind to the mean brightness
        values = edges(tf.constant(clean), tf.constant(denoised + np.float32(brighter)))
        np.testing.assert_allclose(values, differences / (2 * 28 * 28), rtol=1e-4)


@pytest.mark.parametrize("shape", [(28, 28, 1), (15, 21, 3)])
def test_frequency_equals_numpys_fourier_transform(shape, mnist):
    images = digits(mnist, 0, 24).reshape(-1)[: 8 * np.prod(shape)].reshape(2, 4, *shape)
    clean, denoised = np.abs(np.fft.rfft2(images.astype(np.float64), axes=(2, 3), norm="ortho"))
    np.testing.assert_allclose(
        frequency(*map(tf.constant, images)), np.abs(clean - denoised).mean((1, 2, 3)), rtol=1e-4
    )


def test_total_variation_is_the_sum_over_neighbours_divided_by_the_pixels(mnist):
    images = digits(mnist, 0)
    expected = [np.abs(np.diff(image, axis=0)).sum() + np.abs(np.diff(image, axis=1)).sum() for image in images]
    np.testing.assert_allclose(total_variation(tf.constant(images)), np.array(expected) / 28**2, rtol=1e-5)


def large(mnist, height: int, width: int, channels: int = 1) -> np.ndarray:
    """Return two images that are mosaics of digits."""
    rows, columns = -(-height // 28), -(-width // 28)
    tiles = digits(mnist, 0, 2 * rows * columns * channels).reshape(2, channels, rows, columns, 28, 28)
    mosaic = tiles.transpose(0, 2, 4, 3, 5, 1).reshape(2, rows * 28, columns * 28, channels)
    return np.ascontiguousarray(mosaic[:, :height, :width])


@pytest.mark.parametrize("shape", [(161, 161, 1), (176, 180, 3)])
def test_ms_ssim_and_its_gradient_equal_those_of_tensorflow(shape, mnist):
    clean = large(mnist, *shape)
    noise = np.random.default_rng(0).normal(0, 0.2, clean.shape).astype(np.float32)
    denoised = np.clip(clean + noise, 0, 1)  # close enough for every mean structure to be positive
    values, gradients = values_and_gradients(ms_ssim, clean, denoised)
    expected, expected_gradients = values_and_gradients(
        lambda x, y: 1 - tf.image.ssim_multiscale(x, y, max_val=1.0), clean, denoised
    )
    assert ((values.numpy() > 0.01) & (values.numpy() < 0.9)).all()
    np.testing.assert_allclose(values, expected, atol=3e-5)
    largest = np.abs(expected_gradients).max()
    np.testing.assert_allclose(gradients, expected_gradients, atol=1e-3 * largest)


def test_ms_ssim_is_0_for_equal_images_and_finite_with_its_gradient_for_images_of_only_0_and_1(mnist):
    binary = np.round(large(mnist, 161, 161))
    zeros, ones = np.zeros_like(binary), np.ones_like(binary)
    for clean, denoised in ((binary, 1 - binary), (ones, binary), (zeros, zeros)):
        values, gradients = values_and_gradients(ms_ssim, clean, denoised)
        assert np.isfinite(gradients).all()
        assert ((values.numpy() >= -1e-4) & (values.numpy() <= 1)).all()
        if clean is denoised:
            np.testing.assert_allclose(values, 0, atol=1e-4)
    np.testing.assert_allclose(ms_ssim(binary, binary), 0, atol=1e-5)


@pytest.mark.parametrize("shape", [(28, 28), (160, 200), (200, 160)])
def test_ms_ssim_rejects_small_images_and_states_the_smallest_size(shape):
    images = tf.zeros((1, *shape, 1))
    with pytest.raises(UsageError, match=f"^--loss: ms_ssim: .*161 x 161.*{shape[0]}, {shape[1]}.*ssim$"):
        ms_ssim(images, images)
