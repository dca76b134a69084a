"""An example of a loss with trainable weights: a discriminator between clean and denoised images.

python experiments/run.py --epochs 3 --loss "bce + 0.01*experiments/examples/adversarial.py:Adversarial"
"""

import keras
import tensorflow as tf


class Adversarial(keras.Layer):
    """(D(y) - 1)^2, where D is trained to return 1 for clean images and 0 for denoised ones.

    Source: Mao et al., Least Squares Generative Adversarial Networks (2017).
    """

    def __init__(self):
        super().__init__()
        settings = {"kernel_size": 3, "strides": 2, "padding": "same", "activation": "elu"}
        self.discriminator = keras.Sequential(
            [
                keras.layers.Conv2D(16, **settings),
                keras.layers.Conv2D(32, **settings),
                keras.layers.GlobalAveragePooling2D(),
                keras.layers.Dense(1),
            ]
        )
        self.optimizer = keras.optimizers.Adam(1e-3, beta_1=0.5)

    def build(self, image_shape):
        """Create all variables before the first update, so that a checkpoint holds them from the start."""
        self.discriminator.build(image_shape)
        self.optimizer.build(self.discriminator.trainable_variables)

    def call(self, denoised):
        """Return the loss of each image, float32 [batch]."""
        return tf.square(self.discriminator(denoised)[:, 0] - 1)

    def update(self, clean, denoised):
        """Take one step of the discriminator; called after each step of the network, with the same batch."""
        with tf.GradientTape() as tape:
            real, fake = self.discriminator(clean), self.discriminator(denoised)
            loss = tf.reduce_mean(tf.square(real - 1) + tf.square(fake))
        weights = self.discriminator.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
