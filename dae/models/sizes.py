"""Images of other sizes than those that a network was built for, and tiles of them."""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from dae.errors import UsageError

# The computation of a layer.
Function = Callable[[Any], tf.Tensor]

# Networks that halve their images up to eight times take one of this many consecutive sides.
_SEARCHED = 256
# The first multiples to try: those of networks that halve their images.
_POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Activations that TensorFlow fuses with the layers before them without changing their values.
_SAFE_ACTIVATIONS = (keras.activations.linear, keras.activations.relu, keras.activations.sigmoid)
# The least sides of the image to measure receptive fields with. Fields of up to a quarter of the length are found.
_LENGTH, _WIDTH = 2048, 32
# Operations of keras.ops whose outputs are NaN wherever an input is.
_ARITHMETIC = (
    "Add",
    "Concatenate",
    "Divide",
    "GetItem",
    "Maximum",
    "Minimum",
    "Multiply",
    "Split",
    "Subtract",
    "TrueDivide",
)
# Largest difference, relative to the largest output, that is due to sums in another order.
_ROUNDING = 1e-4


def is_functional(layer: object) -> bool:
    """Return whether a layer is a functional or built Sequential model, unlike a class, whose layers are not known."""
    return isinstance(layer, keras.Model) and getattr(layer, "inputs", None) is not None


def foreign(model: keras.Model) -> list[Any]:
    """Return the operations in `model` that are not Keras's layers: those of users, of keras.ops, and in `Lambda`."""
    found: list[Any] = []
    for operation in getattr(model, "operations", model.layers):
        inner = getattr(operation, "layer", operation)  # of a wrapper, such as SpectralNormalization
        if is_functional(operation):
            found += foreign(operation)
        elif isinstance(inner, keras.layers.Lambda) or not type(inner).__module__.startswith("keras.src.layers."):
            found.append(operation)
    return found


def any_size(model: keras.Model) -> keras.Model:
    """Return a copy of `model` for images of any size that its layers allow.

    It is `model` itself if they allow only one size, or if a user's layer cannot be copied. A network that halves the
    sides n times takes sides that differ from the original ones by multiples of 2^n.
    """
    copy = _cloned(model, lambda layer: type(layer).from_config(layer.get_config()))
    if copy is model:
        return model
    copy.set_weights(model.get_weights())
    # A user's configuration of a layer need not be complete.
    noisy = np.random.default_rng(0).random((1, *(side or 32 for side in model.input_shape[1:])), np.float32)
    is_same = not foreign(model) or np.allclose(copy(noisy, training=False), model(noisy, training=False), atol=1e-6)
    return copy if is_same else model


@functools.lru_cache(maxsize=16)
def view_of_any_size(model: keras.Model) -> keras.Model:
    """Return the same as `any_size`, but with the very layers of `model`, or functions of these."""
    return _cloned(model, functools.partial(_shared, {}))


def view_with(model: keras.Model, functions: Mapping[str, Function]) -> keras.Model:
    """Return a model of the very layers of `model`, or functions of these: those given by name, and replacements.

    It takes images of any size if the layers allow it. It is `model` itself if a user's layer cannot be called again.
    """
    shared = functools.partial(_shared, functions)
    view = _cloned(model, shared)
    with contextlib.suppress(Exception):
        return view if view is not model else keras.models.clone_model(model, clone_function=shared)
    return model


def _shared(functions: Mapping[str, Function], layer: Any) -> Any:
    compute = functions.get(layer.name) or replacement(layer)
    # Without the shape, Keras would trace the function to find it, for each size. Operations state none.
    shape = getattr(layer, "compute_output_shape", None)
    return layer if compute is None else keras.layers.Lambda(compute, shape, name=layer.name)


def _cloned(model: keras.Model, clone_function: Callable[[Any], Any]) -> keras.Model:
    def cloned(layer: keras.layers.Layer) -> Any:
        return _of_any_size(layer, cloned) if is_functional(layer) else clone_function(layer)

    with contextlib.suppress(Exception):  # a user's layer raises any type, a dense one on all pixels a ValueError
        clone = _of_any_size(model, cloned)
        if clone.outputs[0].shape == clone.inputs[0].shape:
            return clone
    return model


def _of_any_size(model: keras.Model, clone_function: Callable[[Any], Any]) -> keras.Model:
    """Return a clone of a model, or of one within it, whose inputs that are images can have any size."""

    def free(tensor: Any) -> Any:
        shape = tensor.shape[1:] if len(tensor.shape) < 4 else (None, None, tensor.shape[-1])
        return keras.Input(shape, name="noisy" if tensor is model.inputs[0] else None)

    structure = getattr(model, "input", model.inputs[0])  # a Sequential need not have `input`
    return keras.models.clone_model(model, keras.tree.map_structure(free, structure), clone_function)


def replacement(layer: keras.layers.Layer) -> Function | None:
    """Return the function that computes the same as `layer` where TensorFlow cannot, or None if there is no need."""
    if isinstance(layer, keras.layers.UpSampling2D) and layer.data_format == "channels_last":
        return _enlargement(layer)
    is_unsafe = isinstance(layer, keras.layers.Activation) and layer.activation not in _SAFE_ACTIVATIONS
    if is_unsafe or getattr(layer, "negative_slope", False):
        return _alone(layer)
    return None


def _enlargement(layer: keras.layers.UpSampling2D) -> Function:
    """Return the function that applies `layer`, but also in a graph that does not know the size.

    There Keras cannot interpolate, and LiteRT does not know the number of channels of the pixels that Keras repeats.
    """

    def enlarge(images: tf.Tensor) -> tf.Tensor:
        if None not in images.shape[1:3]:
            return layer(images)
        _, height, width, _ = keras.ops.shape(images)
        return tf.image.resize(images, [height * layer.size[0], width * layer.size[1]], layer.interpolation)

    return enlarge


def _alone(layer: keras.layers.Layer) -> Function:
    """Return the function that applies `layer`, which TensorFlow does not fuse with the layers before it.

    In graphs, with oneDNN, it fuses a convolution, a sum and LeakyReLU to one operation, whose slope is 0.2 whatever
    the layer's is; and with mish there, the graph fails. An operation between them, which does nothing, prevents both.
    """
    return lambda values: layer(tf.ensure_shape(values, values.shape))


def fitting_size(model: keras.Model, height: int, width: int) -> tuple[int, int]:
    """Return the size, at least this height and width, to which images must be padded for `model`.

    Raises UsageError if it takes no such size, or only one other, as with a dense layer on all pixels.
    """
    if (height, width) == model.input_shape[1:3]:
        return height, width
    sides = fitting_sides(model)
    if sides is None:
        raise UsageError(f"the model takes images of {model.input_shape[1:]}, not of {height} x {width}")
    (rows, columns), (row_period, column_period) = sides
    size = height + (rows - height) % row_period, width + (columns - width) % column_period
    # A smaller size than the known one may not fit: a side can be less than a kernel.
    while (size[0] < rows or size[1] < columns) and not _keeps(model, *size):
        size = size[0] + row_period * (size[0] < rows), size[1] + column_period * (size[1] < columns)
    return size


@functools.lru_cache(maxsize=16)
def fitting_sides(model: keras.Model) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Return a height and a width of images that `model` takes, and the periods with which others follow.

    Returns None if it takes one size only. They are found one side at a time, beside one that fits.
    """
    if view_of_any_size(model).input_shape[1:3] != (None, None):
        return None
    height, width = model.input_shape[1:3]
    searched = range(_SEARCHED, 2 * _SEARCHED)
    first_rows = height or next((side for side in searched if _keeps(model, side, width)), None)
    first_columns = width or next((side for side in searched if _keeps(model, height, side)), None)
    if first_rows is None or first_columns is None:
        return None
    periods = (*_POWERS, *range(3, _SEARCHED))
    rows = next((period for period in periods if _keeps(model, first_rows + period, first_columns)), None)
    columns = next((period for period in periods if _keeps(model, first_rows, first_columns + period)), None)
    return None if rows is None or columns is None else ((first_rows, first_columns), (rows, columns))


@functools.lru_cache(maxsize=16)
def _keeps(model: keras.Model, height: int | None, width: int | None) -> bool:
    """Return whether `model` keeps this size, of which a side can be free, as tried in a graph.

    Its layers must state it too, which is faster to find out. That alone does not suffice: some, such as Concatenate,
    do not compare the sides of their inputs. Nor does the graph, which may not know a side next to a free one.
    """
    shape, view = (1, height, width, model.input_shape[-1]), view_of_any_size(model)
    try:
        is_stated = tuple(view.compute_output_shape(shape)) == shape
    except Exception as error:  # a ValueError where branches of different sizes meet; a user's layer raises any type
        is_stated = not isinstance(error, ValueError)
    with contextlib.suppress(Exception):
        if is_stated:
            graph = tf.function(view, autograph=False).get_concrete_function(tf.TensorSpec(shape))
            return graph.outputs[0].shape.is_compatible_with(shape)
    return False


class ReceptiveField(NamedTuple):
    """The overlap that tiles need for the outputs of the whole image, in pixels."""

    radius: int
    """Number of outputs at each end of a tile that can differ from those of the whole image."""
    period: int
    """A tile starts at a multiple of it, and its sides are those of the image modulo the period."""


@functools.lru_cache(maxsize=16)
def receptive_field(model: keras.Model) -> ReceptiveField | None:
    """Return the receptive field of a model from images [batch, H, W, C] to images of the same size.

    Returns None if there is no finite one, as with dense layers on all pixels, global pooling or attention, or if it
    cannot be measured, because the model takes images of one size only or has layers that are not Keras's.
    """
    sides = fitting_sides(model)
    try:
        if sides is not None:
            period = math.lcm(*sides[1])
            with tf.device("CPU:0"):
                return ReceptiveField(max(_radius(model, axis, period) for axis in (0, 1)), period)
    except Exception:  # Keras and TensorFlow raise many types for a network that cannot be copied or resized
        pass
    return None


def _radius(model: keras.Model, axis: int, period: int) -> int:
    """Return the radius along the rows (axis 0) or columns (axis 1). Raises ValueError if it cannot be measured."""
    network = _without_maxima(model)
    size = fitting_size(model, *((_LENGTH, _WIDTH) if axis == 0 else (_WIDTH, _LENGTH)))
    image = np.random.default_rng(0).random((*size, model.input_shape[-1]), np.float32).swapaxes(0, axis)

    def outputs(image: np.ndarray) -> np.ndarray:
        return np.asarray(network(image.swapaxes(0, axis)[None], training=False)[0]).swapaxes(0, axis)

    def differing(start: int, stop: int) -> int:
        """Return the larger number of rows at an end of a tile whose outputs are not those of the whole image."""
        outside_is_nan = np.full_like(image, np.nan)
        outside_is_nan[start:stop] = image[start:stop]
        tile, expected = outputs(image[start:stop]), outputs(outside_is_nan)[start:stop]
        is_equal = np.abs(tile - expected) <= _ROUNDING * np.abs(tile).max()  # false for NaN
        rows = np.flatnonzero(~is_equal.all(axis=(1, 2)))
        return int(np.minimum(rows + 1, len(tile) - rows).max(initial=0))

    start = -(-len(image) // 4 // period) * period
    stop = len(image) - start
    # Two starts, because the first could be a multiple of a longer period by chance.
    radius = max(differing(first, stop) for first in (start, start + period))
    if radius > (stop - start) // 4:
        raise ValueError("the outputs depend on pixels further away than can be measured")
    return radius


def _without_maxima(model: keras.Model) -> keras.Model:
    """Return a copy of `model` for images of any size, whose outputs are NaN if a pixel is on which they depend.

    A maximum can ignore NaN, and so can activations.
    """

    def copied(layer: keras.layers.Layer) -> keras.layers.Layer:
        kind = keras.layers.AveragePooling2D if isinstance(layer, keras.layers.MaxPooling2D) else type(layer)
        config: dict[str, Any] = layer.get_config()
        return kind.from_config({**config, **({"activation": "linear"} if "activation" in config else {})})

    if any(type(operation).__name__ not in _ARITHMETIC for operation in foreign(model)):
        raise ValueError("the output of an operation may ignore that a pixel is NaN")
    image = keras.Input((None, None, model.input_shape[-1]))
    copy = keras.models.clone_model(model, image, clone_function=copied, recursive=True)
    copy.set_weights(model.get_weights())
    return copy
