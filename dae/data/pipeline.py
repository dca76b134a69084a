"""The `tf.data` pipeline: from a step number to a (noisy, clean) batch, with noise made on the fly.

Batch number s is a function of (seed, s). So there is no iterator state to save, a pipeline can start at any step, and
neither prefetching nor parallel calls can change a batch.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dae.config import RunConfig
from dae.data import noise, storage
from dae.seeding import stateless_seed

Batch = tuple[tf.Tensor, tf.Tensor]

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
    """Return all (noisy, clean) batches of a run from step `first_step`, counted from 0, to its last.

    `images` are uint8 [N, H, W, C]; batches are float32 [batch, H, W, C] in [0, 1] (noisy ones can leave it if the
    noise is not clipped). Order and noise differ between epochs.
    """
    examples, batch_size = len(images), config.batch_size
    steps = steps_per_epoch(examples, batch_size)
    gather = storage.gather_fn(images)
    corrupt = make_corruption(config, "noise")

    def batch(step: tf.Tensor) -> Batch:
        epoch, position = step // steps, step % steps
        positions = tf.range(position * batch_size, tf.minimum((position + 1) * batch_size, examples))
        order = stateless_seed(config.seed, "order", epoch)
        indices = tf.random.experimental.index_shuffle(positions, order, tf.constant(examples - 1, tf.int64))
        return corrupt(gather(indices), step)

    return _batches(tf.data.Dataset.range(first_step, steps * config.epochs), batch)


def evaluation_batches(images: np.ndarray, config: RunConfig, purpose: str) -> tf.data.Dataset:
    """Return (noisy, clean) batches of all `images` in order; the noise is always the same for one `purpose`."""
    examples, gather, batch_size = len(images), storage.gather_fn(images), _evaluation_batch_size(images)
    corrupt = make_corruption(config, f"{purpose} noise")

    def batch(number: tf.Tensor) -> Batch:
        indices = tf.range(number * batch_size, tf.minimum((number + 1) * batch_size, examples))
        return corrupt(gather(indices), number)

    return _batches(tf.data.Dataset.range(steps_per_epoch(examples, batch_size)), batch)


def sample_batch(images: np.ndarray, config: RunConfig, purpose: str) -> Batch:
    """Return the first of `evaluation_batches`, without holding the other images."""
    return next(iter(evaluation_batches(images[: _evaluation_batch_size(images)], config, purpose)))


def _evaluation_batch_size(images: np.ndarray) -> int:
    return max(MIN_EVALUATION_BATCH, EVALUATION_BATCH_VALUES // math.prod(images.shape[1:]))


def split_batch(shards: int, *tensors: tf.Tensor) -> list[tuple[tf.Tensor, ...]]:
    """Split the tensors of one batch into at most `shards` parts with nearly equal numbers of images, none empty.

    A graph that treats each part separately runs them in parallel, one per core. On two cores a step of `conv` takes
    0.73 of the time (median of three pairs) that it takes unsplit with two threads in each operation.
    """
    images = tensors[0].shape[0]
    shards = min(shards, images)
    edges = [images * shard // shards for shard in range(shards + 1)]
    return [tuple(tensor[start:end] for tensor in tensors) for start, end in itertools.pairwise(edges)]


def make_corruption(config: RunConfig, purpose: str) -> Callable[[tf.Tensor, tf.Tensor], Batch]:
    """Return the function `(pixels, batch number) -> (noisy, clean)` that adds a run's noise, drawn for `purpose`."""
    low, high = config.noise_range
    add_noise = noise.build(config.noise, high)

    def corrupt(pixels: tf.Tensor, number: tf.Tensor) -> Batch:
        clean = tf.cast(pixels, tf.float32) / 255.0
        level: float | tf.Tensor = low
        if low < high:
            one_per_image = (tf.shape(clean)[0], 1, 1, 1)
            seed = stateless_seed(config.seed, f"{purpose} level", number)
            level = tf.random.stateless_uniform(one_per_image, seed, low, high)
        noisy = add_noise(clean, level, stateless_seed(config.seed, purpose, number))
        return tf.clip_by_value(noisy, 0.0, 1.0) if config.clip_noise else noisy, clean

    return corrupt


def _batches(numbers: tf.data.Dataset, batch: Callable[[tf.Tensor], Batch]) -> tf.data.Dataset:
    options = tf.data.Options()
    # Rewriting the graph gains nothing here, and would copy all the images.
    options.experimental_optimization.apply_default_optimizations = False
    batches = numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches.with_options(options)
