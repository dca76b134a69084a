"""The networks by name: functions `(image_shape, width) -> keras.Model`, from noisy to denoised images.

To add one, write a function in a new module and list it in `MODELS`, or in your own file: `--model FILE.py:FUNCTION`.
The model takes and returns [batch, H, W, C], ends in a sigmoid, and consists of Keras's own layers. TensorBoard shows
the output of its layer `encoder`, if it has one, as the latents. docs/networks.md
"""

import math
from collections.abc import Callable

import keras

from dae import plugins
from dae.config import RunConfig
from dae.errors import UsageError
from dae.models.blog import blog
from dae.models.conv import conv
from dae.models.dncnn import dncnn
from dae.models.fused_layers import ENCODER
from dae.models.patches import patches
from dae.models.unet import unet
from dae.seeding import derive_seed, keras_seed

Shape = tuple[int, int, int]
# Called with the shape (H, W, C) of an image and, unless it is 1, the setting `width`.
NetworkFunction = Callable[..., keras.Model]

MODELS: dict[str, NetworkFunction] = {function.__name__: function for function in (conv, blog, patches, unet, dncnn)}


def load(config: RunConfig) -> NetworkFunction:
    """Return the function that `config.model` names. Raises UsageError if there is none."""
    return plugins.load(MODELS, config.model, "--model")


def build(config: RunConfig, image_shape: Shape, earlier: keras.Model | None = None) -> keras.Model:
    """Return the network that `config` names, with its initial weights, for images of `image_shape`.

    If the network ends in a sigmoid, its last bias gives the first outputs the brightness `config.initial_brightness`,
    so that no step is spent on learning it; None leaves the bias as it is. Initializers without a seed get one that is
    a function of `config.seed`. Raises UsageError if the function is not that of a network for such images, or if the
    network has weights of an `earlier` one that it returned.
    """
    # Names of layers, and so of weights in TensorBoard, are then the same in any process.
    keras.backend.clear_session(free_memory=False)
    model = _model(config, image_shape)
    if earlier is not None and {id(weight) for weight in earlier.weights} & {id(weight) for weight in model.weights}:
        source = f"--model: {plugins.source(config.model)}"
        raise UsageError(f"{source}: returns the same weights whenever it is called; build a new network")
    if config.initial_brightness is not None:
        _set_brightness(model, config.initial_brightness)
    return model


def sketch(config: RunConfig, image_shape: Shape) -> keras.Model | None:
    """Return the network, whose weights have shapes but no values, or None if its function needs values.

    Computes nothing, so that the number of TensorFlow's threads can still be set afterwards.
    """
    try:
        with keras.StatelessScope(initialize_variables=False):
            return _model(config, image_shape)
    except UsageError:  # a mistake is reported when the network is built
        return None


def _model(config: RunConfig, image_shape: Shape) -> keras.Model:
    """Return what the network's function returns, once it is known to be a model for such images."""
    function, source = load(config), f"--model: {plugins.source(config.model)}"
    if config.width != 1 and "width" not in plugins.parameters_of(function, source):
        raise UsageError(f"--width: {plugins.label(config.model)} has no parameter `width`, so it must be 1")
    errors = plugins.errors_with_line(source, plugins.file_of(function))
    with keras_seed(derive_seed(config.seed, "initial weights")), errors:
        model = function(image_shape, **({"width": config.width} if config.width != 1 else {}))
    if not isinstance(model, keras.Model) or not hasattr(model, "inputs") or model.inputs is None:
        raise UsageError(f"{source}: expected a keras.Model made of layers (functional), got {type(model).__name__}")
    expected, tensors = (None, *image_shape), (*model.inputs, *model.outputs)
    if len(tensors) != 2 or any(model_shape != expected for model_shape in (model.input_shape, model.output_shape)):
        raise UsageError(
            f"{source}: expected a model from images {expected} to the same shape, got one from "
            f"{model.input_shape} to {model.output_shape}"
        )
    return model


def _set_brightness(model: keras.Model, brightness: float) -> None:
    """Set the bias of the last layer with weights to the logit of `brightness`, if the last activation is a sigmoid."""
    activations = [layer.activation for layer in model.layers if hasattr(layer, "activation")]
    biases = [getattr(layer, "bias", None) for layer in model.layers if layer.weights]
    if activations[-1:] == [keras.activations.sigmoid] and biases and biases[-1] is not None:
        logit = math.log(brightness / (1 - brightness))
        biases[-1].assign(keras.ops.full(biases[-1].shape, logit))


def encoder(model: keras.Model) -> keras.Model | None:
    """Return the part of `model` from noisy images to the latents, the output of its layer `encoder`, if it has one."""
    layers = [layer for layer in model.layers if layer.name == ENCODER]
    return keras.Model(model.inputs, layers[0].output) if layers else None
