"""The networks by name: functions `(config, image_shape) -> keras.Model`, from noisy to denoised images.

To add one, write a function in a new module and list it in `MODELS`. The model takes and returns [batch, H, W,
C], ends in a sigmoid, consists of plain Keras layers, and draws its initial weights from `config.seed` alone.
TensorBoard shows the output of its layer `encoder`, if it has one, as the latents.
"""

from collections.abc import Callable

import keras

from dae.config import RunConfig
from dae.errors import UsageError, lookup
from dae.models.conv import conv

MODELS: dict[str, Callable[[RunConfig, tuple[int, int, int]], keras.Model]] = {"conv": conv}


def build(config: RunConfig, image_shape: tuple[int, int, int]) -> keras.Model:
    """Return the network that `config` names, with its initial weights. Raises UsageError if it does not fit images."""
    model = lookup(MODELS, config.model, "--model")(config, image_shape)
    if model.output_shape[1:] != image_shape:
        raise UsageError(f"--model {config.model}: expected images of {image_shape}, returns {model.output_shape[1:]}")
    return model


def encoder(model: keras.Model) -> keras.Model | None:
    """Return the part of `model` from noisy images to the latents, the output of its layer `encoder`, if it has one."""
    layers = [layer for layer in model.layers if layer.name == "encoder"]
    return keras.Model(model.inputs, layers[0].output) if layers else None
