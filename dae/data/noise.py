"""Noise models: pure functions `(clean, level, seed) -> noisy`.

`clean` is float32 [batch, H, W, C] in [0, 1]; `level` is a number from 0 up, or float32 [batch, 1, 1, 1], one for each
image, and 0 changes nothing; `seed` is int64 of shape [2], and the same seed gives the same bits. Every value of an
image, that is every channel of every pixel, has noise of its own. The result may leave [0, 1]: clipping is the
pipeline's, by --clip-noise. To add a model, write a function and list it in `NOISES`, or name it as a file's:
--noise my_noise.py:my_noise.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dae import plugins
from dae.config import RunConfig
from dae.errors import UsageError

Noise = Callable[[tf.Tensor, float | tf.Tensor, tf.Tensor], tf.Tensor]


def gaussian(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + level * n, n standard normal. The level is the standard deviation, where black is 0 and white is 1.

    Leaves [0, 1]. Source: the tutorial, with level 0.5.
    """
    return clean + level * standard_normal(tf.shape(clean), seed)


def uniform(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + level * u, u uniform in [-1, 1). The level is the most that a value may change; deviation level / sqrt(3).

    Leaves [0, 1]. Source: the rounding noise of a coarse quantizer (Bennett 1948).
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

    Stays in [0, 1]. Source: Vincent et al. 2008, Extracting and Composing Robust Features with Denoising Autoencoders;
    there a fixed number of values, here each value on its own.
    """
    return tf.where(tf.random.stateless_uniform(tf.shape(clean), seed) < level, 0.0, clean)


def speckle(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """x + level * x * n, n standard normal: black stays black. The level is the deviation of a white value.

    Leaves [0, 1]. Source: scikit-image's `random_noise(mode="speckle")`.
    """
    return clean + level * clean * standard_normal(tf.shape(clean), seed)


def poisson(clean: tf.Tensor, level: float | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """level * k, k Poisson with mean x / level: shot noise. The level is 1 / (photons counted where it is white).

    A value x has mean x and deviation sqrt(level * x): black stays black. Rises above 1. Source: Hasinoff 2014, Photon,
    Poisson Noise.
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
    """Poisson numbers, float32, of means below 20: how many cumulated probabilities a uniform number exceeds.

    Source: Devroye 1986, Non-Uniform Random Variate Generation, X.3.3, inversion by sequential search; with whole
    tensors it takes less than half of the time of TensorFlow's sampler where no value is black.
    """
    u = tf.random.stateless_uniform(tf.shape(mean), seed)

    def unfinished(k: tf.Tensor, probability: tf.Tensor, cumulated: tf.Tensor, counts: tf.Tensor) -> tf.Tensor:
        return tf.reduce_any(u > cumulated)

    def add_one(k: tf.Tensor, probability: tf.Tensor, cumulated: tf.Tensor, counts: tf.Tensor) -> tuple:
        counts += tf.cast(u > cumulated, tf.float32)
        probability *= mean / (k + 1)
        return k + 1, probability, cumulated + probability, counts

    none = tf.exp(-mean)
    # The bound, which means below 20 do not reach, is for sums that rounding keeps below the largest u.
    start = (0.0, none, none, tf.zeros_like(mean))
    return tf.while_loop(unfinished, add_one, start, maximum_iterations=64)[3]


def standard_normal(shape: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Standard normal numbers, float32, of any `shape`, none beyond 5.7. Source: Box and Muller (1958).

    TensorFlow's `stateless_normal` is the same method number by number; with whole tensors it takes 0.55 of the
    time, which is 3 % of a training step's.
    """
    size = tf.reduce_prod(shape)
    uniform = tf.random.stateless_uniform([2, (size + 1) // 2], seed)
    radius, angle = tf.sqrt(-2.0 * tf.math.log(1.0 - uniform[0])), 2.0 * math.pi * uniform[1]
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=0)
    return tf.reshape(pairs[:size], shape)


NOISES: dict[str, Noise] = {
    function.__name__: function for function in (gaussian, uniform, salt_pepper, masking, speckle, poisson)
}
# Where the level is a probability. Elsewhere it may be any number from 0 up.
HIGHEST_LEVEL = {"salt_pepper": 1.0, "masking": 1.0}


def named(name: str, highest_level: float) -> Noise:
    """The noise model that `name` names; raises UsageError where there is none, or none with so high a level."""
    noise = plugins.choose(NOISES, name, "--noise")
    if name in HIGHEST_LEVEL and highest_level > HIGHEST_LEVEL[name]:
        raise UsageError(
            f"--noise-level: {highest_level} is not from 0 to {HIGHEST_LEVEL[name]:g}, as a level of {name} must be"
        )
    return noise


def check(config: RunConfig, image_shape: tuple[int, int, int]) -> None:
    """Raises UsageError unless the noise of `config` makes finite float32 images of the same shape, here of grey.

    A function of the user's own must do so in a graph too, for any number of images, and the same there.
    """
    low, high = config.noise_range
    noise, name = named(config.noise, high), f"--noise {config.noise}"
    clean, seed = tf.fill((2, *image_shape), 0.5), tf.constant([0, 1], tf.int64)
    level = low if low == high else tf.reshape(tf.constant([low, high]), (2, 1, 1, 1))
    file = next((one.path for one in plugins.references(config.noise)), "")
    with plugins.blaming(name, file):
        noisy = tf.convert_to_tensor(noise(clean, level, seed))
    if noisy.shape != clean.shape or noisy.dtype != tf.float32:
        raise UsageError(f"{name}: returns {noisy.dtype.name} {list(noisy.shape)} for float32 {list(clean.shape)}")
    if not bool(tf.reduce_all(tf.math.is_finite(noisy))):
        raise UsageError(f"{name}: is not finite for grey images and --noise-level {config.noise_level}")
    if file:

        @tf.function(input_signature=[tf.TensorSpec([None, *image_shape]), tf.TensorSpec([2], tf.int64)])
        def in_graph(clean: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
            return noise(clean, level, seed)

        with plugins.blaming(name, file):
            same = np.allclose(in_graph(clean, seed), noisy, 1e-3, 1e-5)
        if not same:
            raise UsageError(
                f"{name}: is not the same in a graph as line by line; it is to be a function of clean, level and seed "
                "alone, without random numbers of its own, NumPy or state"
            )
