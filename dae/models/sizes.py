"""Images of other sizes than those that a network was built for, and tiles of them."""

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import keras
import numpy as np
import tensorflow as tf

from dae.errors import UsageError

T = TypeVar("T")

# The computation of a layer.
Function = Callable[[Any], tf.Tensor]

# Networks that halve their images up to eight times take one of this many consecutive sides.
_SEARCHED = 256
# Activations that TensorFlow fuses with the layers before them without changing their values.
_SAFE_ACTIVATIONS = (keras.activations.linear, keras.activations.relu, keras.activations.sigmoid)
# The least sides of the image to measure receptive fields with. Fields of up to half the length are found.
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


def _cached(function: Callable[..., T]) -> Callable[..., T]:
    """Cache a function of a model and other arguments, for as long as the model exists."""
    results: weakref.WeakKeyDictionary[keras.Model, dict[Any, T]] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def cached(model: keras.Model, *arguments: Any) -> T:
        of_model = results.setdefault(model, {})
        if arguments not in of_model:
            of_model[arguments] = function(model, *arguments)
        return of_model[arguments]

    return cached


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


def output_sizes(model: keras.Model, height: int, width: int) -> list[tuple[str, int]]:
    """Return the type of each operation in the graph of `model`, and its number of values for an image of this size."""
    network = tf.function(view_of_any_size(model), autograph=False)
    graph = network.get_concrete_function(tf.TensorSpec((None, height, width, model.input_shape[-1]))).graph
    outputs = [(operation.type, output.shape) for operation in graph.get_operations() for output in operation.outputs]
    # What depends on the images has an unknown first dimension, unlike weights.
    of_images = [(kind, shape) for kind, shape in outputs if shape.rank and shape[0] is None]
    return [(kind, shape[1:].num_elements() or 0) for kind, shape in of_images]


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


@_cached
def fitting_size(model: keras.Model, height: int, width: int) -> tuple[int, int]:
    """Return the size, at least this height and width, to which images must be padded for `model`.

    Raises UsageError if it takes no such size, or only one other, as with a dense layer on all pixels.
    """
    own_height, own_width = model.input_shape[1:3]
    if (height, width) == (own_height, own_width):
        return height, width
    if view_of_any_size(model).input_shape[1:3] == (None, None):
        for fits in (_states, _keeps):  # one side at a time, beside one that fits; first by what takes less time
            rows = next((side for side in range(height, height + _SEARCHED) if fits(model, side, own_width)), height)
            columns = next((side for side in range(width, width + _SEARCHED) if fits(model, own_height, side)), width)
            if _keeps(model, rows, columns):
                return rows, columns
    raise UsageError(f"the model takes images of {model.input_shape[1:]}, not of {height} x {width}")


def _states(model: keras.Model, height: int | None, width: int | None) -> bool:
    """Return whether the layers of `model` state that they keep this size, of which a side can be free.

    Some, such as Concatenate, do not compare the sides of their inputs.
    """
    shape = (1, height, width, model.input_shape[-1])
    try:
        return tuple(view_of_any_size(model).compute_output_shape(shape)) == shape
    except Exception:  # a ValueError where branches of different sizes meet; a user's layer raises any type
        return False


@_cached
def _keeps(model: keras.Model, height: int | None, width: int | None) -> bool:
    """Return whether `model` keeps this size, as tried in a graph, which takes tens of milliseconds."""
    shape = (1, height, width, model.input_shape[-1])
    network = tf.function(view_of_any_size(model), autograph=False)
    try:
        return tuple(network.get_concrete_function(tf.TensorSpec(shape)).outputs[0].shape) == shape
    except Exception:
        return False


class ReceptiveField(NamedTuple):
    """The overlap that tiles need for the outputs of the whole image, in pixels, as (rows, columns).

    The first `before` outputs at the top and left of a tile, and the last `after` at the bottom and right, can differ
    from those of the whole image. A tile starts at a multiple of `period`, and its length is that of the image modulo
    `period`: an image shifted by it gives the shifted output.
    """

    before: tuple[int, int]
    after: tuple[int, int]
    period: tuple[int, int]


def receptive_field(model: keras.Model) -> ReceptiveField | None:
    """Return the receptive field of a model from images [batch, H, W, C] to images of the same size.

    Returns None if there is no finite one, as with dense layers on all pixels, global pooling or attention, or if it
    cannot be measured, because the model takes images of one size only or has layers that are not Keras's.
    """
    try:
        with tf.device("CPU:0"):
            return ReceptiveField(*zip(_measure(model, axis=0), _measure(model, axis=1), strict=True))
    except Exception:  # Keras and TensorFlow raise many types for a network that cannot be copied or resized
        return None


def _measure(model: keras.Model, axis: int) -> tuple[int, int, int]:
    """Return `before`, `after` and `period` along the rows (axis 0) or columns (axis 1). Raises ValueError."""

    def fitting(length: int) -> tuple[int, int]:
        return fitting_size(model, *((length, _WIDTH) if axis == 0 else (_WIDTH, length)))

    network, size = _without_maxima(model), fitting(_LENGTH)
    image = np.random.default_rng(0).random((*size, model.input_shape[-1]), np.float32).swapaxes(0, axis)
    # Outputs of strided layers have every `period`-th size, so only such images fit.
    period = fitting(size[axis] + 1)[axis] - size[axis]

    def outputs(image: np.ndarray) -> np.ndarray:
        return np.asarray(network(image.swapaxes(0, axis)[None], training=False)[0]).swapaxes(0, axis)

    def differing_ends(start: int, stop: int) -> tuple[int, int]:
        """Return the number of rows at both ends of a tile whose outputs are not those of the whole image."""
        outside_is_nan = np.full_like(image, np.nan)
        outside_is_nan[start:stop] = image[start:stop]
        tile, expected = outputs(image[start:stop]), outputs(outside_is_nan)[start:stop]
        is_equal = np.abs(tile - expected) <= _ROUNDING * np.abs(tile).max()  # false for NaN
        differing, half = np.flatnonzero(~is_equal.all(axis=(1, 2))), len(tile) // 2
        before = int(differing[differing < half].max(initial=-1)) + 1
        return before, len(tile) - int(differing[differing >= half].min(initial=len(tile)))

    start = -(-len(image) // 4 // period) * period
    stop = len(image) - start
    # Two starts, because the first could be a multiple of a longer period by chance.
    before, after = np.max([differing_ends(first, stop) for first in (start, start + period)], axis=0)
    if before + after > (stop - start) // 2:
        raise ValueError("the outputs depend on pixels further away than can be measured")
    return int(before), int(after), period


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
