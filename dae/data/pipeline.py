"""The `tf.data` pipeline: from a step number to a batch of noisy and clean images, with noise made on the fly.

Each shard of batch number s is a function of (seed, s, number of the shard), with all that is random: order, patches,
flips and noise. So there is no iterator state to save, a pipeline can start at any step, each worker makes only its own
shards, and neither prefetching nor parallel calls can change a batch.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dae.config import RunConfig
from dae.data import noise, storage
from dae.data.examples import example_shape, examples_per_epoch, examples_per_image
from dae.data.images import Images, value_range
from dae.replicas import ALONE, Replicas
from dae.seeding import stateless_seed


class Batch(NamedTuple):
    """Images, and what is random about them."""

    noisy: tf.Tensor
    """Float32 [batch, H, W, C]; in [0, 1], unless the noise is not clipped."""
    clean: tf.Tensor
    """Float32 [batch, H, W, C] in [0, 1]."""
    noise_level: tf.Tensor
    """Float32 [batch, 1, 1, 1]."""
    seed: tf.Tensor
    """Int64 [2]: the seed of whatever else is random about the batch, such as the masks of a loss."""


def batch_spec(shape: tuple[int, ...]) -> Batch:
    """Return the types of a batch of images of this shape, (batch, H, W, C)."""
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


def training_batches(
    images: Images, config: RunConfig, first_step: int = 0, replicas: Replicas = ALONE
) -> tf.data.Dataset:
    """Return all batches of a run from step `first_step`, counted from 0, to its last.

    Only the shards of this worker are made. Order, patches, flips and noise differ between epochs.
    """
    examples, batch_size = examples_per_epoch(images, config), config.batch_size
    steps = steps_per_epoch(examples, batch_size)
    shards = config.shards or 1
    gather = _training_gather(images, config)
    makers = {shard: batch_maker(images, config, f"shard {shard} ") for shard in replicas.shards(shards)}

    def batch(step: tf.Tensor) -> Batch:
        epoch, position = step // steps, step % steps
        positions = tf.range(position * batch_size, tf.minimum((position + 1) * batch_size, examples))
        order = stateless_seed(config.seed, "order", epoch)
        # Of all shards, because it is cheap, and not possible for a shard without images.
        indices = tf.random.experimental.index_shuffle(positions, order, tf.constant(examples - 1, tf.int64))
        parts = []
        for shard, make_shard in makers.items():
            start, end = shard_edges(tf.size(indices), shards, shard)
            parts.append(make_shard(gather(indices[start:end], step, f"shard {shard} "), step))
        return joined(parts)._replace(seed=stateless_seed(config.seed, "loss", step))

    return _batches(tf.data.Dataset.range(first_step, steps * config.epochs), batch)


def _training_gather(images: Images, config: RunConfig) -> Callable[[tf.Tensor, tf.Tensor, str], tf.Tensor]:
    """Return the function from the numbers of examples [batch], step and purpose to their pixels [batch, H, W, C].

    With patches, an image has as many examples as `examples_per_image` says.
    """
    if config.patch_size is None and not config.augment:
        gather = storage.gather_fn(images.pixels)
        return lambda examples, step, purpose: gather(examples)
    cut = _patch_cutter(images)
    size = example_shape(images, config)[:2]
    ends = tf.constant(np.cumsum(examples_per_image(images, config)))
    shapes = tf.constant(images.shapes)

    def gather_patches(examples: tf.Tensor, step: tf.Tensor, purpose: str) -> tf.Tensor:
        indices = tf.searchsorted(ends, examples, side="right", out_type=tf.int64)
        room = tf.cast(tf.gather(shapes, indices) - size, tf.float32) + 1
        uniform = tf.random.stateless_uniform(tf.shape(room), stateless_seed(config.seed, f"{purpose}patches", step))
        corners = tf.cast(tf.minimum(tf.floor(uniform * room), room - 1), tf.int64)
        symmetries = None
        if config.augment:
            seed = stateless_seed(config.seed, f"{purpose}symmetries", step)
            count = 8 if size[0] == size[1] else 4
            symmetries = tf.random.stateless_uniform(tf.shape(indices), seed, 0, count, tf.int64)
        return cut(indices, corners, size, symmetries)

    return gather_patches


def _patch_cutter(images: Images) -> Callable[..., tf.Tensor]:
    """Return a function that cuts a patch [H, W] out of each image with the given numbers.

    It takes indices [batch], upper left corners [batch, 2], the size of the patches, and symmetries [batch], of which
    bit 0 mirrors left and right, bit 1 top and bottom, and bit 2 rows and columns; so 0 to 7 are the symmetries of a
    square.
    """
    gather = storage.gather_fn(images.rows)
    starts = tf.constant(np.cumsum(images.shapes.prod(axis=1)) - images.shapes.prod(axis=1))
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
        each = (tf.gather(starts, indices), tf.gather(widths, indices), *tf.unstack(corners, axis=1))
        start, width, top, left = (tf.reshape(one, [-1, 1, 1]) for one in each)
        return gather(start + (top + row) * width + left + column)

    return cut


def evaluation_batches(images: Images, config: RunConfig, purpose: str, replicas: Replicas = ALONE) -> tf.data.Dataset:
    """Return batches of `images`, whole, in order; all that is random is always the same for one `purpose`.

    Images of several sizes come one by one. Worker i of n gets the batches i, i + n, i + 2 n and so on.
    """
    make_batch = batch_maker(images, config, f"{purpose} ")
    examples, batch_size = len(images), evaluation_batch_size(images, config)
    if images.sizes is None:
        gather = storage.gather_fn(images.pixels)
    else:
        rows, shapes = storage.gather_fn(images.pixels), tf.constant(images.sizes)
        ends = tf.constant(np.cumsum(images.sizes.prod(axis=1)))

    def batch(number: tf.Tensor) -> Batch:
        if images.sizes is not None:
            end, shape = tf.gather(ends, number), tf.gather(shapes, number)
            pixels = rows(tf.range(end - tf.reduce_prod(shape), end))
            return make_batch(tf.reshape(pixels, [1, shape[0], shape[1], images.pixels.shape[-1]]), number)
        indices = tf.range(number * batch_size, tf.minimum((number + 1) * batch_size, examples))
        return make_batch(gather(indices), number)

    numbers = tf.data.Dataset.range(replicas.worker, steps_per_epoch(examples, batch_size), replicas.workers)
    return _batches(numbers, batch)


def sample_batch(images: Images, config: RunConfig, purpose: str) -> Batch:
    """Return a few images of one size: the first of `evaluation_batches`, or the patches in the centre of images.

    If all images are smaller than a patch, the first of them is returned whole.
    """
    side = config.patch_size
    large = np.flatnonzero(images.shapes.min(axis=1) >= (side or 0))
    if side is None or not len(large):
        return next(iter(evaluation_batches(images[: evaluation_batch_size(images, config)], config, purpose)))
    values = side * side * images.pixels.shape[-1]
    large = large[: max(MIN_EVALUATION_BATCH, EVALUATION_BATCH_VALUES // values)]
    corners = tf.constant((images.shapes[large] - side) // 2)
    pixels = _patch_cutter(images[: large[-1] + 1])(tf.constant(large), corners, (side, side))
    return batch_maker(images, config, f"{purpose} sample ")(pixels, tf.constant(0, tf.int64))


def evaluation_batch_size(images: Images, config: RunConfig) -> int:
    """Return the number of images in a batch of `evaluation_batches`; the last one can be smaller."""
    if images.sizes is not None:
        return 1
    # Whole images can be much larger than patches of which a batch fits into memory.
    least = MIN_EVALUATION_BATCH if config.patch_size is None else 1
    return max(least, EVALUATION_BATCH_VALUES // math.prod(images.pixels.shape[1:]))


def shard_edges(images: Any, shards: int, shard: int) -> tuple[Any, Any]:
    """Return where shard number `shard` of a batch of `images` starts and ends.

    The shards have nearly equal numbers of images, or none if there are more shards than images.
    """
    return images * shard // shards, images * (shard + 1) // shards


def split_batch(batch: Batch, shards: int, numbers: range | None = None, batch_size: int | None = None) -> list[Batch]:
    """Return the shards of a batch, with seeds that are functions of their numbers.

    `batch` has the images of the shards with these `numbers`, by default all `shards`, of a batch of `batch_size`. A
    graph that treats each shard separately runs them in parallel, one per core. On two cores a step of `conv` takes
    0.73 of the time (median of three pairs) that it takes unsplit with two threads in each operation.
    """
    numbers = range(shards) if numbers is None else numbers
    sizes = shard_sizes(batch_size or batch.clean.shape[0], shards, numbers)
    edges = itertools.pairwise([0, *itertools.accumulate(sizes)])
    return [
        part_of(batch, start, end)._replace(seed=tf.random.experimental.stateless_fold_in(batch.seed, number))
        for number, (start, end) in zip(numbers, edges, strict=True)
    ]


def shard_sizes(batch_size: int, shards: int, numbers: range) -> list[int]:
    """Return how many images the shards with these `numbers` have, of a batch with `shards` in all."""
    return [end - start for start, end in (shard_edges(batch_size, shards, number) for number in numbers)]


def joined(parts: Sequence[Batch]) -> Batch:
    """Return one batch of the images of all `parts`, with the seed of the first."""
    if len(parts) == 1:
        return parts[0]
    noisy, clean, noise_level, seeds = zip(*parts, strict=True)
    noisy, clean, noise_level = (tf.concat(tensors, axis=0) for tensors in (noisy, clean, noise_level))
    return Batch(noisy, clean, noise_level, seeds[0])


def part_of(batch: Batch, start: int, end: int) -> Batch:
    """Return the part of a batch from the image number `start` to that before `end`, with the same seed."""
    return Batch(batch.noisy[start:end], batch.clean[start:end], batch.noise_level[start:end], batch.seed)


def batch_maker(images: Images, config: RunConfig, purpose: str = "") -> Callable[[tf.Tensor, tf.Tensor], Batch]:
    """Return the function from pixels like those of `images`, [batch, H, W, C], and a batch's number to the batch.

    All that is random is a function of that number, the seed of `config` and the `purpose`. Noise is added to the noisy
    images of pairs, or else to the clean ones.
    """
    config = noise.with_noise_level(config, images)
    low, high = config.noise_range
    black, white = value_range(images, config.value_range)
    corrupt = corruption(config)

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
        noisy = corrupt(start, level, stateless_seed(config.seed, f"{purpose}noise", number))
        seed = stateless_seed(config.seed, f"{purpose}loss", number)
        return Batch(noisy, clean, tf.broadcast_to(level, one_per_image), seed)

    return make_batch


def corruption(config: RunConfig) -> noise.Noise:
    """Return the noise model of `config`, followed by clipping to [0, 1] if `config` says so."""
    add_noise = noise.build(config.noise, config.noise_range[1])
    if config.noise in noise.NOISES and config.noise_range[1] == 0:
        add_noise = noise.unchanged  # the same, without drawing random numbers
    if not config.clip_noise:
        return add_noise
    return lambda clean, level, seed: tf.clip_by_value(add_noise(clean, level, seed), 0.0, 1.0)


def _batches(numbers: tf.data.Dataset, batch: Callable[[tf.Tensor], Batch]) -> tf.data.Dataset:
    options = tf.data.Options()
    # Rewriting the graph gains nothing here, and would copy all the images.
    options.experimental_optimization.apply_default_optimizations = False
    batches = numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches.with_options(options)
