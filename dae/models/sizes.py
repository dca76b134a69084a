"""Images of other sizes than those that a network was built for."""

import contextlib
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dae.errors import UsageError

# Networks that halve their images up to eight times take one of this many consecutive sides, ...
_SEARCHED = 256
# ... and those that halve them up to five times one of as many heights with one of as many widths.
_SEARCHED_RECTANGLES = 32

# The sizes that were found for each model, which lives no longer for it.
_found: weakref.WeakKeyDictionary[keras.Model, dict[tuple[int, int], tuple[int, int]]] = weakref.WeakKeyDictionary()


def any_size(model: keras.Model) -> keras.Model:
    """Return a copy of `model` for images of any size that its layers allow, or `model` itself if they allow only one.

    A network that halves the sides n times takes sides that differ from the original ones by multiples of 2^n.
    """
    copy = _cloned(model)
    if copy is model:
        return model
    copy.set_weights(model.get_weights())
    return copy


@functools.lru_cache(maxsize=16)
def view_of_any_size(model: keras.Model) -> keras.Model:
    """Return the same as `any_size`, but with the very layers of `model`, which keep their weights in common."""

    def shared(layer: keras.layers.Layer) -> keras.layers.Layer:
        return keras.layers.Lambda(enlargement(layer), name=layer.name) if interpolates(layer) else layer

    return _cloned(model, clone_function=shared, recursive=True)


def _cloned(model: keras.Model, **options: Any) -> keras.Model:
    free = _input(model, None, None)
    with contextlib.suppress(ValueError, TypeError):  # as raised by a dense layer on all pixels
        clone = keras.models.clone_model(model, input_tensors=free, **options)
        if clone.outputs[0].shape == clone.inputs[0].shape:
            return clone
    return model


def mirrored(side: int, longer: int) -> np.ndarray:
    """Return the index of each of `longer` pixels of an image that is mirrored at its end, as often as needed."""
    return np.pad(np.arange(side), (0, longer - side), "symmetric")


def _input(model: keras.Model, height: int | None, width: int | None) -> Any:
    """Return an input of this size in the structure that `model` has: a tensor, or a list of one."""
    image = keras.Input((height, width, model.inputs[0].shape[-1]), name="noisy")
    if isinstance(model, keras.Sequential):  # which need not have an attribute `input`
        return image
    return keras.tree.map_structure(lambda _: image, model.input)


def layers_at(model: keras.Model, height: int, width: int) -> Iterator[tuple[keras.layers.Layer, int, int]]:
    """Yield the layers, with the numbers of values that they take and return for an image of this size.

    Models within `model` are taken to get images of this size too, which is the most that is likely.
    """
    if model.input_shape[1:3] != (height, width):
        with keras.StatelessScope(initialize_variables=False):
            model = keras.models.clone_model(model, input_tensors=_input(model, height, width))
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            sides = (side or least for side, least in zip(layer.input_shape[1:3], (height, width), strict=True))
            yield from layers_at(layer, *sides)
        else:
            yield (
                layer,
                *(
                    sum(math.prod(tensor.shape[1:]) for tensor in keras.tree.flatten(tensors))
                    for tensors in (layer.input, layer.output)
                ),
            )


def interpolates(layer: keras.layers.Layer) -> bool:
    """Return whether `layer` enlarges images [batch, H, W, C] otherwise than by repeating pixels."""
    return (
        isinstance(layer, keras.layers.UpSampling2D)
        and layer.interpolation != "nearest"
        and layer.data_format == "channels_last"
    )


def enlargement(layer: keras.layers.UpSampling2D) -> Callable[[Any], tf.Tensor]:
    """Return the function that applies `layer`, but also in a graph that does not know the size, where Keras fails."""

    def enlarge(images: tf.Tensor) -> tf.Tensor:
        _, height, width, _ = keras.ops.shape(images)  # numbers if the graph knows the size
        return tf.image.resize(images, [height * layer.size[0], width * layer.size[1]], layer.interpolation)

    return enlarge


def fits(model: keras.Model, height: int, width: int) -> bool:
    """Return whether `model` returns images of the same size for images of this size."""
    shape = (1, height, width, model.input_shape[-1])
    try:
        return tuple(view_of_any_size(model).compute_output_shape(shape)) == shape
    except (ValueError, TypeError):  # as raised by a dense layer, or where branches of different sizes meet
        return False


def fitting_size(model: keras.Model, height: int, width: int) -> tuple[int, int]:
    """Return the size, at least this height and width, to which images must be padded for `model`.

    Raises UsageError if it takes no such size, or only one other, as with a dense layer on all pixels.
    """
    if (height, width) == model.input_shape[1:3]:
        return height, width
    found = _found.setdefault(model, {})
    if (height, width) not in found:
        found[height, width] = _search(model, height, width)
    return found[height, width]


def _search(model: keras.Model, height: int, width: int) -> tuple[int, int]:
    if fits(model, height, width):
        return height, width
    refused = UsageError(f"the model takes images of {model.input_shape[1:]}, not of {height} x {width}")
    if None not in view_of_any_size(model).input_shape[1:3]:
        raise refused
    # A height that fits does so with any width, so a square finds each; unless the network was built for rectangles of
    # which no square fits.
    rows, columns = (
        next((side for side in range(least, least + _SEARCHED) if fits(model, side, side)), least)
        for least in (height, width)
    )
    if fits(model, rows, columns):
        return rows, columns
    near = itertools.product(range(height, height + _SEARCHED_RECTANGLES), range(width, width + _SEARCHED_RECTANGLES))
    found = next((size for size in near if fits(model, *size)), None)
    if found is None:
        raise refused
    return found
