"""Regularizers: losses that never see the clean images, to be added to another loss with a small weight."""

import math
from collections.abc import Callable

import tensorflow as tf


def total_variation(denoised: tf.Tensor) -> tf.Tensor:
    """(|dy/drow| + |dy/dcolumn|), sum over pairs of neighbouring pixels, divided by the number of pixels: in [0, 2].

    Flat areas cost nothing, noise and edges do. Source: `tf.image.total_variation`; Rudin, Osher and Fatemi, Nonlinear
    Total Variation Based Noise Removal Algorithms (1992), in its anisotropic form.
    """
    return tf.image.total_variation(denoised) / math.prod(denoised.shape[1:])


def sparse_latents(*, latents: tf.Tensor) -> tf.Tensor:
    """|h|, mean over the latents h: >= 0; makes more of them 0.

    Source: the L1 penalty of Goodfellow, Bengio and Courville, Deep Learning (2016), section 14.2.1.
    """
    return tf.reduce_mean(tf.abs(latents), axis=range(1, len(latents.shape)))


def contractive(*, noisy: tf.Tensor, encode: Callable[[tf.Tensor], tf.Tensor], seed: tf.Tensor) -> tf.Tensor:
    """||J||^2 / n, the squared Frobenius norm of the Jacobian J of n latents with respect to the noisy pixels: >= 0.

    Estimated without bias as |v J|^2 / n, with one standard normal v for each image and step. Source: Rifai et al.,
    Contractive Auto-Encoders (2011); the estimate is Hutchinson's (1989).
    """
    with tf.GradientTape() as tape:
        tape.watch(noisy)
        latents = encode(noisy)
    probe = tf.random.stateless_normal(tf.shape(latents), seed)
    gradient = tape.gradient(latents, noisy, output_gradients=probe)
    return tf.reduce_sum(tf.square(gradient), axis=[1, 2, 3]) / math.prod(latents.shape[1:])
