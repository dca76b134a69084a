"""Structural similarity, several times faster than TensorFlow's: the loss and the metric of that name."""

import numpy as np
import tensorflow as tf

WINDOW, SIGMA = 11, 1.5
# Larger images fall back to `tf.image.ssim`: the cost per pixel of the matrix products grows with the side.
MAX_SIDE = 256
# (0.01 L)^2 and (0.03 L)^2 for the range L = 1.
LUMINANCE_CONSTANT, CONTRAST_CONSTANT = 0.01**2, 0.03**2


def ssim(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Structural similarity of images [batch, H, W, C] in [0, 1], H and W at least 11: [batch] in [-1, 1], 1 if equal.

    The mean over all positions of an 11 x 11 Gaussian window with sigma 1.5, and over channels, as in `tf.image.ssim`
    with max_val 1. Source: Wang et al., Image Quality Assessment: From Error Visibility to Structural Similarity
    (2004). Accurate to 1e-5, in flat bright images to 1e-4, where TensorFlow's is less accurate.

    The window is applied as two matrix products. For MNIST that takes a seventh of the time of TensorFlow's
    convolution, and its gradient an eighteenth.
    """
    height, width, channels = clean.shape[1:]
    if max(height, width) > MAX_SIDE:
        return tf.image.ssim(clean, denoised, max_val=1.0)
    maps = tf.stack([clean, denoised, clean * denoised, clean**2 + denoised**2])
    by_column = tf.matmul(tf.reshape(tf.transpose(maps, [0, 1, 4, 2, 3]), [-1, width]), _window_matrix(width).T)
    averages = tf.matmul(_window_matrix(height), tf.reshape(by_column, [-1, height, width - WINDOW + 1]))
    positions = channels * (height - WINDOW + 1) * (width - WINDOW + 1)
    mean_x, mean_y, mean_xy, mean_squares = tf.unstack(tf.reshape(averages, [4, -1, positions]))
    product, squares = 2 * mean_x * mean_y, mean_x**2 + mean_y**2
    luminance = (product + LUMINANCE_CONSTANT) / (squares + LUMINANCE_CONSTANT)
    structure = (2 * mean_xy - product + CONTRAST_CONSTANT) / (mean_squares - squares + CONTRAST_CONSTANT)
    return tf.reduce_mean(luminance * structure, axis=1)


def _window_matrix(side: int) -> np.ndarray:
    """Return the matrix [side - 10, side] that maps a line of pixels to its means under the window at each position."""
    weights = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    positions = np.arange(side - WINDOW + 1)
    matrix = np.zeros((len(positions), side), np.float32)
    matrix[positions[:, None], positions[:, None] + np.arange(WINDOW)] = weights / weights.sum()
    return matrix
