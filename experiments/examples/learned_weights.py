"""An example of a loss with weights that are trained with those of the network.

python experiments/run.py --epochs 3 --loss experiments/examples/learned_weights.py:LearnedWeights
"""

import keras
import tensorflow as tf

from dae.losses.losses import bce, mae


class LearnedWeights(keras.Layer):
    """exp(-s) bce + s + exp(-t) mae + t, with learned numbers s and t.

    Source: Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses (2018).
    """

    def __init__(self):
        super().__init__()
        self.log_variances = self.add_weight(shape=(2,), initializer="zeros", name="log_variances")

    def call(self, clean, denoised):
        """Return the loss of each image, float32 [batch]."""
        terms = tf.stack([bce(clean, denoised), mae(clean, denoised)], axis=1)
        return tf.reduce_sum(tf.exp(-self.log_variances) * terms + self.log_variances, axis=1)
