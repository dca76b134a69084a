"""Images of other sizes than those that a network was built for."""

import contextlib
import functools
import itertools
import weakref
from typing import Any

import keras
import numpy as np

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
    return _cloned(model, clone_function=lambda layer: layer)


def _cloned(model: keras.Model, **options: Any) -> keras.Model:
    free = keras.Input((None, None, model.input_shape[-1]), name="noisy")
    with contextlib.suppress(ValueError, TypeError):  # as raised by a dense layer on all pixels
        clone = keras.models.clone_model(model, input_tensors=free, **options)
        if clone.outputs[0].shape == clone.inputs[0].shape:
            return clone
    return model


def mirrored(side: int, longer: int) -> np.ndarray:
    """Return the index of each of `longer` pixels of an image that is mirrored at its end, as often as needed."""
    return np.pad(np.arange(side), (0, longer - side), "symmetric")


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
