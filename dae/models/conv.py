"""The tutorial's network: a convolutional autoencoder with max pooling and upsampling.

Source: the *plain* convolutional autoencoder of Chollet, Building Autoencoders in Keras
(https://blog.keras.io/building-autoencoders-in-keras.html), which the tutorial applies to the denoising task of the
same page; that page's own denoising network has 32 channels in each layer and pools twice.
"""

from typing import Any

import keras

from dae.config import RunConfig
from dae.seeding import derive_seed


def conv(config: RunConfig, image_shape: tuple[int, int, int]) -> keras.Model:
    """Sides 28 -> 14 -> 7 -> 4 (`encoder`) -> 8 -> 16 -> 14 -> 28, with 16, 8, 8, 8, 8, 16 channels times `width`.

    The third convolution of the decoder is 'valid', which takes 16 to 14 and so restores 28, and any other side that is
    4 more than a multiple of 8. For other sides it is 'same', which gives the next multiple of 8, and the result is
    cropped.
    """
    convolution, pooling = keras.layers.Conv2D, keras.layers.MaxPooling2D

    def settings(name: str, activation: str = "relu", padding: str = "same") -> dict[str, Any]:
        initializer = keras.initializers.GlorotUniform(seed=derive_seed(config.seed, f"initial weights of {name}"))
        return {"name": name, "activation": activation, "padding": padding, "kernel_initializer": initializer}

    noisy = keras.Input(image_shape, name="noisy")
    x = convolution(16 * config.width, 3, **settings("encoder_conv_1"))(noisy)
    x = pooling(2, padding="same", name="encoder_pool_1")(x)
    x = convolution(8 * config.width, 3, **settings("encoder_conv_2"))(x)
    x = pooling(2, padding="same", name="encoder_pool_2")(x)
    x = convolution(8 * config.width, 3, **settings("encoder_conv_3"))(x)
    latents = pooling(2, padding="same", name="encoder")(x)

    x = convolution(8 * config.width, 3, **settings("decoder_conv_1"))(latents)
    x = keras.layers.UpSampling2D(2, name="decoder_up_1")(x)
    x = convolution(8 * config.width, 3, **settings("decoder_conv_2"))(x)
    x = keras.layers.UpSampling2D(2, name="decoder_up_2")(x)
    height, width = image_shape[:2]
    padding = "valid" if height % 8 == width % 8 == 4 else "same"
    x = convolution(16 * config.width, 3, **settings("decoder_conv_3", padding=padding))(x)
    x = keras.layers.UpSampling2D(2, name="decoder_up_3")(x)
    denoised = convolution(image_shape[-1], 3, **settings("denoised", activation="sigmoid"))(x)
    if padding == "same" and (height % 8 or width % 8):
        denoised = keras.layers.Cropping2D(((0, -height % 8), (0, -width % 8)), name="cropped")(denoised)
    return keras.Model(noisy, denoised, name="conv")
