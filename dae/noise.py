"""Noise models: pure functions `(clean, level, seed) -> noisy`.

`clean` is float32 [batch, H, W, C] in [0, 1]; `level` is a number from 0 up, and 0 changes nothing; `seed` is
int64 of shape [2], and the same seed gives the same bits. To add one, write a function and list it in `NOISES`.
"""

from collections.abc import Callable

import tensorflow as tf

Noise = Callable[[tf.Tensor, float, tf.Tensor], tf.Tensor]


def gaussian(clean: tf.Tensor, level: float, seed: tf.Tensor) -> tf.Tensor:
    """clean + level * n with n standard normal in every pixel; the result may leave [0, 1]."""
    return clean + level * tf.random.stateless_normal(tf.shape(clean), seed)


NOISES: dict[str, Noise] = {"gaussian": gaussian}
