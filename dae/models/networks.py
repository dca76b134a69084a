"""The networks by name: functions `(config, image_shape) -> keras.Model`, from noisy to denoised images.

To add one, write a function in a new module and list it in `MODELS`. The model takes and returns [batch, H, W,
C], ends in a sigmoid, consists of plain Keras layers, and draws its initial weights from `config.seed` alone.
TensorBoard shows the output of its layer `encoder`, if it has one, as the latents.
"""

import math
from collections.abc import Callable

import keras

from dae.config import RunConfig
from dae.errors import UsageError, lookup
from dae.models.conv import conv
from dae.models.fused_layers import ENCODER

MODELS: dict[str, Callable[[RunConfig, tuple[int, int, int]], keras.Model]] = {"conv": conv}


def build(config: RunConfig, image_shape: tuple[int, int, int]) -> keras.Model:
    """Return the network that `config` names, with its initial weights.

    If the network ends in a sigmoid with a bias, the bias gives its first outputs the brightness
    `config.initial_brightness`, so that no step is spent on learning it; None leaves the bias as it is. Raises
    UsageError if the network does not fit the images.
    """
    model = lookup(MODELS, config.model, "--model")(config, image_shape)
    if model.output_shape[1:] != image_shape:
        raise UsageError(f"--model {config.model}: expected images of {image_shape}, returns {model.output_shape[1:]}")
    sigmoids = [layer for layer in model.layers if getattr(layer, "activation", None) is keras.activations.sigmoid]
    if config.initial_brightness is not None and sigmoids and sigmoids[-1].use_bias:
        logit = math.log(config.initial_brightness / (1 - config.initial_brightness))
        sigmoids[-1].bias.assign(keras.ops.full(sigmoids[-1].bias.shape, logit))
    return model


def encoder(model: keras.Model) -> keras.Model | None:
    """Return the part of `model` from noisy images to the latents, the output of its layer `encoder`, if it has one."""
    layers = [layer for layer in model.layers if layer.name == ENCODER]
    return keras.Model(model.inputs, layers[0].output) if layers else None
