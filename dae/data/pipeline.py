"""The `tf.data` pipeline: from a step number to a batch of noisy and clean images, with noise made on the fly.

Batch number s is a function of (seed, s). So there is no iterator state to save, a pipeline can start at any step, and
neither prefetching nor parallel calls can change a batch.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dae.config import RunConfig
from dae.data import noise, storage
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


def training_batches(images: np.ndarray, config: RunConfig, first_step: int = 0) -> tf.data.Dataset:
    """Return all batches of a run from step `first_step`, counted from 0, to its last.

    `images` are uint8 [N, H, W, C]. Order and noise differ between epochs.
    """
    examples, batch_size = len(images), config.batch_size
    steps = steps_per_epoch(examples, batch_size)
    gather = storage.gather_fn(images)
    make_batch = batch_maker(config)

    def batch(step: tf.Tensor) -> Batch:
        epoch, position = step // steps, step % steps
        positions = tf.range(position * batch_size, tf.minimum((position + 1) * batch_size, examples))
        order = stateless_seed(config.seed, "order", epoch)
        indices = tf.random.experimental.index_shuffle(positions, order, tf.constant(examples - 1, tf.int64))
        return make_batch(gather(indices), step)

    return _batches(tf.data.Dataset.range(first_step, steps * config.epochs), batch)


def evaluation_batches(images: np.ndarray, config: RunConfig, purpose: str) -> tf.data.Dataset:
    """Return batches of all `images` in order; all that is random is always the same for one `purpose`."""
    examples, gather, batch_size = len(images), storage.gather_fn(images), _evaluation_batch_size(images)
    make_batch = batch_maker(config, f"{purpose} ")

    def batch(number: tf.Tensor) -> Batch:
        indices = tf.range(number * batch_size, tf.minimum((number + 1) * batch_size, examples))
        return make_batch(gather(indices), number)

    return _batches(tf.data.Dataset.range(steps_per_epoch(examples, batch_size)), batch)


def sample_batch(images: np.ndarray, config: RunConfig, purpose: str) -> Batch:
    """Return the first of `evaluation_batches`, without holding the other images."""
    return next(iter(evaluation_batches(images[: _evaluation_batch_size(images)], config, purpose)))


def _evaluation_batch_size(images: np.ndarray) -> int:
    return max(MIN_EVALUATION_BATCH, EVALUATION_BATCH_VALUES // math.prod(images.shape[1:]))


def split_batch(batch: Batch, shards: int) -> list[Batch]:
    """Split a batch into at most `shards` parts with nearly equal numbers of images, none empty, and seeds that differ.

    A graph that treats each part separately runs them in parallel, one per core. On two cores a step of `conv` takes
    0.73 of the time (median of three pairs) that it takes unsplit with two threads in each operation.
    """
    images = batch.clean.shape[0]
    shards = min(shards, images)
    edges = [images * shard // shards for shard in range(shards + 1)]
    return [
        part_of(batch, start, end)._replace(seed=tf.random.experimental.stateless_fold_in(batch.seed, shard))
        for shard, (start, end) in enumerate(itertools.pairwise(edges))
    ]


def part_of(batch: Batch, start: int, end: int) -> Batch:
    """Return the part of a batch from the image number `start` to that before `end`, with the same seed."""
    return Batch(batch.noisy[start:end], batch.clean[start:end], batch.noise_level[start:end], batch.seed)


def batch_maker(config: RunConfig, purpose: str = "") -> Callable[[tf.Tensor, tf.Tensor], Batch]:
    """Return the function from pixels, uint8 [batch, H, W, C], and a batch's number to the batch.

    All that is random is a function of that number, the seed of `config` and the `purpose`.
    """
    low, high = config.noise_range
    corrupt = corruption(config)

    def make_batch(pixels: tf.Tensor, number: tf.Tensor) -> Batch:
        clean = tf.cast(pixels, tf.float32) / 255.0
        one_per_image = (tf.shape(clean)[0], 1, 1, 1)
        level: float | tf.Tensor = low
        if low < high:
            seed = stateless_seed(config.seed, f"{purpose}noise level", number)
            level = tf.random.stateless_uniform(one_per_image, seed, low, high)
        noisy = corrupt(clean, level, stateless_seed(config.seed, f"{purpose}noise", number))
        seed = stateless_seed(config.seed, f"{purpose}loss", number)
        return Batch(noisy, clean, tf.broadcast_to(level, one_per_image), seed)

    return make_batch


def corruption(config: RunConfig) -> noise.Noise:
    """Return the noise model of `config`, followed by clipping to [0, 1] if `config` says so."""
    add_noise = noise.build(config.noise, config.noise_range[1])
    if not config.clip_noise:
        return add_noise
    return lambda clean, level, seed: tf.clip_by_value(add_noise(clean, level, seed), 0.0, 1.0)


def _batches(numbers: tf.data.Dataset, batch: Callable[[tf.Tensor], Batch]) -> tf.data.Dataset:
    options = tf.data.Options()
    # Rewriting the graph gains nothing here, and would copy all the images.
    options.experimental_optimization.apply_default_optimizations = False
    batches = numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches.with_options(options)
