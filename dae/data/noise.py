"""Noise models: pure functions `(clean, level, seed) -> noisy`.

`clean` is float32 [batch, H, W, C] in [0, 1]; `level` is a number >= 0, or float32 [batch, 1, 1, 1] with one per image,
and 0 changes nothing; `seed` is int64 of shape [2], and the same seed gives the same bits. Each value of an image (each
channel of each pixel) is drawn independently. The result may leave [0, 1]: the pipeline clips it, if --clip-noise says
so. Write your own in any file (docs/data.md), or add one here and to `NOISES`.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dae import plugins
from dae.config import RunConfig
from dae.errors import UsageError, warn

Noise = Callable[[tf.Tensor, float | tf.Tensor, tf.Tensor], tf.Tensor]


def gaussian(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + level * n, n standard normal. The level is the standard deviation.

    Leaves [0, 1]. Source: the tutorial, with level 0.5.
    """
    return clean + level * standard_normal(tf.shape(clean), seed)


def uniform(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + level * u, u uniform in [-1, 1). The level is the largest change; the standard deviation is level / sqrt(3).

    Leaves [0, 1]. Source: the rounding noise of a quantizer (Bennett 1948).
    """
    return clean + level * tf.random.stateless_uniform(tf.shape(clean), seed, -1.0, 1.0)


def salt_pepper(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """0 or 1, each with probability level / 2, else x. The level is the probability of a change, in [0, 1].

    Stays in [0, 1]. Source: Gonzalez and Woods, Digital Image Processing, "impulse noise".
    """
    u = tf.random.stateless_uniform(tf.shape(clean), seed)
    return tf.where(u < level / 2, 0.0, tf.where(u < level, 1.0, clean))


def masking(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """0 with probability level, else x. The level is that probability, in [0, 1].

    Stays in [0, 1]. Source: Vincent et al., Extracting and Composing Robust Features with Denoising Autoencoders
    (2008), who mask a fixed number of values; here each value is masked independently.
    """
    return tf.where(tf.random.stateless_uniform(tf.shape(clean), seed) < level, 0.0, clean)


def speckle(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + level * x * n, n standard normal: black stays black. The level is the standard deviation at white.

    Leaves [0, 1]. Source: scikit-image's `random_noise(mode="speckle")`.
    """
    return clean + level * clean * standard_normal(tf.shape(clean), seed)


def poisson(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """level * k, k Poisson with mean x / level: shot noise. The level is 1 / (photons counted at white).

    A value x has mean x and standard deviation sqrt(level * x): black stays black. Exceeds 1. Source: Hasinoff, Photon,
    Poisson Noise (2014).
    """
    level = tf.convert_to_tensor(level, tf.float32)
    divisor = tf.where(level > 0, level, 1.0)
    mean = clean / divisor
    counts = tf.cond(
        tf.reduce_max(mean) < 20,
        lambda: small_poisson(mean, seed),
        lambda: tf.random.stateless_poisson(tf.shape(mean), seed, mean, tf.float32),
    )
    return tf.where(level > 0, divisor * counts, clean)


def small_poisson(mean: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return Poisson numbers, float32, with means below 20: how many cumulative probabilities a uniform number exceeds.

    Source: Devroye, Non-Uniform Random Variate Generation (1986), X.3.3, inversion by sequential search. On whole
    tensors, for MNIST at levels 0.1 and 0.5, it takes 0.5 and 0.4 of the time of TensorFlow's sampler, which draws one
    number at a time and would make a training step of `conv` about a fifth longer.
    """
    u = tf.random.stateless_uniform(tf.shape(mean), seed)

    def add_one(k: tf.Tensor, probability: tf.Tensor, cumulative: tf.Tensor, counts: tf.Tensor) -> tuple:
        counts += tf.cast(u > cumulative, tf.float32)
        probability *= mean / (k + 1)
        return k + 1, probability, cumulative + probability, counts

    zero = tf.exp(-mean)
    # Means below 20 stay below the bound, which ends the loop where rounding keeps the sum below the largest u.
    start = (0.0, zero, zero, tf.zeros_like(mean))
    return tf.while_loop(
        lambda k, p, cumulative, n: tf.reduce_any(u > cumulative), add_one, start, maximum_iterations=64
    )[3]


@tf.autograph.experimental.do_not_convert
def standard_normal(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return standard normal numbers, float32, of any `shape`, none beyond 5.7. Source: Box and Muller (1958).

    `tf.random.stateless_normal`, which draws one number at a time, makes a training step of `conv` 6 % longer.
    """
    size = tf.reduce_prod(shape)
    uniform = tf.random.stateless_uniform([2, (size + 1) // 2], seed)
    radius, angle = tf.sqrt(-2.0 * tf.math.log(1.0 - uniform[0])), 2.0 * math.pi * uniform[1]
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=0)
    return tf.reshape(pairs[:size], shape)


NOISES: dict[str, Noise] = {
    function.__name__: function for function in (gaussian, uniform, salt_pepper, masking, speckle, poisson)
}
# Models whose level is a probability; elsewhere it can be any number >= 0.
MAX_LEVEL = {"salt_pepper": 1.0, "masking": 1.0}
# The level for clean images, that of the tutorial.
DEFAULT_LEVEL = 0.5
# A higher level leaves hardly anything of an image, and is probably meant for images from 0 to 255.
MAX_PLAUSIBLE_LEVEL = 2.0


def level_range(config: RunConfig, is_paired: bool) -> tuple[float, float]:
    """Return the lowest and the highest noise level of `config`; equal if there is one level.

    By default that is the tutorial's level, or 0 for pairs, whose noisy images exist. Raises UsageError if `config`
    names another noise model for pairs, but no level.
    """
    if config.noise_level is not None:
        level = config.noise_level
    elif is_paired and config.noise != RunConfig.noise:
        raise UsageError(f"--noise: {config.noise} for images that are noisy already needs its --noise-level")
    else:
        level = 0.0 if is_paired else DEFAULT_LEVEL
    return level if isinstance(level, tuple) else (level, level)


def corruption(config: RunConfig, highest_level: float) -> Noise:
    """Return the noise model of `config`, followed by clipping to [0, 1] if `config` says so."""
    add_noise: Noise = plugins.load(NOISES, config.noise, "--noise")
    changes = highest_level > 0 or config.noise not in NOISES  # level 0 needs no random numbers
    clips = config.clip_noise and not config.only_noisy  # noise that is there already must keep its mean

    def corrupt(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        noisy = add_noise(clean, level, seed) if changes else clean
        return tf.clip_by_value(noisy, 0.0, 1.0) if clips else noisy

    return corrupt


def check(config: RunConfig, image_shape: tuple[int, int, int], levels: tuple[float, float]) -> None:
    """Check the noise of `config` at the lowest and highest of its `levels` on grey images.

    The levels must not exceed MAX_LEVEL, and it must return finite float32 images of the same shape; a user's function
    also the same ones in a graph as in eager mode. Otherwise UsageError is raised. Warns of a level that leaves hardly
    anything of the images.
    """
    (low, high), most = levels, MAX_LEVEL.get(config.noise, math.inf)
    if high > most:
        raise UsageError(f"--noise-level: expected 0 to {most:g} for {config.noise}, got {high}")
    if config.noise in NOISES.keys() - MAX_LEVEL and high > MAX_PLAUSIBLE_LEVEL:
        warn(
            f"--noise-level: {high:g} for {config.noise} leaves hardly anything of the images: black is 0 and white 1, "
            "and for poisson the level is 1 / photons"
        )
    noise, prefix = plugins.load(NOISES, config.noise, "--noise"), f"--noise {plugins.source(config.noise)}"
    clean, seed = tf.fill((2, *image_shape), 0.5), tf.constant([0, 1], tf.int64)
    level = low if low == high else tf.reshape(tf.constant([low, high]), (2, 1, 1, 1))

    @tf.function(input_signature=[tf.TensorSpec([None, *image_shape]), tf.TensorSpec([2], tf.int64)])
    def in_graph(clean: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        return noise(clean, level, seed)

    with plugins.errors_with_line(prefix, plugins.file_of(noise)):
        noisy = tf.convert_to_tensor(noise(clean, level, seed))
        again = noisy if config.noise in NOISES else in_graph(clean, seed)
    if noisy.shape != clean.shape or noisy.dtype != tf.float32:
        raise UsageError(f"{prefix}: expected float32 {list(clean.shape)}, got {noisy.dtype.name} {list(noisy.shape)}")
    if not np.isfinite(noisy).all():
        raise UsageError(f"{prefix}: is not finite for grey images and --noise-level {high:g}")
    if not np.allclose(again, noisy, 1e-3, 1e-5):
        raise UsageError(
            f"{prefix}: differs between a graph and eager mode; it must depend only on clean, level and seed, without "
            "other random numbers, NumPy or state"
        )
