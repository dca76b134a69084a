"""Losses: functions `(clean, denoised) -> loss [batch]`, one value per example.

`clean` and `denoised` are float32 [batch, H, W, C], with H and W at least 11, in [0, 1]; `denoised` can leave it if the
network is not bounded. Every gradient is finite. The train step takes the mean over the batch. A loss may declare
further inputs as keyword-only parameters, listed in `composite.INPUTS`. Write your own in any file (docs/losses.md), or
add one here and to `SUPERVISED` or `REGULARIZERS`.
"""

import math
from collections.abc import Callable

import keras
import tensorflow as tf

from dae.losses.self_supervised import neighbor2neighbor, noise2noise, noise2void, recorrupted, sure
from dae.losses.ssim import multiscale_ssim
from dae.losses.ssim import ssim as structural_similarity

Loss = Callable[..., tf.Tensor]
"""A function of images, and perhaps of further inputs, that returns one value per image, float32 [batch]."""


def bce(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Binary cross-entropy, -(x log y + (1 - x) log(1 - y)), mean over pixels: in nats per pixel, >= 0.

    Its minimum over y is at y = x, where it is the entropy of x: greater than 0 for grey pixels. Source: Keras, which
    computes it from the logits if y is the output of a sigmoid, and otherwise clips y to [1e-7, 1 - 1e-7] (so that the
    loss is at most 16.2).
    """
    return tf.reduce_mean(keras.losses.binary_crossentropy(clean, denoised), axis=[1, 2])


def mse(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Squared error (x - y)^2, mean over pixels: in [0, 1]. Source: Keras."""
    return tf.reduce_mean(keras.losses.mean_squared_error(clean, denoised), axis=[1, 2])


def mae(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Absolute error |x - y|, mean over pixels: in [0, 1]. Source: Keras."""
    return tf.reduce_mean(keras.losses.mean_absolute_error(clean, denoised), axis=[1, 2])


HUBER_DELTA = 0.1  # with Keras's default of 1, images in [0, 1] would never reach the linear part


def huber(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """e^2 / 2 if e = |x - y| <= d = 0.1, else d (e - d / 2), mean over pixels: in [0, 0.095].

    Source: Keras; Huber, Robust Estimation of a Location Parameter (1964).
    """
    return tf.reduce_mean(keras.losses.huber(clean, denoised, delta=HUBER_DELTA), axis=[1, 2])


CHARBONNIER_EPSILON = 1e-3


def charbonnier(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """sqrt((x - y)^2 + 0.001^2), mean over pixels: a smooth |x - y|, in [0.001, 1.000001].

    Source: Charbonnier et al., Two Deterministic Half-Quadratic Regularization Algorithms (1994); the constant is that
    of Lai et al., Fast and Accurate Image Super-Resolution with Deep Laplacian Pyramid Networks (2018).
    """
    return tf.reduce_mean(tf.sqrt(tf.square(clean - denoised) + CHARBONNIER_EPSILON**2), axis=[1, 2, 3])


def ssim(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """1 - SSIM, the structural dissimilarity of each image: in [0, 2], 0 if equal. Source: dae/losses/ssim.py."""
    return 1 - structural_similarity(clean, denoised)


def ms_ssim(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """1 - MS-SSIM, the structural dissimilarity at five scales: in [0, 1], 0 if equal.

    For sides of at least 161 pixels. Source: dae/losses/ssim.py.
    """
    return 1 - multiscale_ssim(clean, denoised)


def edges(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """|d(x - y)/drow| + |d(x - y)/dcolumn|, divided by 2, mean over pixels: in [0, 1]; blind to the mean brightness.

    Source: the gradient term of Eigen and Fergus, Predicting Depth, Surface Normals and Semantic Labels (2015), with
    absolute instead of squared differences.
    """
    rows, columns = tf.image.image_gradients(clean - denoised)
    return tf.reduce_mean(tf.abs(rows) + tf.abs(columns), axis=[1, 2, 3]) / 2


def frequency(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """||X| - |Y||, divided by sqrt(H W), mean over the frequencies of `tf.signal.rfft2d`: >= 0.

    Blind to phases, and so to the position of what it sees. Source: the amplitude term of Fuoli, Van Gool and Timofte,
    Fourier Space Losses for Efficient Perceptual Image Super-Resolution (2021).
    """

    def magnitudes(images: tf.Tensor) -> tf.Tensor:
        pixels = images.shape[1] * images.shape[2]
        return tf.abs(tf.signal.rfft2d(tf.transpose(images, [0, 3, 1, 2]))) / pixels**0.5

    return tf.reduce_mean(tf.abs(magnitudes(clean) - magnitudes(denoised)), axis=[1, 2, 3])


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


SUPERVISED: dict[str, Loss] = {
    function.__name__: function for function in (bce, mse, mae, huber, charbonnier, ssim, ms_ssim, edges, frequency)
}
REGULARIZERS: dict[str, Loss] = {
    function.__name__: function for function in (total_variation, sparse_latents, contractive)
}
SELF_SUPERVISED: dict[str, Loss] = {
    function.__name__: function for function in (noise2noise, noise2void, neighbor2neighbor, sure, recorrupted)
}
LOSSES = SUPERVISED | REGULARIZERS | SELF_SUPERVISED
