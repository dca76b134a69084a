"""Losses that need no clean image. Their minimum is that of `mse`, if the noise is what they assume.

Clipping gives noise a mean other than zero (at level 0.5 a black pixel becomes 0.195 on average), which they would
learn, so all of them reject clipped noise.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from dae.config import RunConfig
from dae.errors import UsageError

Denoise = Callable[[tf.Tensor], tf.Tensor]

# With these built-in noise models, the mean of a noisy pixel is the clean pixel; for a user's, the user must know.
NOT_ZERO_MEAN = ("salt_pepper", "masking")


def noise2noise(denoised: tf.Tensor, *, second_noisy: tf.Tensor, config: RunConfig) -> tf.Tensor:
    """(d - y')^2, mean over pixels, where y' is a second noisy copy of the image: MSE plus the variance of the noise.

    For noise of mean zero that is not clipped. Source: Lehtinen et al., Noise2Noise (2018).
    """
    _check_noise("noise2noise", config)
    return tf.reduce_mean(tf.square(denoised - second_noisy), axis=[1, 2, 3])


def noise2void(*, noisy: tf.Tensor, denoise: Denoise, seed: tf.Tensor, config: RunConfig) -> tf.Tensor:
    """(f(m) - y)^2, mean over masked pixels, where m is y with each masked pixel replaced by a random neighbour.

    Every second pixel of every second row is masked, from a random start. The network f does not see the noise of a
    masked pixel, and so predicts its mean. For noise of mean zero that is independent between pixels and not clipped.
    Source: Krull, Buchholz and Jug, Noise2Void (2019), with the grid of Batson and Royer, Noise2Self (2019): no masked
    pixel is the neighbour of another, which would then show its noise.
    """
    _check_noise("noise2void", config)
    return masked_error(noisy, denoise, seed)


def masked_error(noisy: tf.Tensor, denoise: Denoise, seed: tf.Tensor) -> tf.Tensor:
    """Return the value of `noise2void` for images [batch, H, W, C]: float32 [batch]."""
    start_seed, neighbour_seed = tf.unstack(tf.random.split(seed, 2))
    batch, height, width, _ = tf.unstack(tf.shape(noisy))
    start = tf.random.stateless_uniform((2, batch, 1, 1, 1), start_seed, 0, 2, tf.int32)
    rows, columns = tf.range(height)[:, None, None], tf.range(width)[:, None]
    masked = ((rows + start[0]) % 2 == 0) & ((columns + start[1]) % 2 == 0)
    offsets = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column]
    neighbours = tf.stack([tf.roll(noisy, offset, axis=[1, 2]) for offset in offsets])
    choice = tf.random.stateless_uniform(tf.shape(masked), neighbour_seed, 0, len(offsets), tf.int32)
    neighbour = tf.reduce_sum(tf.one_hot(choice, len(offsets), axis=0) * neighbours, axis=0)
    error = tf.where(masked, denoise(tf.where(masked, neighbour, noisy)) - noisy, 0.0)
    fraction = tf.reduce_mean(tf.cast(masked, tf.float32), axis=[1, 2, 3])
    return tf.reduce_mean(tf.square(error), axis=[1, 2, 3]) / fraction


# A probe as large as the noise lets a network without bounds find differences that are no derivatives, and the loss
# then falls without end; with a probe of 0.02 times the noise level, preset `fast` (seed 0) ends 2 dB lower.
PROBE_STEP, MIN_PROBE_LEVEL = 0.2, 0.01


def sure(
    denoised: tf.Tensor,
    *,
    noisy: tf.Tensor,
    noise_level: tf.Tensor,
    denoise: Denoise,
    seed: tf.Tensor,
    config: RunConfig,
) -> tf.Tensor:
    """(d - y)^2 - s^2 + 2 s^2 df/dy, mean over pixels, for noise of standard deviation s: an unbiased estimate of MSE.

    The divergence of the network f is estimated as b (f(y + e b) - f(y)) / e, with random signs b and e = s / 5, at
    least 0.002. For Gaussian noise that is not clipped. Source: Stein, Estimation of the Mean of a Multivariate Normal
    Distribution (1981); the estimate is that of Ramani, Blu and Unser, Monte-Carlo SURE (2008).
    """
    _check_noise("sure", config, only_gaussian=True)
    probe = tf.sign(tf.random.stateless_uniform(tf.shape(noisy), seed, -1.0, 1.0))
    step = PROBE_STEP * tf.maximum(noise_level, MIN_PROBE_LEVEL)
    divergence = probe * (denoise(noisy + step * probe) - denoised) / step
    variance = tf.square(noise_level)
    return tf.reduce_mean(tf.square(denoised - noisy) - variance + 2 * variance * divergence, axis=[1, 2, 3])


RECORRUPTION = 0.5


def recorrupted(
    *, noisy: tf.Tensor, noise_level: tf.Tensor, denoise: Denoise, seed: tf.Tensor, config: RunConfig
) -> tf.Tensor:
    """(f(y + a n) - (y - n / a))^2, mean over pixels, with new noise n of the level of the noise in y, and a = 0.5.

    Both images have independent noise, so this is MSE plus a constant. For Gaussian noise that is not clipped. Source:
    Pang, Zheng, Quan and Ji, Recorrupted-to-Recorrupted (2021).
    """
    _check_noise("recorrupted", config, only_gaussian=True)
    added = noise_level * tf.random.stateless_normal(tf.shape(noisy), seed)
    error = denoise(noisy + RECORRUPTION * added) - (noisy - added / RECORRUPTION)
    return tf.reduce_mean(tf.square(error), axis=[1, 2, 3])


def neighbor2neighbor(
    denoised: tf.Tensor, *, noisy: tf.Tensor, denoise: Denoise, seed: tf.Tensor, config: RunConfig
) -> tf.Tensor:
    """e^2 + r^2, mean over pixels, of two halves a and b of the noisy image y: e = f(a) - b, r = e - (f(y)_a - f(y)_b).

    Of each 2 x 2 pixels, a random one is in a, and one beside it in b. The network f predicts each from its neighbour,
    whose noise is independent; r corrects for the difference between the two, and has no gradient through f(y). For
    noise of mean zero that is independent between pixels and not clipped. The identity has a low loss, so a lower one
    need not be better. Source: Huang et al., Neighbor2Neighbor (2021), with the weight 1 for r^2.
    """
    _check_noise("neighbor2neighbor", config)
    batch, height, width, channels = keras.ops.shape(noisy)  # numbers if the graph knows the shape
    pair = tf.random.stateless_uniform([batch, height // 2, width // 2], seed, 0, len(_NEIGHBOURS), tf.int32)

    def halves(images: tf.Tensor) -> list[tf.Tensor]:
        cropped = images[:, : height // 2 * 2, : width // 2 * 2]
        cells = tf.reshape(cropped, [batch, height // 2, 2, width // 2, 2, channels])
        cells = tf.reshape(tf.transpose(cells, [0, 1, 3, 2, 4, 5]), [batch, height // 2, width // 2, 4, channels])
        chosen = tf.one_hot(tf.gather(_NEIGHBOURS, pair), 4)  # [batch, H / 2, W / 2, half, 4]
        return tf.unstack(tf.einsum("bhwnp,bhwpc->nbhwc", chosen, cells))

    (first, second), (full_first, full_second) = halves(noisy), halves(tf.stop_gradient(denoised))
    error = denoise(first) - second
    correction = error - (full_first - full_second)
    return tf.reduce_mean(tf.square(error) + tf.square(correction), axis=[1, 2, 3])


# Two pixels of 2 x 2, numbered by rows, that have a side in common, in either order.
_NEIGHBOURS = ((0, 1), (0, 2), (1, 0), (1, 3), (2, 0), (2, 3), (3, 1), (3, 2))


def _check_noise(name: str, config: RunConfig, only_gaussian: bool = False) -> None:
    if config.clip_noise and not config.only_noisy:
        raise UsageError(f"--loss: {name}: assumes noise of mean zero, which clipping shifts; add --no-clip-noise")
    if config.noise in NOT_ZERO_MEAN or (only_gaussian and config.noise != "gaussian"):
        raise UsageError(f"--loss: {name}: its formula does not hold for {config.noise} noise; use --noise gaussian")
