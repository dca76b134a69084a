"""Denoising of users' own images, of any size: without noise added, in tiles, and back to their own type."""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from dae.data import values
from dae.data.images import as_batch
from dae.data.values import ValueRange
from dae.errors import UsageError
from dae.machine import keras_defaults
from dae.models.fused_layers import Network, fused
from dae.models.sizes import fitting_size, receptive_field, view_of_any_size
from dae.workdir.model_files import load_model, value_range_of

# The most pixels of a tile: the outputs of two layers of 16 values per pixel then take 128 MiB. Wider ones get fewer.
TILE_PIXELS = 2**20
# The same for an image that cannot be computed in tiles.
WHOLE_PIXELS = 2**25
# A folder of runs of the package's own models.
PRETRAINED = Path(__file__).parent.parent / "pretrained"
# Small images are computed in batches of about this many pixels, which stay in the processor's cache.
BATCH_PIXELS = 2**18

Progress = Callable[[int], object]
# Along one axis of the image: the rows or columns that a tile computes, and those of them that are kept.
Interval = tuple[slice, slice]


@keras_defaults()
def denoise(
    image: np.ndarray,
    model: keras.Model | str | Path | None = None,
    value_range: tuple[float, float] | None = None,
    axes: str | None = None,
    self_ensemble: bool = False,
) -> np.ndarray:
    """Return the denoised image, or images, of the same shape and type; no noise is added.

    `image` is [H, W], [H, W, C] (if the last dimension is 1 or 3), [N, H, W] or [N, H, W, C], integers or floats, of
    any size; `axes`, such as "YXZ", names other axes, or those of a shape that leaves doubts
    (`dae.data.images.as_batch`). `model` is a Keras model, a run's folder, or a .keras or .h5 file; by default it is
    the package's own for photographs with white Gaussian noise (docs/pretrained.md). `value_range` is (black, white);
    by default it is that of the run if `image` has the type of the run's images, or else 0 to 255 or 65535 for uint8
    and uint16, and 0 to 1 for floats. With `self_ensemble`, the result is the mean over the eight flips and turns of
    the image, which takes eight times as long.

    Computed in float32; the result is clipped to the value range, and rounded for integers. A grey network denoises
    each channel of a colour image separately; the outputs of a colour network for a grey image are averaged over the
    channels.

    Raises UsageError for another shape or type, for values that cannot be in the value range (`dae.data.values.check`),
    and for a size that the network cannot process: one with dense layers takes only the size that it was built for.
    """
    if isinstance(image, keras.Model | str | Path):
        raise UsageError("dae.denoise takes the image first: write dae.denoise(image, model)")
    if isinstance(model, str | Path):
        denoiser = Denoiser(load_model(model), self_ensemble=self_ensemble)
    else:
        denoiser = _last_denoiser(model, self_ensemble=self_ensemble)
    return denoiser(image, value_range, axes=axes)


class Denoiser:
    """A model that denoises images of any size. It is compiled once for each number of channels.

    Without a model, it is one of the package's, for grey images or for colour. A large image is computed in tiles,
    of at most about `tile_pixels`, or fewer for wide layers, which overlap so far that the result is that of the whole
    image. With `self_ensemble`, the result is the mean over the eight flips and turns of the image.
    """

    def __init__(
        self, model: keras.Model | None = None, tile_pixels: int = TILE_PIXELS, self_ensemble: bool = False
    ) -> None:
        self._tile_pixels, self._self_ensemble = tile_pixels, self_ensemble
        self._is_pretrained = model is None
        self._model = load_model(PRETRAINED / "grey") if model is None else model
        self._trained_on = value_range_of(self._model)
        self._compiled = functools.cache(self._compile)
        self.channels: int = self._model.input_shape[-1]
        """1 if the network is one for grey images, 3 for colour."""

    def of(self, channels: int) -> "Denoiser":
        """Return the denoiser for images with this number of channels: that of a pretrained model, or this one."""
        return self._colour if self._is_pretrained and channels == 3 else self

    @functools.cached_property
    def _colour(self) -> "Denoiser":
        return Denoiser(load_model(PRETRAINED / "colour"), self._tile_pixels, self._self_ensemble)

    def check(self, height: int, width: int, channels: int) -> None:
        """Raise UsageError if the network cannot denoise images of this size."""
        if self.channels != channels and 1 not in (self.channels, channels):
            raise UsageError(f"the network takes images with {self.channels} channels, got {channels}")
        padded = fitting_size(self._model, height, width)
        if self._self_ensemble and fitting_size(self._model, *padded[::-1]) != padded[::-1]:
            raise UsageError(f"--self-ensemble: the network does not take the turned image, {width} x {height}")
        if math.prod(padded) > WHOLE_PIXELS / self._wideness and receptive_field(self._model) is None:
            raise UsageError(
                f"{height} x {width} pixels are too many at once, and the network has layers that depend on the whole "
                "image, which cannot be computed in tiles; cut it into parts"
            )

    def __call__(
        self,
        image: np.ndarray,
        value_range: tuple[float, float] | None = None,
        progress: Progress | None = None,
        axes: str | None = None,
    ) -> np.ndarray:
        """Return what `dae.denoise` returns; `progress` is called with the number of pixels, H W, just denoised."""
        if not isinstance(image, np.ndarray):
            raise UsageError(f"expected images in a NumPy array, got {type(image).__name__}")
        denoised = np.empty(image.shape, image.dtype)
        noisy, target = (as_batch(array, axes, {1, 3, self.channels}) for array in (image, denoised))
        self.of(noisy.shape[-1]).denoise_into(target, noisy, value_range, progress)
        return denoised

    def denoise_into(
        self,
        denoised: np.ndarray,
        images: np.ndarray,
        value_range: tuple[float, float] | None = None,
        progress: Progress | None = None,
        source: str = "images",
    ) -> None:
        """Denoise images [N, H, W, C], which messages call `source`, into an array of the same shape and type."""
        if value_range is None and self._trained_on is not None:
            scale = self._trained_on.of(images.dtype)
        else:
            scale = ValueRange.requested(value_range, images.dtype)
        count, height, width, channels = images.shape
        self.check(height, width, channels)
        values.check(images, scale)
        if scale.is_usual and images.dtype != np.uint8:  # dark photographs of 8 bits are common
            values.warn_if_nearly_black(float(images.max()), scale, f"{source}: ")
        progress = self.adapt(images, scale, progress, source)
        padded = fitting_size(self._model, height, width)
        batch, tiles = self._tiles(padded, channels)
        run = self._compiled(channels)
        for first, ((rows, kept_rows), (columns, kept_columns)) in itertools.product(range(0, count, batch), tiles):
            noisy = images[first : first + batch, rows, columns]
            padding = [(0, max(0, side.stop - end)) for side, end in ((rows, height), (columns, width))]
            outputs = run(scale.to_unit(np.pad(noisy, [(0, 0), *padding, (0, 0)], "symmetric"))).numpy()
            target = denoised[first : first + batch, kept_rows, kept_columns]
            top, left = kept_rows.start - rows.start, kept_columns.start - columns.start
            outputs = outputs[:, top : top + target.shape[1], left : left + target.shape[2]]
            target[:] = scale.from_unit(outputs, target.dtype)
            if progress is not None:
                progress(math.prod(target.shape[:3]))

    def adapt(self, images: np.ndarray, scale: ValueRange, progress: Progress | None, source: str) -> Progress | None:
        """Prepare the model for images [N, H, W, C]; return what to call with the pixels that are denoised then."""
        return progress

    def _compile(self, channels: int) -> Callable[[np.ndarray], tf.Tensor]:
        """Return the compiled function from noisy to denoised images, float32 [n, H, W, channels] in [0, 1]."""
        sides = view_of_any_size(self._model).input_shape[1:3]

        def compute(noisy: tf.Tensor) -> tf.Tensor:
            network = fused(self._model, training=False)
            denoise = functools.partial(_in_channels, network, network_channels=self.channels, channels=channels)
            denoised = _mean_over_flips_and_turns(denoise, noisy) if self._self_ensemble else denoise(noisy)
            return tf.clip_by_value(denoised, 0.0, 1.0)

        return tf.function(compute, input_signature=[tf.TensorSpec([None, *sides, channels])])

    @functools.cached_property
    def _wideness(self) -> float:
        """The largest number of values per pixel that an operation returns, divided by 16; 1 if less or unknown."""
        with contextlib.suppress(Exception):  # users' layers raise any type
            size = fitting_size(self._model, *(side or 256 for side in self._model.input_shape[1:3]))
            outputs = keras.tree.flatten([operation.output for operation in self._model.operations])
            shapes = keras.Model(self._model.inputs, outputs).compute_output_shape((1, *size, self.channels))
            return max(1, *(math.prod(shape) / math.prod(size) / 16 for shape in shapes))
        return 1

    def _tiles(self, padded: tuple[int, int], channels: int) -> tuple[int, list[tuple[Interval, ...]]]:
        """Return how many images of this size are computed at once, and the rows and columns of each tile."""
        pixels = max(1, int(self._tile_pixels / self._wideness / (channels if self.channels == 1 else 1)))
        # The field takes up to a second to measure, which small images need not wait for.
        if math.prod(padded) <= pixels or (field := receptive_field(self._model)) is None:
            batch = max(1, min(BATCH_PIXELS, pixels) // math.prod(padded))
            return batch, [tuple((slice(0, side), slice(0, side)) for side in padded)]
        rows, columns = (_intervals(length, math.isqrt(pixels), *field) for length in padded)
        return 1, list(itertools.product(rows, columns))


def _mean_over_flips_and_turns(denoise: Callable[[tf.Tensor], tf.Tensor], noisy: tf.Tensor) -> tf.Tensor:
    """Return the mean of the denoised images [n, H, W, C] over the eight flips and turns of the noisy ones.

    Source: Timofte, Rothe and Van Gool, Seven Ways to Improve Example-Based Single Image Super Resolution (2016).
    """
    total = tf.zeros_like(noisy)
    for axes, order in itertools.product(([], [1], [2], [1, 2]), ([0, 1, 2, 3], [0, 2, 1, 3])):
        with tf.control_dependencies([total]):  # one after another, so that memory does not grow
            turned = tf.transpose(tf.reverse(noisy, axes), order)
            total += tf.reverse(tf.transpose(denoise(turned), order), axes)
    return total / 8


# The function of the last model stays compiled.
_last_denoiser = functools.lru_cache(maxsize=1)(Denoiser)


def _intervals(length: int, side: int, radius: int, period: int) -> list[Interval]:
    """Return intervals of about `side` pixels that cover `length`, each with the part of it that is kept.

    They have equal lengths, which equal `length` modulo the period, and start at multiples of it, so that the network
    pads and pools each as it does the whole image. What is kept is at least the receptive field away from their ends.
    """
    overlap = 2 * radius
    side = max(side, 2 * overlap + 4 * period)  # more of the last tile is then image than padding
    if length <= side:
        return [(slice(0, length), slice(0, length))]
    count = math.ceil((length - overlap) / (side - overlap))
    step = math.ceil((length - overlap) / count / period) * period
    size = step + overlap + (length - overlap) % period
    starts = [*range(0, length - size, step), length - size]
    cuts = [0, *(start + radius for start in starts[1:]), length]
    return [
        (slice(start, start + size), slice(first, last))
        for start, first, last in zip(starts, cuts, cuts[1:], strict=False)
    ]


def _in_channels(network: Network, noisy: tf.Tensor, *, network_channels: int, channels: int) -> tf.Tensor:
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
