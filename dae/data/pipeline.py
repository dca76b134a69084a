"""The `tf.data` pipeline: from a step number to a batch of noisy and clean images, with noise made on the fly.

Batch number s is a function of (seed, s), with all that is random about it: shuffling, patches, augmentation, noise
levels and noise. So there is no iterator state to save, a pipeline can start at any step, and neither prefetching nor
parallel calls nor the number of devices and workers can change a batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dae.config import RunConfig
from dae.data import noise, storage
from dae.data.images import Images, example_shape, examples_per_epoch, examples_per_image
from dae.seeding import stateless_seed


class Batch(NamedTuple):
    """A batch of noisy and clean images, with their noise levels and a seed."""

    noisy: tf.Tensor
    """Float32 [batch, H, W, C]; in [0, 1], unless the noise is not clipped."""
    clean: tf.Tensor
    """Float32 [batch, H, W, C] in [0, 1]."""
    noise_level: tf.Tensor
    """Float32 [batch, 1, 1, 1]: the level of each image in the unit of its noise model (gaussian: the deviation)."""
    seed: tf.Tensor
    """Int64 [2]: the seed of whatever else is random about the batch, such as the masks of a loss."""

    def images(self, start: int, end: int) -> "Batch":
        """Return the images with indices in [start, end), with the same seed."""
        return Batch(self.noisy[start:end], self.clean[start:end], self.noise_level[start:end], self.seed)

    def of_size(self, size: int) -> "Batch":
        """Return the batch, which must have `size` images, with this number in its static shape."""
        shape = [size, *self.clean.shape[1:]]
        noisy, clean = tf.ensure_shape(self.noisy, shape), tf.ensure_shape(self.clean, shape)
        return Batch(noisy, clean, tf.ensure_shape(self.noise_level, [size, 1, 1, 1]), self.seed)


def batch_spec(shape: tuple[int, ...]) -> Batch:
    """Return the tensor specs of a batch of images of shape (batch, H, W, C)."""
    images = tf.TensorSpec(shape)
    return Batch(images, images, tf.TensorSpec([shape[0], 1, 1, 1]), tf.TensorSpec([2], tf.int64))


# Evaluation draws noise for this many values at once, 500 MNIST images, but for at least ten images. It is independent
# of --batch-size, so that runs with the same seed are evaluated on the same noise.
EVALUATION_BATCH_VALUES, MIN_EVALUATION_BATCH = 500 * 28 * 28, 10


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of batches in one pass over `examples` images; the last one can be smaller."""
    return -(-examples // batch_size)


def equal_batches(examples: int, batch_size: int, step: int) -> tuple[int, int]:
    """Return how many batches from `step` to the end of its epoch have equal sizes, and that size."""
    full, remainder = divmod(examples, batch_size)
    position = step % steps_per_epoch(examples, batch_size)
    return (full - position, batch_size) if position < full else (1, remainder)


def training_batches(images: Images, config: RunConfig, first_step: int = 0) -> tf.data.Dataset:
    """Return all batches of a run from step `first_step`, counted from 0, to its last.

    Shuffling, patches, augmentation and noise differ between epochs.
    """
    examples, batch_size = examples_per_epoch(images, config), config.batch_size
    steps = steps_per_epoch(examples, batch_size)
    gather, make_batch = _training_gather(images, config), batch_maker(images, config)

    def batch(step: tf.Tensor) -> Batch:
        epoch, position = step // steps, step % steps
        positions = tf.range(position * batch_size, tf.minimum((position + 1) * batch_size, examples))
        order = stateless_seed(config.seed, "order", epoch)
        indices = tf.random.experimental.index_shuffle(positions, order, tf.constant(examples - 1, tf.int64))
        return make_batch(gather(indices, step), step)

    return _batches(tf.data.Dataset.range(first_step, steps * config.epochs), batch)


def _training_gather(images: Images, config: RunConfig) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """Return the function from the numbers of examples [batch] and the step to their pixels [batch, H, W, C]."""
    if config.patch_size is None and not config.augment:
        gather = storage.gather_fn(images.pixels)
        return lambda examples, step: gather(examples)
    cut = _patch_cutter(images)
    size = example_shape(images, config)[:2]
    ends = tf.constant(np.cumsum(examples_per_image(images, config)))
    shapes = tf.constant(images.shapes)

    def gather_patches(examples: tf.Tensor, step: tf.Tensor) -> tf.Tensor:
        indices = tf.searchsorted(ends, examples, side="right", out_type=tf.int64)
        room = tf.cast(tf.gather(shapes, indices) - size, tf.float32) + 1
        uniform = tf.random.stateless_uniform(tf.shape(room), stateless_seed(config.seed, "patches", step))
        corners = tf.cast(tf.minimum(tf.floor(uniform * room), room - 1), tf.int64)
        symmetries = None
        if config.augment:
            count = 8 if size[0] == size[1] else 4
            seed = stateless_seed(config.seed, "symmetries", step)
            symmetries = tf.random.stateless_uniform(tf.shape(indices), seed, 0, count, tf.int64)
        return cut(indices, corners, size, symmetries)

    return gather_patches


def _patch_cutter(images: Images) -> Callable[..., tf.Tensor]:
    """Return the function from numbers of images [batch], upper left corners [batch, 2] and a size to patches.

    `symmetries`, int64 [batch] in [0, 8): flip left-right (bit 0), flip up-down (bit 1), transpose (bit 2).
    """
    gather = storage.gather_fn(images.rows)
    starts = tf.constant(images.bounds[:-1])
    widths = tf.constant(np.ascontiguousarray(images.shapes[:, 1]))

    def cut(
        indices: tf.Tensor, corners: tf.Tensor, size: tuple[int, int], symmetries: tf.Tensor | None = None
    ) -> tf.Tensor:
        row, column = tf.meshgrid(*(tf.range(side, dtype=tf.int64) for side in size), indexing="ij")
        if symmetries is not None:
            bits = tf.reshape(symmetries, [-1, 1, 1])
            row = tf.where(bits & 2 > 0, size[0] - 1 - row, row)
            column = tf.where(bits & 1 > 0, size[1] - 1 - column, column)
            row, column = tf.where(bits & 4 > 0, column, row), tf.where(bits & 4 > 0, row, column)
        positions = (tf.gather(starts, indices), tf.gather(widths, indices), *tf.unstack(corners, axis=1))
        start, width, top, left = (tf.reshape(position, [-1, 1, 1]) for position in positions)
        return gather(start + (top + row) * width + left + column)

    return cut


def evaluation_batches(
    images: Images, config: RunConfig, purpose: str, worker: int = 0, workers: int = 1
) -> tf.data.Dataset:
    """Return batches of `images`, whole, in order; all that is random is always the same for one `purpose`.

    Images of several sizes come one by one. Worker i of n gets the batches i, i + n, i + 2 n and so on.
    """
    make_batch = batch_maker(images, config, f"{purpose} ")
    examples, batch_size = len(images), evaluation_batch_size(images, config)
    gather = storage.gather_fn(images.rows)
    shapes, bounds = tf.constant(images.shapes), tf.constant(images.bounds)

    def batch(number: tf.Tensor) -> Batch:
        first, end = number * batch_size, tf.minimum((number + 1) * batch_size, examples)
        height, width = images.image_shape[:2] if images.sizes is None else tf.unstack(shapes[first])
        pixels = gather(tf.range(bounds[first], bounds[end]))
        return make_batch(tf.reshape(pixels, [-1, height, width, images.pixels.shape[-1]]), number)

    numbers = tf.data.Dataset.range(worker, steps_per_epoch(examples, batch_size), workers)
    return _batches(numbers, batch)


def sample_batch(images: Images, config: RunConfig, purpose: str) -> Batch:
    """Return a few images of one size: the first of `evaluation_batches`, or the patches in the centre of images.

    If all images are smaller than a patch, the first of them are returned whole: one, if they have several sizes.
    """
    side, channels = config.patch_size, images.pixels.shape[-1]
    large = np.flatnonzero(images.shapes.min(axis=1) >= (side or 0))
    if side is None or not len(large):
        first = images[: evaluation_batch_size(images, config)]
        pixels = tf.constant(first.rows.reshape(-1, *images.shapes[0], channels))
        return batch_maker(images, config, f"{purpose} ")(pixels, tf.constant(0, tf.int64))
    large = large[: max(MIN_EVALUATION_BATCH, EVALUATION_BATCH_VALUES // (side * side * channels))]
    corners = tf.constant((images.shapes[large] - side) // 2)
    pixels = _patch_cutter(images[: large[-1] + 1])(tf.constant(large), corners, (side, side))
    return batch_maker(images, config, f"{purpose} sample ")(pixels, tf.constant(0, tf.int64))


def evaluation_batch_size(images: Images, config: RunConfig) -> int:
    """Return the number of images in a batch of `evaluation_batches`; the last one can be smaller."""
    if images.sizes is not None:
        return 1
    # With patches, whole images may be so large that ten of them do not fit into memory.
    least = MIN_EVALUATION_BATCH if config.patch_size is None else 1
    return max(least, EVALUATION_BATCH_VALUES // math.prod(images.pixels.shape[1:]))


def batch_maker(images: Images, config: RunConfig, purpose: str = "") -> Callable[[tf.Tensor, tf.Tensor], Batch]:
    """Return the function from pixels like those of `images`, [batch, H, W, C], and a batch's number to the batch.

    All that is random is a function of that number, the seed of `config` and the `purpose`. Noise is added to the noisy
    images of pairs, or else to the clean ones; without clean ones to train on, none is added.
    """
    low, high = noise.level_range(config, images.is_noisy, images.noise_level)
    black, white = images.value_range.black, images.value_range.white
    corrupt = noise.corruption(config, high)

    def make_batch(pixels: tf.Tensor, number: tf.Tensor) -> Batch:
        values = tf.cast(pixels, tf.float32)
        values = (values if black == 0 else values - black) / (white - black)
        clean, start = values, values
        if images.is_paired:
            clean, start = tf.split(values, 2, axis=-1)
        one_per_image = (tf.shape(clean)[0], 1, 1, 1)
        level: float | tf.Tensor = low
        if low < high:
            seed = stateless_seed(config.seed, f"{purpose}noise level", number)
            level = tf.random.stateless_uniform(one_per_image, seed, low, high)
        noisy = start
        if images.has_clean and not (config.only_noisy and images.is_paired):
            noisy = corrupt(start, level, stateless_seed(config.seed, f"{purpose}noise", number))
        seed = stateless_seed(config.seed, f"{purpose}loss", number)
        return Batch(noisy, clean, tf.broadcast_to(level, one_per_image), seed)

    return make_batch


def _batches(numbers: tf.data.Dataset, batch: Callable[[tf.Tensor], Batch]) -> tf.data.Dataset:
    options = tf.data.Options()
    # Rewriting the graph gains nothing here, and would copy all the images.
    options.experimental_optimization.apply_default_optimizations = False
    batches = numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches.with_options(options)
