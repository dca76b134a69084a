"""The tutorial's network: a convolutional autoencoder with max pooling and upsampling."""

import keras
from keras import layers


def conv(image_shape: tuple[int, int, int], width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 7 -> 4 (`encoder`) -> 8 -> 16 -> 14 -> 28, with 16, 8, 8, 8, 8, 16 channels times `width`.

    The third convolution of the decoder is 'valid', which takes 16 to 14 and so restores 28, and any other side that is
    4 more than a multiple of 8. For other sides it is 'same', which gives the next multiple of 8, and the result is
    cropped.

    Source: the *plain* convolutional autoencoder of Chollet, Building Autoencoders in Keras
    (https://blog.keras.io/building-autoencoders-in-keras.html), which the tutorial applies to the denoising task of the
    same page; that page's own denoising network is `blog`.
    """
    height, width_of_image, channels = image_shape
    few, many, relu = 8 * width, 16 * width, {"padding": "same", "activation": "relu"}
    noisy = keras.Input(image_shape, name="noisy")
    x = layers.Conv2D(many, 3, **relu, name="encoder_conv_1")(noisy)
    x = layers.MaxPooling2D(2, padding="same", name="encoder_pool_1")(x)
    x = layers.Conv2D(few, 3, **relu, name="encoder_conv_2")(x)
    x = layers.MaxPooling2D(2, padding="same", name="encoder_pool_2")(x)
    x = layers.Conv2D(few, 3, **relu, name="encoder_conv_3")(x)
    latents = layers.MaxPooling2D(2, padding="same", name="encoder")(x)

    x = layers.Conv2D(few, 3, **relu, name="decoder_conv_1")(latents)
    x = layers.UpSampling2D(2, name="decoder_up_1")(x)
    x = layers.Conv2D(few, 3, **relu, name="decoder_conv_2")(x)
    x = layers.UpSampling2D(2, name="decoder_up_2")(x)
    padding = "valid" if height % 8 == width_of_image % 8 == 4 else "same"
    x = layers.Conv2D(many, 3, padding=padding, activation="relu", name="decoder_conv_3")(x)
    x = layers.UpSampling2D(2, name="decoder_up_3")(x)
    denoised = layers.Conv2D(channels, 3, padding="same", activation="sigmoid", name="denoised")(x)
    if padding == "same" and (height % 8 or width_of_image % 8):
        denoised = layers.Cropping2D(((0, -height % 8), (0, -width_of_image % 8)), name="cropped")(denoised)
    return keras.Model(noisy, denoised, name="conv")
