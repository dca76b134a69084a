import numpy as np
import pytest
import tensorflow as tf
from helpers import objective, rejected

from dae.config import RunConfig
from dae.data.pipeline import Batch, batch_maker
from dae.losses.losses import SELF_SUPERVISED, mse
from dae.losses.self_supervised import RECORRUPTION, noise2void
from dae.models.fused_layers import Outputs

UNCLIPPED = RunConfig(clip_noise=False, noise_level=0.4)
KERNEL = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32)[:, :, None, None] / 16
DRAWS = 40


def blur(images):
    return tf.nn.conv2d(images, KERNEL, 1, "SAME")


def curved(images):
    """A network that is not linear, and whose denoised pixels depend on their own noise."""
    return tf.sigmoid(4 * blur(images) - 1)


def noisy_batches(mnist, config: RunConfig) -> list[Batch]:
    """Return the same digits with many draws of noise and of seeds."""
    make_batch, pixels = batch_maker(mnist.test, config), tf.constant(mnist.test.pixels[:50])
    return [make_batch(pixels, tf.constant(number, tf.int64)) for number in range(DRAWS)]


def values_of(name: str, config: RunConfig, denoise, batch: Batch) -> np.ndarray:
    _, values = objective(name, config)(lambda images: Outputs(denoise(images), None), batch)
    return values["loss"].numpy()


def check_mean_is_zero(differences: list[np.ndarray], largest_error: float) -> None:
    """Assert that the mean over draws is 0 within four standard errors, and that these are small."""
    means = np.mean(differences, axis=1)  # over images; independent between draws
    standard_error = means.std(ddof=1) / len(means) ** 0.5
    assert standard_error < largest_error
    assert abs(means.mean()) < 4 * standard_error


@pytest.mark.parametrize(("denoise", "level"), [(blur, 0.4), (curved, (0.1, 0.7))])
def test_sure_is_an_unbiased_estimate_of_the_mse(denoise, level, mnist):
    config = RunConfig(clip_noise=False, noise_level=level)
    batches = noisy_batches(mnist, config)
    exact = [mse(batch.clean, denoise(batch.noisy)).numpy() for batch in batches]
    differences = [
        values_of("sure", config, denoise, batch) - errors for batch, errors in zip(batches, exact, strict=True)
    ]
    # Without the term of the divergence, the mean would be wrong by more than the MSE of these networks.
    check_mean_is_zero(differences, 0.02 * np.mean(exact))


# The variance of each noise at a pixel x.
VARIANCES = {
    "gaussian": lambda x, level: level**2 + 0 * x,
    "uniform": lambda x, level: level**2 / 3 + 0 * x,
    "speckle": lambda x, level: (level * x) ** 2,
    "poisson": lambda x, level: level * x,
}


@pytest.mark.parametrize("noise", VARIANCES)
def test_noise2noise_exceeds_the_mse_by_the_variance_of_the_noise(noise, mnist):
    """So the noise of `second_noisy` has the level of each image, and is independent of that of `noisy`."""
    config = RunConfig(clip_noise=False, noise=noise, noise_level=(0.1, 0.7))
    differences = []
    for batch in noisy_batches(mnist, config):
        variance = VARIANCES[noise](batch.clean.numpy(), batch.noise_level.numpy()).mean((1, 2, 3))
        exact = mse(batch.clean, curved(batch.noisy)).numpy() + variance
        differences.append(values_of("noise2noise", config, curved, batch) - exact)
    check_mean_is_zero(differences, 0.01 * variance.mean())


def test_recorrupted_exceeds_the_mse_at_a_higher_level_by_a_constant(mnist):
    # f(y + a n) has noise of variance s^2 (1 + a^2); y - n / a has s^2 (1 + 1 / a^2), and both are uncorrelated.
    differences = []
    weights = tf.nn.conv2d(tf.ones((1, 28, 28, 1)), KERNEL**2, 1, "SAME").numpy().mean()  # |B|^2 / pixels
    for batch in noisy_batches(mnist, UNCLIPPED):
        bias = mse(batch.clean, blur(batch.clean)).numpy()
        expected = bias + 0.4**2 * ((1 + RECORRUPTION**2) * weights + 1 + 1 / RECORRUPTION**2)
        differences.append(values_of("recorrupted", UNCLIPPED, blur, batch) - expected)
    check_mean_is_zero(differences, 0.1 * 0.4**2 * weights)


def seen_by_the_network(noisy: tf.Tensor, seed: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return what `noise2void` shows to the network, and the loss if the network is the identity."""
    seen = []

    def denoise(images):
        seen.append(images)
        return images

    value = noise2void(noisy=noisy, denoise=denoise, seed=tf.constant([3, seed], tf.int64), config=UNCLIPPED)
    (masked,) = seen
    return masked, value


def test_noise2void_hides_each_masked_pixel_behind_one_of_its_neighbours(mnist):
    clean = mnist.test.pixels[:1, 8:20, 8:20] / np.float32(255)
    noisy = tf.constant(clean + np.random.default_rng(0).normal(0, 0.4, clean.shape).astype(np.float32))
    with tf.GradientTape() as tape:
        tape.watch(noisy)
        masked, _ = seen_by_the_network(noisy, 0)
    jacobian = tape.jacobian(masked, noisy).numpy().reshape(144, 144)
    is_masked = (masked != noisy).numpy().reshape(144)
    assert is_masked.sum() == 36
    # A masked pixel does not depend on its own noise, but on that of one other pixel; the others are unchanged.
    np.testing.assert_array_equal(np.diag(jacobian), 1 - is_masked)
    np.testing.assert_array_equal(np.sort(jacobian, axis=1)[:, -2:], np.tile([0, 1], (144, 1)))
    for pixel in np.flatnonzero(is_masked):
        rows, columns = np.divmod([pixel, jacobian[pixel].argmax()], 12)
        assert (rows[1] - rows[0]) % 12 in (0, 1, 11)
        assert (columns[1] - columns[0]) % 12 in (0, 1, 11)


def test_noise2void_draws_the_mask_from_the_seed(mnist):
    (batch, *_) = noisy_batches(mnist, UNCLIPPED)
    (first, value), (again, same_value), (second, second_value) = (
        seen_by_the_network(batch.noisy, seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(value, same_value)
    assert (value.numpy() != second_value.numpy()).all()
    first_mask, second_mask = ((images != batch.noisy).numpy() for images in (first, second))
    assert (first_mask & second_mask).mean() == pytest.approx(1 / 16, abs=0.03)  # independent
    assert (first_mask[0] != first_mask[1]).any()


def test_noise2void_hides_all_channels_of_a_pixel_behind_the_same_neighbour():
    noisy = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
    masked, _ = seen_by_the_network(tf.constant(np.concatenate([noisy, noisy + 10, noisy + 20], axis=3)), 0)
    np.testing.assert_allclose(masked - masked[..., :1], np.broadcast_to([0.0, 10.0, 20.0], masked.shape), atol=1e-5)


def test_noise2void_exceeds_the_mse_at_masked_pixels_by_the_variance_of_the_noise(mnist):
    differences = []
    for batch in noisy_batches(mnist, UNCLIPPED):
        seen: list[tf.Tensor] = []

        def denoise(images, seen=seen):
            seen.append(images)
            return curved(images)

        value = values_of("noise2void", UNCLIPPED, denoise, batch)
        masked = seen[-1]
        error = np.square(curved(masked) - batch.clean) + 0.4**2
        differences.append(value - np.where(masked != batch.noisy, error, 0).mean((1, 2, 3)) / 0.25)
    check_mean_is_zero(differences, 0.02 * 0.4**2)


@pytest.mark.parametrize(
    ("names", "config", "words"),
    [
        (SELF_SUPERVISED, RunConfig(), "--no-clip-noise"),
        (SELF_SUPERVISED, RunConfig(noise="salt_pepper", clip_noise=False), "salt_pepper"),
        (SELF_SUPERVISED, RunConfig(noise="masking", clip_noise=False), "masking"),
        (("sure", "recorrupted"), RunConfig(noise="poisson", clip_noise=False), "poisson noise; use --noise gaussian"),
    ],
)
def test_losses_reject_noise_for_which_they_are_wrong_in_one_line(names, config, words, mnist):
    batch = batch_maker(mnist.test, config)(tf.constant(mnist.test.pixels[:2]), tf.constant(0, tf.int64))
    for name in names:
        with rejected(f"--loss: {name}: ", words, match="--noise|--no-clip-noise"):
            values_of(name, config, blur, batch)


@pytest.mark.parametrize("sides", [(6, 8), (7, 9)])  # odd sides lose their last row and column
def test_neighbor2neighbor_equals_its_formula(sides):
    noisy = tf.random.stateless_uniform((2, *sides, 1), (1, 2))
    seed, height, width = tf.constant([3, 4], tf.int64), sides[0] // 2, sides[1] // 2
    draws = tf.random.stateless_uniform([2, height, width], seed, 0, 8, tf.int32).numpy()
    neighbours = ((0, 1), (0, 2), (1, 0), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2))
    full, halves = blur(noisy).numpy(), np.zeros((2, 2, 2, height, width))  # of noisy or denoised; first or second
    for image, row, column in np.ndindex(draws.shape):
        for half, pixel in enumerate(neighbours[draws[image, row, column]]):
            place = image, 2 * row + pixel // 2, 2 * column + pixel % 2, 0
            halves[:, half, image, row, column] = noisy[place], full[place]
    (first, second), (full_first, full_second) = halves
    error = blur(tf.constant(first[..., None], tf.float32)).numpy()[..., 0] - second
    correction = error - (full_first - full_second)
    expected = (error**2 + correction**2).mean(axis=(1, 2))
    values = SELF_SUPERVISED["neighbor2neighbor"](blur(noisy), noisy=noisy, denoise=blur, seed=seed, config=UNCLIPPED)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
