"""An example of a loss in a user's file.

python experiments/run.py --epochs 3 --loss "bce + 0.5*experiments/examples/bright_loss.py:bright_mse"
"""

import tensorflow as tf


def bright_mse(clean, denoised):
    """Squared error, mean over pixels, where an error at a white pixel counts five times as much as at a black one."""
    return tf.reduce_mean((1 + 4 * clean) * (clean - denoised) ** 2, axis=[1, 2, 3])
