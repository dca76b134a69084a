"""DnCNN: a plain chain of convolutions at full resolution that predicts the noise."""

import keras
from keras import layers


def dncnn(image_shape: tuple[int, int, int], width: int = 1) -> keras.Model:
    """Eight 3 x 3 convolutions of 32 channels times `width`, batch-normalized inside; their output is added to `noisy`.

    Nothing is downsampled, so images of any size fit, and a training step takes several times that of the other
    networks. A sigmoid of the sum keeps the output in [0, 1].

    Source: Zhang et al., Beyond a Gaussian Denoiser: Residual Learning of Deep CNN for Image Denoising (2017), which
    has 17 or 20 convolutions of 64 channels, and no sigmoid.
    """
    channels = 32 * width
    noisy = keras.Input(image_shape, name="noisy")
    x = layers.Conv2D(channels, 3, padding="same", activation="relu")(noisy)
    for _ in range(6):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    residual = layers.Conv2D(image_shape[-1], 3, padding="same")(x)
    denoised = layers.Activation("sigmoid")(layers.Add()([noisy, residual]))
    return keras.Model(noisy, denoised, name="dncnn")
