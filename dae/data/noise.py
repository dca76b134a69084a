"""Noise models: pure functions `(clean, level, seed) -> noisy`.

`clean` is float32 [batch, H, W, C] in [0, 1]; `level` is a number >= 0, or float32 [batch, 1, 1, 1] with one per image,
and 0 changes nothing; `seed` is int64 of shape [2], and the same seed gives the same bits. Each value of an image (each
channel of each pixel) is drawn independently. The result may leave [0, 1]: the pipeline clips it, if --clip-noise says
so. Write your own in any file (docs/data.md), or add one here and to `NOISES`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dae import plugins
from dae.config import DEFAULT_NOISE_LEVEL, RunConfig
from dae.data.images import Images
from dae.errors import UsageError

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

    def unfinished(k: tf.Tensor, probability: tf.Tensor, cumulative: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any(u > cumulative)

    def add_one(k: tf.Tensor, probability: tf.Tensor, cumulative: tf.Tensor, counts: tf.Tensor) -> tuple:
        counts += tf.cast(u > cumulative, tf.float32)
        probability *= mean / (k + 1)
        return k + 1, probability, cumulative + probability, counts

    zero = tf.exp(-mean)
    # Means below 20 stay below the bound, which ends the loop where rounding keeps the sum below the largest u.
    start = (0.0, zero, zero, tf.zeros_like(mean))
    return tf.while_loop(unfinished, add_one, start, maximum_iterations=64)[3]


def standard_normal(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return standard normal numbers, float32, of any `shape`, none beyond 5.7. Source: Box and Muller (1958).

    `tf.random.stateless_normal` applies the same method to one number at a time and takes 1.6 times as long; with it, a
    training step of `conv` takes 6 % longer.
    """
    size = tf.reduce_prod(shape)
    uniform = tf.random.stateless_uniform([2, (size + 1) // 2], seed)
    radius, angle = tf.sqrt(-2.0 * tf.math.log(1.0 - uniform[0])), 2.0 * math.pi * uniform[1]
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=0)
    return tf.reshape(pairs[:size], shape)


def unchanged(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Return the clean images, as all of NOISES do at level 0."""
    return clean


NOISES: dict[str, Noise] = {
    function.__name__: function for function in (gaussian, uniform, salt_pepper, masking, speckle, poisson)
}
# Models whose level is a probability; elsewhere it can be any number >= 0.
MAX_LEVEL = {"salt_pepper": 1.0, "masking": 1.0}
# Above it, clipped noise leaves hardly anything of an image; it is then a level for images from 0 to 255.
MAX_PLAUSIBLE_LEVEL = 2.0
_LIKELY_LEVELS: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(
        ("gaussian", "uniform", "speckle"),
        lambda level: f"black is 0 and white 1; {level:g} of 255 is {level / 255:.3g}",
    ),
    "poisson": lambda level: f"the level is 1 / photons; for {level:g} photons it is {1 / level:.3g}",
}


def with_noise_level(config: RunConfig, images: Images) -> RunConfig:
    """Return `config` with the noise level filled in: that of the tutorial, or 0 for pairs, which are noisy already.

    Raises UsageError if `config` names another noise model for pairs, but no level.
    """
    if config.noise_level is not None:
        return config
    if images.is_paired and config.noise != RunConfig.noise:
        raise UsageError(f"--noise: {config.noise} for images that are noisy already needs its --noise-level")
    return dataclasses.replace(config, noise_level=0.0 if images.is_paired else DEFAULT_NOISE_LEVEL)


def build(name: str, highest_level: float) -> Noise:
    """Return the noise model that `name` names. Raises UsageError if there is none, or none with so high a level."""
    noise = plugins.load(NOISES, name, "--noise")
    if name in MAX_LEVEL and highest_level > MAX_LEVEL[name]:
        raise UsageError(f"--noise-level: expected 0 to {MAX_LEVEL[name]:g} for {name}, got {highest_level}")
    return noise


def check(config: RunConfig, image_shape: tuple[int, int, int]) -> None:
    """Check the noise of `config` on grey images: finite float32 images of the same shape.

    A user's function must also give the same images in a graph as in eager mode. Raises UsageError if the
    noise breaks one of these rules.
    """
    low, high = config.noise_range
    if config.noise in _LIKELY_LEVELS and high > MAX_PLAUSIBLE_LEVEL:
        problem = f"--noise-level: {high:g} for {config.noise}, where {_LIKELY_LEVELS[config.noise](high)}"
        if config.clip_noise:
            raise UsageError(f"{problem}; expected at most {MAX_PLAUSIBLE_LEVEL:g}, or --no-clip-noise")
        print(f"warning: {problem}", file=sys.stderr)
    noise, prefix = build(config.noise, high), f"--noise {plugins.source(config.noise)}"
    clean, seed = tf.fill((2, *image_shape), 0.5), tf.constant([0, 1], tf.int64)
    level = low if low == high else tf.reshape(tf.constant([low, high]), (2, 1, 1, 1))
    file = plugins.file_of(noise)
    with plugins.errors_with_line(prefix, file):
        noisy = tf.convert_to_tensor(noise(clean, level, seed))
    if noisy.shape != clean.shape or noisy.dtype != tf.float32:
        raise UsageError(f"{prefix}: expected float32 {list(clean.shape)}, got {noisy.dtype.name} {list(noisy.shape)}")
    if not bool(tf.reduce_all(tf.math.is_finite(noisy))):
        raise UsageError(f"{prefix}: is not finite for grey images and --noise-level {config.noise_level}")
    if config.noise not in NOISES:

        @tf.function(input_signature=[tf.TensorSpec([None, *image_shape]), tf.TensorSpec([2], tf.int64)])
        def in_graph(clean: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return noise(clean, level, seed)

        with plugins.errors_with_line(prefix, file):
            equal = np.allclose(in_graph(clean, seed), noisy, 1e-3, 1e-5)
        if not equal:
            raise UsageError(
                f"{prefix}: differs between a graph and eager mode; it must depend only on clean, level and seed, "
                "without other random numbers, NumPy or state"
            )
