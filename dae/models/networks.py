"""Networks: functions `(config, image_shape) -> keras.Model`, from noisy to denoised images.

To add one, write a function and list it in `MODELS`. It takes and returns [batch, H, W, C], ends in a sigmoid,
consists of plain Keras layers, and draws its initial weights from `config.seed` alone. TensorBoard shows what its layer
`encoder` returns, if it has one, as the code.
"""

from collections.abc import Callable
from typing import Any

import keras

from dae.config import RunConfig
from dae.errors import UsageError, choose
from dae.seeding import key

Shape = tuple[int, int, int]


def conv(config: RunConfig, image_shape: Shape) -> keras.Model:
    """The tutorial's convolutional autoencoder: 28 -> 14 -> 7 -> 4 (`encoder`) -> 8 -> 16 -> 14 -> 28.

    It has 16, 8, 8, 8, 8, 16 channels, times `config.width`.

    The third convolution of the decoder is 'valid', which takes 16 to 14 and so brings 28 back, as it does other
    sides that are 4 more than a multiple of 8. Where not both sides are, it is 'same': the sides then come back as
    the next multiple of 8, and what is too much is cropped.
    """
    convolution, pooling = keras.layers.Conv2D, keras.layers.MaxPooling2D

    def settings(name: str, activation: str = "relu", padding: str = "same") -> dict[str, Any]:
        initializer = keras.initializers.GlorotUniform(seed=key(config.seed, f"initial weights of {name}"))
        return {"name": name, "activation": activation, "padding": padding, "kernel_initializer": initializer}

    noisy = keras.Input(image_shape, name="noisy")
    x = convolution(16 * config.width, 3, **settings("encoder_conv_1"))(noisy)
    x = pooling(2, padding="same", name="encoder_pool_1")(x)
    x = convolution(8 * config.width, 3, **settings("encoder_conv_2"))(x)
    x = pooling(2, padding="same", name="encoder_pool_2")(x)
    x = convolution(8 * config.width, 3, **settings("encoder_conv_3"))(x)
    code = pooling(2, padding="same", name="encoder")(x)

    x = convolution(8 * config.width, 3, **settings("decoder_conv_1"))(code)
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


MODELS: dict[str, Callable[[RunConfig, Shape], keras.Model]] = {"conv": conv}


def build(config: RunConfig, image_shape: Shape) -> keras.Model:
    """The network that `config` names, with its initial weights; raises UsageError if it does not fit the images."""
    model = choose(MODELS, config.model, "--model")(config, image_shape)
    if model.output_shape[1:] != image_shape:
        raise UsageError(f"--model {config.model}: images of {image_shape} would come back as {model.output_shape[1:]}")
    return model


def encoder(model: keras.Model) -> keras.Model | None:
    """The part of `model` from noisy images to the code, the output of its layer `encoder`; None if it has none."""
    layers = [layer for layer in model.layers if layer.name == "encoder"]
    return keras.Model(model.inputs, layers[0].output) if layers else None
