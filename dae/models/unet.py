"""A U-Net of residual blocks: an encoder, a decoder, and a connection between layers of the same resolution."""

import keras
from keras import layers

from dae.models.patches import residual_blocks


def unet(image_shape: tuple[int, int, int], width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 7 -> 14 -> 28: 32 channels at half the resolution and 64 at a quarter, times `width`.

    It is `patches` with a coarser level, whose output is added to that of the finer one; 323,969 parameters for digits.
    Other sides than multiples of 4 are padded with zeros, which are cropped at the end.

    Source: Ronneberger, Fischer and Brox, U-Net (2015); with residual blocks, strides instead of pooling, and sums
    instead of concatenations, as in Zhang et al., Plug-and-Play Image Restoration with Deep Denoiser Prior (2021).
    """
    height, width_of_image, channels = image_shape
    padding = ((0, -height % 4), (0, -width_of_image % 4))
    noisy = x = keras.Input(image_shape, name="noisy")
    if padding != ((0, 0), (0, 0)):
        x = layers.ZeroPadding2D(padding)(x)
    x = layers.Conv2D(32 * width, 4, strides=2, padding="same", activation="relu")(x)
    fine = residual_blocks(x, 2)
    x = layers.Conv2D(64 * width, 3, strides=2, padding="same", activation="relu")(fine)
    coarse = residual_blocks(x, 3)
    x = layers.Conv2DTranspose(32 * width, 2, strides=2, padding="same")(coarse)
    x = residual_blocks(layers.ReLU()(layers.Add()([x, fine])), 2)
    denoised = layers.Conv2DTranspose(channels, 6, strides=2, padding="same", activation="sigmoid")(x)
    if padding != ((0, 0), (0, 0)):
        denoised = layers.Cropping2D(padding)(denoised)
    return keras.Model(noisy, denoised, name="unet")
