import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dae.errors import UsageError
from dae.losses.losses import SUPERVISED, contractive, ms_ssim, sparse_latents, total_variation

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


# Regularizers

COPIES, SEEDS = 400, 3


@pytest.mark.parametrize("activation", [tf.identity, tf.tanh])
def test_contractive_is_an_unbiased_estimate_of_the_squared_norm_of_the_jacobian(activation, mnist):
    images = tf.constant(mnist.test.pixels[:2, ::4, ::4] / np.float32(255))
    matrix = tf.constant(np.random.default_rng(0).normal(0, 0.5, (49, 6)), tf.float32)

    def encode(noisy):
        return tf.reshape(activation(tf.reshape(noisy, [-1, 49]) @ matrix), [-1, 1, 2, 3])

    with tf.GradientTape() as tape:
        tape.watch(images)
        latents = encode(images)
    jacobian = tape.batch_jacobian(latents, images).numpy()
    expected = np.square(jacobian).sum((1, 2, 3, 4, 5, 6)) / 6
    # Each copy of an image has its own probe.
    copies = tf.repeat(images, COPIES, axis=0)
    estimates = [
        contractive(noisy=copies, encode=encode, seed=tf.constant([seed, 7], tf.int64)) for seed in range(SEEDS)
    ]
    values = np.stack(estimates, axis=1).reshape(2, COPIES * SEEDS)
    standard_errors = values.std(axis=1) / (COPIES * SEEDS) ** 0.5
    assert (standard_errors < 0.06 * expected).all()
    assert (np.abs(values.mean(axis=1) - expected) < 4 * standard_errors).all()


def test_contractive_is_a_function_of_the_seed_and_has_a_gradient_with_respect_to_the_encoder():
    images, scale = tf.constant(np.random.default_rng(0).random((1, 7, 7, 1)), tf.float32), tf.Variable(3.0)

    def value(seed):
        return contractive(noisy=images, encode=lambda x: scale * tf.square(x), seed=tf.constant([0, seed], tf.int64))

    with tf.GradientTape() as tape:
        first = value(1)
    # |s v|^2 / n is quadratic in s.
    assert float(tape.gradient(first, scale)) == pytest.approx(2 * float(first[0]) / 3, rel=1e-5)
    assert value(1).numpy() == first.numpy() != value(2).numpy()


@pytest.mark.parametrize("shape", [(3, 4, 4, 8), (3, 10)])
def test_sparse_latents_is_the_mean_magnitude_of_each_images_latents(shape):
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = np.abs(latents).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(sparse_latents(latents=tf.constant(latents)), expected, rtol=1e-5)
