"""Images of other sizes than those that a network was built for."""

import functools

import keras
import tensorflow as tf

from dae.errors import UsageError
from dae.models.fused_layers import Network, Outputs

# Networks that halve their images up to eight times take one of this many consecutive sides.
_SEARCHED = 256


def fits(model: keras.Model, height: int, width: int) -> bool:
    """Return whether `model` returns images of the same size for images of this size."""
    shape = (1, height, width, model.input_shape[-1])
    try:
        return tuple(model.compute_output_shape(shape)) == shape
    except (ValueError, TypeError):  # as raised by a dense layer, or where branches of different sizes meet
        return False


@functools.lru_cache(maxsize=1024)
def fitting_size(model: keras.Model, height: int, width: int) -> tuple[int, int]:
    """Return the size, at least this height and width, to which images must be padded for `model`.

    A network that halves the sides n times takes sides that differ by multiples of 2^n. Raises UsageError if it takes
    no such size, as with a dense layer on all pixels.
    """
    if fits(model, height, width):
        return height, width
    # The sides that fit do not depend on each other, so a square finds each.
    sides = [
        next((side for side in range(least, least + _SEARCHED) if fits(model, side, side)), None)
        for least in (height, width)
    ]
    if sides[0] is None or sides[1] is None or not fits(model, sides[0], sides[1]):
        raise UsageError(f"the model takes images of {model.input_shape[1:]}, not of {height} x {width}")
    return sides[0], sides[1]


def padded(network: Network, model: keras.Model) -> Network:
    """Return `network`, which computes `model`, for images of any static size.

    They are mirrored at the bottom and right up to a size that fits, and the denoised images are cropped.
    """

    def any_size(noisy: tf.Tensor) -> Outputs:
        height, width = noisy.shape[1:3]
        padded_height, padded_width = fitting_size(model, height, width)
        if (padded_height, padded_width) == (height, width):
            return network(noisy)
        paddings = [[0, 0], [0, padded_height - height], [0, padded_width - width], [0, 0]]
        outputs = network(tf.pad(noisy, paddings, "SYMMETRIC"))
        return outputs._replace(denoised=outputs.denoised[:, :height, :width])

    return any_size
