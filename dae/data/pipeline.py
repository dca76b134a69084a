"""`tf.data`: from step number to (noisy, clean) batch, with the noise made on the fly.

Batch number s depends on nothing but (seed, s): there is no iterator state to save, a pipeline may start at any
step, and prefetching or parallel calls cannot change what comes out.
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

# Evaluation draws the noise of so many values, 500 MNIST images, at once; of large images, of ten. Part of what
# evaluation noise means: two runs with one seed see the same noise whatever their batch sizes.
EVALUATION_BATCH_VALUES, LEAST_EVALUATION_BATCH = 500 * 28 * 28, 10


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Batches in one pass over `examples` images; the last one may be smaller."""
    return -(-examples // batch_size)


def training_batches(images: np.ndarray, config: RunConfig, first_step: int = 0) -> tf.data.Dataset:
    """All (noisy, clean) batches of a run from step `first_step` (counted from 0) to its last.

    `images` is uint8 [N, H, W, C]; batches are float32 [batch, H, W, C] in [0, 1] (the noisy ones outside it too
    where the noise is not clipped). Every epoch has an order and noise of its own.
    """
    examples, batch_size = len(images), config.batch_size
    steps = steps_per_epoch(examples, batch_size)
    pixels = storage.reader(images)
    noised = _noised(config, "noise")

    def batch(step: tf.Tensor) -> Batch:
        epoch, position = step // steps, step % steps
        places = tf.range(position * batch_size, tf.minimum((position + 1) * batch_size, examples))
        order = stateless_seed(config.seed, "order", epoch)
        shuffled = tf.random.experimental.index_shuffle(places, order, tf.constant(examples - 1, tf.int64))
        return noised(pixels(shuffled), step)

    return _batches(tf.data.Dataset.range(first_step, steps * config.epochs), batch)


def evaluation_batches(images: np.ndarray, config: RunConfig, purpose: str) -> tf.data.Dataset:
    """(noisy, clean) batches of all `images` in their order; for one `purpose` the same noise every time."""
    examples, pixels, batch_size = len(images), storage.reader(images), _evaluation_batch_size(images)
    noised = _noised(config, f"{purpose} noise")

    def batch(number: tf.Tensor) -> Batch:
        places = tf.range(number * batch_size, tf.minimum((number + 1) * batch_size, examples))
        return noised(pixels(places), number)

    return _batches(tf.data.Dataset.range(steps_per_epoch(examples, batch_size)), batch)


def first_evaluation_batch(images: np.ndarray, config: RunConfig, purpose: str) -> Batch:
    """The first of `evaluation_batches`, without holding the other images."""
    return next(iter(evaluation_batches(images[: _evaluation_batch_size(images)], config, purpose)))


def _evaluation_batch_size(images: np.ndarray) -> int:
    return max(LEAST_EVALUATION_BATCH, EVALUATION_BATCH_VALUES // math.prod(images.shape[1:]))


def micro_batches(parts: int, *tensors: tf.Tensor) -> list[tuple[tf.Tensor, ...]]:
    """Tensors of one batch, cut into so many parts of nearly the same number of images, none of them empty.

    A graph that treats each part on its own runs them side by side, one per core. On two cores a step of `conv` then
    takes 0.73 of the time (median of three pairs) that it takes whole, with two threads inside each operation.
    """
    images = tensors[0].shape[0]
    parts = min(parts, images)
    edges = [images * part // parts for part in range(parts + 1)]
    return [tuple(tensor[start:end] for tensor in tensors) for start, end in itertools.pairwise(edges)]


def _batches(numbers: tf.data.Dataset, batch: Callable[[tf.Tensor], Batch]) -> tf.data.Dataset:
    options = tf.data.Options()
    # Rewriting the graph, from which this one gains nothing, would copy all the images.
    options.experimental_optimization.apply_default_optimizations = False
    batches = numbers.map(batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    return batches.with_options(options)


def _noised(config: RunConfig, purpose: str) -> Callable[[tf.Tensor, tf.Tensor], Batch]:
    """The function `(pixels, number of the batch) -> (noisy, clean)` of a run's noise, which is drawn for `purpose`."""
    low, high = config.noise_range
    add_noise = noise.named(config.noise, high)

    def noised(pixels: tf.Tensor, number: tf.Tensor) -> Batch:
        clean = tf.cast(pixels, tf.float32) / 255.0
        level: float | tf.Tensor = low
        if low < high:
            one_each = (tf.shape(clean)[0], 1, 1, 1)
            seed = stateless_seed(config.seed, f"{purpose} level", number)
            level = tf.random.stateless_uniform(one_each, seed, low, high)
        noisy = add_noise(clean, level, stateless_seed(config.seed, purpose, number))
        return tf.clip_by_value(noisy, 0.0, 1.0) if config.clip_noise else noisy, clean

    return noised
