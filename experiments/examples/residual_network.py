"""An example of a network in a user's file.

python experiments/run.py --epochs 3 --model experiments/examples/residual_network.py:residual_network
"""

import keras
from keras import layers


def residual_network(image_shape, width=1):
    """Four 3 x 3 convolutions of 16 channels times `width`, whose result is added to the noisy image."""
    noisy = keras.Input(image_shape)
    x = noisy
    for _ in range(3):
        x = layers.Conv2D(16 * width, 3, padding="same", activation="relu")(x)
    residual = layers.Conv2D(image_shape[-1], 3, padding="same")(x)
    denoised = layers.Activation("sigmoid")(layers.Add()([noisy, residual]))
    return keras.Model(noisy, denoised)
