"""The networks by name, the network of a configuration with its initial weights, and the contract of a network.

To add a network, write a function in `architectures.py` and list it in `MODELS`, or in your own file:
`--model FILE.py:FUNCTION`. The model takes and returns [batch, H, W, C]. TensorBoard shows the output of its layer
`encoder`, if it has one, as the latents. docs/networks.md
"""

import inspect
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from dae import plugins
from dae.config import RunConfig
from dae.data.pipeline import Batch
from dae.errors import UsageError, as_usage_error, shown
from dae.models.architectures import Shape, blog, conv, dncnn, patches, residual_unet, unet
from dae.models.fused_layers import fused, outputs
from dae.models.sizes import is_functional
from dae.seeding import derive_seed, keras_seed

# Called with the shape (H, W, C) of an image and, unless it is 1, the setting `width`.
NetworkFunction = Callable[..., keras.Layer]

MODELS: dict[str, NetworkFunction] = {
    function.__name__: function for function in (conv, blog, patches, unet, residual_unet, dncnn)
}


def build(config: RunConfig, image_shape: Shape, earlier: keras.Model | None = None) -> keras.Model:
    """Return the network that `config` names, with its initial weights, for images of `image_shape`.

    Initializers without a seed get one that is a function of `config.seed`. Raises UsageError if the function is not
    that of a network for such images, or if the network has weights of an `earlier` one that it returned.
    """
    # Names of layers, and so of weights in TensorBoard, are then the same in any process.
    keras.backend.clear_session(free_memory=False)
    model = _model(config, image_shape)
    if earlier is not None and {id(weight) for weight in earlier.weights} & {id(weight) for weight in model.weights}:
        source = f"--model: {plugins.source(config.model)}"
        raise UsageError(f"{source}: returns the same weights whenever it is called; build a new network")
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
    """Return the model that the network's function returns, after a check that it is one for such images."""
    function = plugins.load(MODELS, config.model, "--model")
    source = f"--model: {plugins.source(config.model)}"
    if config.width != 1 and "width" not in inspect.signature(function).parameters:
        raise UsageError(f"--width: {plugins.label(config.model)} has no parameter `width`, so it must be 1")
    errors = plugins.errors_with_line(source, plugins.file_of(function))
    with keras_seed(derive_seed(config.seed, "initial weights")), errors:
        model = function(image_shape, **({"width": config.width} if config.width != 1 else {}))
        if isinstance(model, keras.Layer) and not is_functional(model):
            noisy = keras.Input(image_shape, name="noisy")
            model = keras.Model(noisy, model(noisy))
    if not isinstance(model, keras.Model):
        raise UsageError(f"{source}: expected a keras.Model or keras.Layer, got {shown(model)}")
    if len(model.inputs) > 1:
        raise UsageError(
            f"{source}: expected a model of noisy images alone, got one with {len(model.inputs)} inputs; instead of "
            "taking the noise level, which gains about 0.1 dB, it can be trained for a range: --noise-level LOW HIGH"
        )
    expected, (output, *others) = (None, *image_shape), model.outputs
    if others or any(tuple(tensor.shape) != expected for tensor in (*model.inputs, output)):
        raise UsageError(
            f"{source}: expected a model from images {expected} to the same shape, got one from "
            f"{model.input_shape} to {model.output_shape}"
        )
    return model


def set_brightness(model: keras.Model, brightness: float) -> None:
    """Give the first outputs this mean brightness, in (0, 1), by the last bias, if the network ends in a sigmoid.

    So no step is spent on learning it. The bias becomes the logit of `brightness`.
    """
    biases = [getattr(layer, "bias", None) for layer in model.layers if layer.weights]
    if _ends_in_sigmoid(model) and biases and biases[-1] is not None:
        logit = math.log(brightness / (1 - brightness))
        biases[-1].assign(keras.ops.full(biases[-1].shape, logit))


def _ends_in_sigmoid(model: keras.Model) -> bool:
    """Return whether the outputs of `model` are those of a sigmoid, perhaps cropped."""
    operations = getattr(model, "operations", model.layers)  # in the order of their computation
    *_, last = (operation for operation in operations if not isinstance(operation, keras.layers.Cropping2D))
    return getattr(last, "activation", None) is keras.activations.sigmoid


def check(config: RunConfig, model: keras.Model, batch: Batch) -> None:
    """Check `model`, which was built for `config`, on a batch of training images, before a run writes anything.

    The network must return finite values, the same ones in a graph; have a finite gradient for every weight; have the
    same initial weights whenever it is built; and be restored from a file of weights. Otherwise UsageError is raised,
    which names the file and the function.
    """
    source = f"--model: {plugins.source(config.model)}"
    with plugins.errors_with_line(source, plugins.file_of(plugins.load(MODELS, config.model, "--model"))):
        again = build(config, batch.clean.shape[1:], earlier=model)
        for weight, rebuilt in zip(model.weights, again.weights, strict=True):
            if not np.array_equal(weight, rebuilt, equal_nan=True):
                raise UsageError(
                    f"{source}: the initial values of {weight.path} differ whenever it is built; draw them with "
                    "Keras's initializers, whose seeds are a function of --seed"
                )
        _check_values(source, again, batch)  # which changes the weights of layers such as BatchNormalization
        with tempfile.TemporaryDirectory() as folder, as_usage_error(source, "cannot be saved", Exception):
            again.save_weights(file := Path(folder, "model.weights.h5"))
            restored = build(config, batch.clean.shape[1:])
            restored.load_weights(file)
            if not np.allclose(outputs(again, batch.noisy[:4]), outputs(restored, batch.noisy[:4]), atol=1e-6):
                raise ValueError("with the saved weights, the network that is built again returns other images")


def _check_values(source: str, model: keras.Model, batch: Batch) -> None:
    denoised = outputs(model, batch.noisy)
    if not np.isfinite(denoised).all():
        raise UsageError(f"{source}: expected finite values, got {denoised.min():.3g} to {denoised.max():.3g}")
    compiled = tf.function(lambda noisy: fused(model, training=False)(noisy).denoised)(batch.noisy)
    if (difference := np.abs(compiled - denoised).max()) > 1e-4 * max(1.0, np.abs(denoised).max()):
        raise UsageError(
            f"{source}: outputs in a TensorFlow graph differ by {difference:.2g} from those in eager mode; use "
            "keras.layers.LeakyReLU instead of keras.ops.leaky_relu, or another activation"
        )
    if not model.trainable_weights:
        raise UsageError(f"{source}: has no weights to train")
    with tf.GradientTape() as tape:
        total = tf.reduce_sum(model(batch.noisy, training=True))
    gradients = tape.gradient(total, [weight.value for weight in model.trainable_weights])
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        if gradient is None:
            raise UsageError(f"{source}: no gradient with respect to {weight.path}; the output does not depend on it")
        if not np.isfinite(gradient).all():
            raise UsageError(f"{source}: expected a finite gradient with respect to {weight.path}")


def is_bounded(config: RunConfig, model: keras.Model, noisy: tf.Tensor) -> bool:
    """Return whether the outputs of `model`, which was built for `config`, stay in [0, 1].

    This is certain for a network that ends in a sigmoid. Others are tried on the first four noisy images,
    [batch, H, W, C], with three sets of random weights, because a residual network may return its input unchanged with
    its initial weights.
    """
    if _ends_in_sigmoid(model):
        return True
    tried = build(config, noisy.shape[1:])
    for number in range(3):
        for index, weight in enumerate(tried.trainable_weights):
            scale = math.prod(weight.shape[:-1]) ** -0.5  # so that the outputs of layers keep their size
            weight.assign_add(scale * tf.random.stateless_normal(weight.shape, (number, index)))
        denoised = outputs(tried, noisy[:4])
        if (denoised < 0).any() or (denoised > 1).any():
            return False
    return True
