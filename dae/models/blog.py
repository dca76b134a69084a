"""The Keras blog's denoising network: a convolutional autoencoder that is wider and pools less than `conv`."""

import keras
from keras import layers


def blog(image_shape: tuple[int, int, int], width: int = 1) -> keras.Model:
    """Sides 28 -> 14 -> 7 (`encoder`) -> 14 -> 28, with 32 channels times `width`; 28,353 parameters for digits.

    Other sides than multiples of 4 give the next multiple, and the result is cropped.

    Source: the denoising autoencoder of Chollet, Building Autoencoders in Keras
    (https://blog.keras.io/building-autoencoders-in-keras.html).
    """
    height, width_of_image, channels = image_shape
    settings = {"filters": 32 * width, "kernel_size": 3, "padding": "same", "activation": "relu"}
    noisy = keras.Input(image_shape, name="noisy")
    x = layers.Conv2D(**settings)(noisy)
    x = layers.MaxPooling2D(2, padding="same")(x)
    x = layers.Conv2D(**settings)(x)
    x = layers.MaxPooling2D(2, padding="same", name="encoder")(x)

    x = layers.Conv2D(**settings)(x)
    x = layers.UpSampling2D(2)(x)
    x = layers.Conv2D(**settings)(x)
    x = layers.UpSampling2D(2)(x)
    denoised = layers.Conv2D(channels, 3, padding="same", activation="sigmoid")(x)
    if height % 4 or width_of_image % 4:
        denoised = layers.Cropping2D(((0, -height % 4), (0, -width_of_image % 4)))(denoised)
    return keras.Model(noisy, denoised, name="blog")
