"""An example of a loss with a frozen network, which it reads from a file beside it.

python experiments/run.py --epochs 3 --loss "bce + 0.1*experiments/examples/perceptual.py:Perceptual"
"""

from pathlib import Path

import keras
import tensorflow as tf

# These files are kept with a run, as this one is.
FILES = ["features.keras"]


class Perceptual(keras.Layer):
    """|F(x) - F(y)|^2, mean over the features F of a network that was trained to classify digits (train_features.py).

    Source: Johnson, Alahi and Fei-Fei, Perceptual Losses for Real-Time Style Transfer and Super-Resolution (2016).
    """

    def __init__(self):
        super().__init__()
        self.features = keras.models.load_model(Path(__file__).parent / FILES[0], compile=False)
        self.features.trainable = False

    def call(self, clean, denoised):
        """Return the loss of each image, float32 [batch]."""
        difference = self.features(clean) - self.features(denoised)
        return tf.reduce_mean(tf.square(difference), axis=[1, 2, 3])
