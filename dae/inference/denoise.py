"""Denoising of users' own images, of any size: without noise added, in tiles, and back to their own type."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from dae.data.images import default_range, shape_as_batch
from dae.errors import UsageError
from dae.models.fused_layers import fused
from dae.models.receptive_field import receptive_field
from dae.models.sizes import fitting_size, layers_at, mirrored, view_of_any_size
from dae.runtime import cores
from dae.workdir.model_files import load_model

# About the most that the values of one layer and of the next take while a batch of tiles is computed, in bytes.
TILE_BYTES = 2**27
# The same for images that cannot be computed in tiles.
WHOLE_BYTES = 2**32
# Small images are computed in batches of about this many pixels, which stay in the processor's cache.
BATCH_PIXELS = 2**18

Progress = Callable[[int], object]


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
    if not isinstance(model, keras.Model):
        return Denoiser(load_model(model))(image, value_range)
    return _denoiser(model)(image, value_range)


@functools.lru_cache(maxsize=1)
def _denoiser(model: keras.Model) -> "Denoiser":
    """Return a denoiser for the model; that of the last model stays compiled."""
    return Denoiser(model)


class Denoiser:
    """A model that denoises images of any size. Its functions are compiled once for each type of values.

    A large image is computed in tiles, which overlap so far that the result is that of the whole image; memory is
    bounded by `tile_bytes`.
    """

    def __init__(self, model: keras.Model, tile_bytes: int = TILE_BYTES) -> None:
        self._model = model
        self._takes_any_size = None in view_of_any_size(model).input_shape[1:3]
        self._tile_bytes = tile_bytes
        self._field = receptive_field(model)
        self._compiled = functools.cache(self._compile)
        threads = tf.config.threading.get_intra_op_parallelism_threads() or cores()
        # Parts that are computed in parallel, if an operation does not use all cores itself.
        self._parts = max(1, cores() // threads)
        self.channels: int = model.input_shape[-1]
        """1 if the network is one for grey images, 3 for colour."""

    def check(self, height: int, width: int, channels: int) -> None:
        """Raise UsageError if the network cannot denoise images of this size."""
        if channels not in (1, 3, self.channels):
            raise UsageError(f"expected images with 1 or 3 channels, got {channels}")
        if self.channels != channels and 1 not in (self.channels, channels):
            raise UsageError(f"the network takes images with {self.channels} channels, got {channels}")
        padded = fitting_size(self._model, height, width)
        bytes_ = self._bytes_per_pixel * math.prod(padded) * (channels if self.channels == 1 else 1)
        if self._field is None and bytes_ > WHOLE_BYTES:
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
        shape = image.shape
        if image.ndim != 4:
            shape = (1, *shape) if shape[2:] == (self.channels,) else shape_as_batch(shape)
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
        low, high = _check_range(images.dtype, value_range)
        count, height, width, channels = images.shape
        if images.size == 0:
            return
        self.check(height, width, channels)
        padded = fitting_size(self._model, height, width)
        rows, columns = (mirrored(side, longer) for side, longer in zip((height, width), padded, strict=True))
        batch, tiles = self._tiles(padded, channels)
        run = self._compiled(np.dtype(np.float32 if images.dtype.kind == "f" else images.dtype.type), channels)
        groups = [(first, tile) for first in range(0, count, batch) for tile in tiles]
        # If one image has many tiles, these are computed in groups.
        size = self._parts if batch == 1 else 1
        for start in range(0, len(groups), size):
            group = groups[start : start + size]
            values = np.concatenate(
                [_cut(images[first : first + batch], rows[tile.rows], columns[tile.columns]) for first, tile in group]
            )
            _check_values(values, low, high)
            outputs = run(values, low, high)
            for index, (first, tile) in enumerate(group):
                output = outputs if size == 1 else outputs[index : index + 1]
                _place(denoised[first : first + batch], output, tile)
            if progress is not None:
                progress(
                    sum(tile.kept_pixels(height, width) * len(images[first : first + batch]) for first, tile in group)
                )

    def _compile(self, dtype: np.dtype, channels: int) -> Callable[[np.ndarray, float, float], np.ndarray]:
        """Return the function from [n, H, W, C] and the range to the denoised values of the same type."""

        @tf.function
        def compute(values: tf.Tensor, low: tf.Tensor, scale: tf.Tensor, parts: int) -> tf.Tensor:
            network = fused(self._model, training=False)
            count = tf.shape(values)[0]
            outputs = []
            for part in range(parts):
                noisy = values[part * count // parts : (part + 1) * count // parts] if parts > 1 else values
                outputs.append(_convert(self.channels, channels, noisy, low, scale, lambda x: network(x).denoised))
            joined = tf.concat(outputs, axis=0) if parts > 1 else outputs[0]
            if dtype.kind == "f":
                return joined
            return tf.cast(tf.clip_by_value(tf.round(joined), 0, float(np.iinfo(dtype).max)), dtype)

        sides = (None, None) if self._takes_any_size else self._model.input_shape[1:3]
        spec = tf.TensorSpec([None, *sides, channels], dtype)
        number = tf.TensorSpec([], tf.float32)
        concrete = functools.cache(lambda parts: compute.get_concrete_function(spec, number, number, parts))

        def run(values: np.ndarray, low: float, high: float) -> np.ndarray:
            parts = min(self._parts, len(values))
            values = tf.constant(np.ascontiguousarray(values, dtype))
            return concrete(parts)(values, tf.constant(low, tf.float32), tf.constant(high - low, tf.float32)).numpy()

        return run

    @functools.cached_property
    def _bytes_per_pixel(self) -> float:
        """The most that the inputs and outputs of a layer take for each pixel of the image."""
        size = self._model.input_shape[1:3]
        if None in size:
            size = fitting_size(self._model, *(side or 64 for side in size))
        return 4 * max(taken + returned for _, taken, returned in layers_at(self._model, *size)) / math.prod(size)

    def _tiles(self, padded: tuple[int, int], channels: int) -> tuple[int, list["_Tile"]]:
        """Return how many images of this size are computed at once, and the tiles of each."""
        work = channels if self.channels == 1 else 1
        pixels = max(1, int(self._tile_bytes / self._bytes_per_pixel / work / self._parts))
        if self._field is None or math.prod(padded) <= pixels:
            whole = _Tile(slice(0, padded[0]), slice(0, padded[1]), slice(0, padded[0]), slice(0, padded[1]))
            batch = min(BATCH_PIXELS * self._parts, pixels * self._parts) // math.prod(padded)
            return max(1, batch), [whole]
        side = math.isqrt(pixels)
        rows, columns = (
            _intervals(length, side, before, after, period)
            for length, before, after, period in zip(padded, *self._field, strict=True)
        )
        return 1, [
            _Tile(row, column, kept_row, kept_column) for row, kept_row in rows for column, kept_column in columns
        ]


class _Tile(NamedTuple):
    """A part of a padded image that is computed, and the part of it that is kept, in pixels of the image."""

    rows: slice
    columns: slice
    kept_rows: slice
    kept_columns: slice

    def kept_pixels(self, height: int, width: int) -> int:
        """Return the number of kept pixels that are not padding."""
        return len(range(height)[self.kept_rows]) * len(range(width)[self.kept_columns])


def _intervals(length: int, side: int, before: int, after: int, period: int) -> list[tuple[slice, slice]]:
    """Return intervals of about `side` pixels that cover `length`, each with the part of it that is kept.

    They have equal lengths, which equal `length` modulo the period, and start at multiples of it, so that the network
    pads and pools each as it does the whole image. What is kept is at least the receptive field away from their ends.
    """
    overlap = before + after
    side = max(side, 2 * overlap + period)
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    count = math.ceil((length - overlap) / (side - overlap))

    def step(size: int) -> int:
        return (size - overlap) // period * period

    size = next(
        size
        for size in range(overlap + period + (length - overlap) % period, length + 1, period)
        if (count - 1) * step(size) + size >= length or size + period > length
    )
    starts = [*range(0, length - size, step(size)), length - size]
    cuts = [0, *(start + before for start in starts[1:]), length]
    return [
        (slice(start, start + size), slice(first, last))
        for start, first, last in zip(starts, cuts, cuts[1:], strict=False)
    ]


def _check_range(dtype: np.dtype, value_range: tuple[float, float] | None) -> tuple[float, float]:
    if dtype.type not in (np.uint8, np.uint16) and dtype.kind != "f":
        raise UsageError(f"expected an image of uint8, uint16 or floats, got {dtype}")
    low, high = default_range(dtype) if value_range is None else value_range
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"value_range: expected two finite numbers in ascending order, got {low} and {high}")
    return low, high


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


def _cut(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the pixels of these rows and columns of images [N, H, W, C], without a copy where they are contiguous."""
    return _take(_take(images, rows, 1), columns, 2)


def _take(images: np.ndarray, indices: np.ndarray, axis: int) -> np.ndarray:
    if indices[-1] - indices[0] == len(indices) - 1:
        part = slice(indices[0], indices[-1] + 1)
        return images[:, part] if axis == 1 else images[:, :, part]
    return np.take(images, indices, axis)


def _place(denoised: np.ndarray, output: np.ndarray, tile: _Tile) -> None:
    """Write the kept part of a tile's output [N, h, w, C] into images [N, H, W, C]."""
    _, height, width, _ = denoised.shape
    top, left = tile.rows.start, tile.columns.start
    rows, columns = range(height)[tile.kept_rows], range(width)[tile.kept_columns]
    denoised[:, rows.start : rows.stop, columns.start : columns.stop] = output[
        :, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left
    ]


def _convert(
    network_channels: int,
    channels: int,
    values: tf.Tensor,
    low: tf.Tensor,
    scale: tf.Tensor,
    network: Callable[[tf.Tensor], tf.Tensor],
) -> tf.Tensor:
    """Return the denoised values, float32 [n, H, W, C] in their own range, of a network for [0, 1]."""
    noisy = (tf.cast(values, tf.float32) - low) / scale
    if network_channels == channels:
        denoised = network(noisy)
    elif network_channels == 1:
        shape = tf.shape(noisy)
        each = tf.reshape(tf.transpose(noisy, [0, 3, 1, 2]), [-1, shape[1], shape[2], 1])
        denoised = tf.reshape(network(each), [shape[0], channels, shape[1], shape[2]])
        denoised = tf.transpose(denoised, [0, 2, 3, 1])
    else:
        denoised = tf.reduce_mean(network(tf.repeat(noisy, network_channels, axis=3)), axis=3, keepdims=True)
    return low + scale * denoised
