"""Losses: functions `(clean, denoised) -> loss [batch]`, one number per example.

`clean` and `denoised` are float32 [batch, H, W, C] in [0, 1]. The train step takes the mean over the batch. To add
a loss, write a function and list it in `LOSSES`; its name is then its `--loss`.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

from dae.errors import UsageError

Loss = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def bce(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Binary cross-entropy, -(x log y + (1 - x) log(1 - y)), mean over pixels: nats per pixel, from 0 up.

    Its minimum over y is at y = x, but not 0 there: a grey pixel has entropy. Source: Keras.
    """
    return tf.reduce_mean(keras.losses.binary_crossentropy(clean, denoised), axis=[1, 2])


def mse(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Squared error (x - y)^2, mean over pixels: in [0, 1]. Source: Keras."""
    return tf.reduce_mean(keras.losses.mean_squared_error(clean, denoised), axis=[1, 2])


def mae(clean: tf.Tensor, denoised: tf.Tensor) -> tf.Tensor:
    """Absolute error |x - y|, mean over pixels: in [0, 1]. Source: Keras."""
    return tf.reduce_mean(keras.losses.mean_absolute_error(clean, denoised), axis=[1, 2])


LOSSES: dict[str, Loss] = {"bce": bce, "mse": mse, "mae": mae}


def check(loss: Loss, name: str, image_shape: tuple[int, int, int]) -> None:
    """Raises UsageError, naming the loss, unless it returns one finite float32 number per example."""
    clean, denoised = tf.fill((2, *image_shape), 0.25), tf.fill((2, *image_shape), 0.5)
    losses = loss(clean, denoised)
    if losses.shape != (2,) or losses.dtype != tf.float32:
        raise UsageError(
            f"{name}: returns {losses.dtype.name} {list(losses.shape)} for a batch of 2 images, not float32 [2]"
        )
    if not bool(tf.reduce_all(tf.math.is_finite(losses))):
        raise UsageError(f"{name}: is {losses.numpy().tolist()} for images in [0, 1], which is not finite")
