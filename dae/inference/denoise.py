"""Denoising of users' own images, of any size: without noise added, in tiles, and back to their own type."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from dae.data.images import default_range, shape_as_batch
from dae.errors import UsageError
from dae.machine import keras_defaults
from dae.models.fused_layers import Network, fused
from dae.models.sizes import ReceptiveField, fitting_size, output_sizes, receptive_field, view_of_any_size
from dae.workdir.model_files import load_model

# About the most that the values of one layer and of the next take while a batch of tiles is computed, in bytes.
TILE_BYTES = 2**27
# The same for images that cannot be computed in tiles.
WHOLE_BYTES = 2**32
# Small images are computed in batches of about this many pixels, which stay in the processor's cache.
BATCH_PIXELS = 2**18

Progress = Callable[[int], object]
# A part of the rows or columns that is computed, and the part of it that is kept.
Interval = tuple[slice, slice]


@keras_defaults()
def denoise(
    model: keras.Model | str | Path, image: np.ndarray, value_range: tuple[float, float] | None = None
) -> np.ndarray:
    """Return the denoised image, or images, of the same shape and type; no noise is added.

    `model` is a Keras model, a finished run's folder, or a .keras or .h5 file. `image` is [H, W], [H, W, C] (if the
    last side is 1 or 3), [N, H, W] or [N, H, W, C], uint8, uint16 or floats, of any size. `value_range` holds its
    values of black and white (default: 0 and 255 or 65535 for integers, 0 and 1 for floats). Integers are rounded. A
    grey network denoises each channel of a colour image separately; the outputs of a colour network for a grey image
    are averaged over the channels.

    Raises UsageError for another shape or type, for floats that are not finite or far out of the range, and for a size
    that the network does not take, as one with dense layers takes only its own.
    """
    denoiser = _last_denoiser(model) if isinstance(model, keras.Model) else Denoiser(load_model(model))
    return denoiser(image, value_range)


class Denoiser:
    """A model that denoises images of any size. Its functions are compiled once for each type of values.

    A large image is computed in tiles, which overlap so far that the result is that of the whole image; memory is
    bounded by `tile_bytes`.
    """

    def __init__(self, model: keras.Model, tile_bytes: int = TILE_BYTES) -> None:
        self._model = model
        self._tile_bytes = tile_bytes
        self._compiled = functools.cache(self._compile)
        self.channels: int = model.input_shape[-1]
        """1 if the network is one for grey images, 3 for colour."""

    def check(self, height: int, width: int, channels: int) -> None:
        """Raise UsageError if the network cannot denoise images of this size."""
        if self.channels != channels and 1 not in (self.channels, channels):
            raise UsageError(f"the network takes images with {self.channels} channels, got {channels}")
        padded = fitting_size(self._model, height, width)
        bytes_ = self._bytes_per_pixel * math.prod(padded) * (channels if self.channels == 1 else 1)
        if bytes_ > WHOLE_BYTES and self._field is None:
            raise UsageError(
                f"an image of {height} x {width} would take about {bytes_ / 2**30:.0f} GiB, because the network has "
                f"layers that depend on the whole image, which cannot be computed in tiles; cut it into parts"
            )

    def __call__(
        self, image: np.ndarray, value_range: tuple[float, float] | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        """Return what `dae.denoise` returns; `progress` is called with the number of pixels, H W, just denoised."""
        if not isinstance(image, np.ndarray):
            raise UsageError(f"expected images in a NumPy array, got {type(image).__name__}")
        shape, own = image.shape, (self.channels,)
        if shape[3:] != own:
            shape = (1, *shape) if shape[2:] == own else shape_as_batch(shape)
        denoised = np.empty(image.shape, image.dtype)
        self.denoise_into(denoised.reshape(shape), image.reshape(shape), value_range, progress)
        return denoised

    def denoise_into(
        self,
        denoised: np.ndarray,
        images: np.ndarray,
        value_range: tuple[float, float] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Denoise images [N, H, W, C] into an array of the same shape and type; both can be memory-mapped."""
        if images.dtype.type not in (np.uint8, np.uint16) and images.dtype.kind != "f":
            raise UsageError(f"expected an image of uint8, uint16 or floats, got {images.dtype}")
        low, high = default_range(images.dtype) if value_range is None else value_range
        if not -math.inf < low < high < math.inf:
            raise UsageError(f"value_range: expected two finite numbers in ascending order, got {low} and {high}")
        count, height, width, channels = images.shape
        if images.size == 0:
            return
        self.check(height, width, channels)
        padded = fitting_size(self._model, height, width)
        batch, tiles = self._tiles(padded, channels)
        dtype = np.dtype(np.float32 if images.dtype.kind == "f" else images.dtype.type)
        run = self._compiled(dtype, channels)
        for first, ((rows, kept_rows), (columns, kept_columns)) in itertools.product(range(0, count, batch), tiles):
            values = images[first : first + batch, rows, columns]
            _check_values(values, low, high)
            padding = [(0, max(0, side.stop - end)) for side, end in ((rows, height), (columns, width))]
            values = np.pad(values, [(0, 0), *padding, (0, 0)], "symmetric").astype(dtype, copy=False)
            outputs = run(values, tf.constant(low, tf.float32), tf.constant(high - low, tf.float32)).numpy()
            target = denoised[first : first + batch, kept_rows, kept_columns]
            top, left = kept_rows.start - rows.start, kept_columns.start - columns.start
            target[:] = outputs[:, top : top + target.shape[1], left : left + target.shape[2]]
            if progress is not None:
                progress(math.prod(target.shape[:3]))

    def _compile(self, dtype: np.dtype, channels: int) -> Callable[..., tf.Tensor]:
        """Return the function from [n, H, W, C], black, and white - black to the denoised values of the same type."""
        sides = view_of_any_size(self._model).input_shape[1:3]
        spec, number = tf.TensorSpec([None, *sides, channels], dtype), tf.TensorSpec([], tf.float32)

        def compute(values: tf.Tensor, low: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
            noisy = (tf.cast(values, tf.float32) - low) / scale
            denoised = low + scale * _in_channels(fused(self._model, training=False), noisy, self.channels, channels)
            if dtype.kind == "f":
                return denoised
            return tf.cast(tf.clip_by_value(tf.round(denoised), 0, float(np.iinfo(dtype).max)), dtype)

        return tf.function(compute, input_signature=[spec, number, number])

    @functools.cached_property
    def _field(self) -> ReceptiveField | None:
        return receptive_field(self._model)  # takes up to a second, which small images need not wait for

    @functools.cached_property
    def _bytes_per_pixel(self) -> float:
        """The most that the outputs of two consecutive layers take for each pixel of the image."""
        size = self._model.input_shape[1:3]
        if None in size:
            size = fitting_size(self._model, *(side or 64 for side in size))
        sizes = [math.prod(size) * self.channels, *(values for _, values in output_sizes(self._model, *size))]
        return 4 * max(map(sum, itertools.pairwise(sizes))) / math.prod(size)

    def _tiles(self, padded: tuple[int, int], channels: int) -> tuple[int, list[tuple[Interval, ...]]]:
        """Return how many images of this size are computed at once, and the rows and columns of each tile."""
        work = channels if self.channels == 1 else 1
        pixels = max(1, int(self._tile_bytes / self._bytes_per_pixel / work))
        if math.prod(padded) <= pixels or self._field is None:
            batch = max(1, min(BATCH_PIXELS, pixels) // math.prod(padded))
            return batch, [tuple((slice(0, side), slice(0, side)) for side in padded)]
        rows, columns = (
            _intervals(length, math.isqrt(pixels), before, after, period)
            for length, before, after, period in zip(padded, *self._field, strict=True)
        )
        return 1, list(itertools.product(rows, columns))


# The function of the last model stays compiled.
_last_denoiser = functools.lru_cache(maxsize=1)(Denoiser)


def _intervals(length: int, side: int, before: int, after: int, period: int) -> list[Interval]:
    """Return intervals of about `side` pixels that cover `length`, each with the part of it that is kept.

    They have equal lengths, which equal `length` modulo the period, and start at multiples of it, so that the network
    pads and pools each as it does the whole image. What is kept is at least the receptive field away from their ends.
    """
    overlap = before + after
    side = max(side, 2 * overlap + 4 * period)  # more of the last tile is then image than padding
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    count = math.ceil((length - overlap) / (side - overlap))
    step = math.ceil((length - overlap) / count / period) * period
    size = step + overlap + (length - overlap) % period
    starts = [*range(0, length - size, step), length - size]
    cuts = [0, *(start + before for start in starts[1:]), length]
    return [
        (slice(start, start + size), slice(first, last))
        for start, first, last in zip(starts, cuts, cuts[1:], strict=False)
    ]


def _check_values(values: np.ndarray, low: float, high: float) -> None:
    """Raise UsageError for floats that are not finite or so far out of the range that it must be another."""
    if values.dtype.kind != "f":
        return
    least, most, far = float(values.min()), float(values.max()), 10 * (high - low)
    if not (math.isfinite(least) and math.isfinite(most)):
        raise UsageError("expected finite values, got NaN or infinity")
    if least < low - far or most > high + far:
        raise UsageError(
            f"expected values of about {low:g} (black) to {high:g} (white), got {least:g} to {most:g}; "
            "set the value range"
        )


def _in_channels(network: Network, noisy: tf.Tensor, network_channels: int, channels: int) -> tf.Tensor:
    """Return the denoised images [n, H, W, channels] of a network for `network_channels`."""
    if network_channels == channels:
        return network(noisy).denoised
    if network_channels == 1:
        _, height, width, _ = keras.ops.shape(noisy)
        grey = tf.reshape(tf.transpose(noisy, [0, 3, 1, 2]), [-1, height, width, 1])
        denoised = tf.reshape(network(grey).denoised, [-1, channels, height, width])
        return tf.transpose(denoised, [0, 2, 3, 1])
    denoised = network(tf.repeat(noisy, network_channels, axis=3)).denoised
    return tf.reduce_mean(denoised, axis=3, keepdims=True)
