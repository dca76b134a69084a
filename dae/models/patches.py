"""A residual network on patches of 2 x 2 pixels, the quickest to train here."""

import keras
from keras import layers


def residual_blocks(x: keras.KerasTensor, count: int) -> keras.KerasTensor:
    """Apply `count` blocks of two 3 x 3 convolutions, each block added to its input.

    Source: He et al., Deep Residual Learning for Image Recognition (2016), without batch normalization.
    """
    channels = x.shape[-1]
    for _ in range(count):
        y = layers.Conv2D(channels, 3, padding="same", activation="relu")(x)
        y = layers.Conv2D(channels, 3, padding="same")(y)
        x = layers.ReLU()(layers.Add()([x, y]))
    return x


def patches(image_shape: tuple[int, int, int], width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 28: two residual blocks of 32 channels times `width`; 38,689 parameters for digits.

    Each patch becomes one pixel of 32 channels, so that all layers but the first and the last are at half the
    resolution, where a convolution takes a quarter of the time. Odd sides are padded with a row or column of zeros,
    which is cropped at the end.

    Source: working at a lower resolution, with the pixels of a patch as channels, is the idea of Shi et al., Real-Time
    Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional Neural Network (2016), and for
    denoising of Zhang, Zuo and Zhang, FFDNet (2018).
    """
    height, width_of_image, channels = image_shape
    padding = ((0, height % 2), (0, width_of_image % 2))
    noisy = x = keras.Input(image_shape, name="noisy")
    if padding != ((0, 0), (0, 0)):
        x = layers.ZeroPadding2D(padding)(x)
    x = layers.Conv2D(32 * width, 4, strides=2, padding="same", activation="relu")(x)
    x = residual_blocks(x, 2)
    denoised = layers.Conv2DTranspose(channels, 6, strides=2, padding="same", activation="sigmoid")(x)
    if padding != ((0, 0), (0, 0)):
        denoised = layers.Cropping2D(padding)(denoised)
    return keras.Model(noisy, denoised, name="patches")
