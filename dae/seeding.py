"""Stateless seeds: every random number of a run is a function of (seed, purpose, step), and none is global."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import tensorflow as tf


def derive_seed(seed: int, purpose: str) -> int:
    """Derive a seed in [0, 2**31) for one purpose ("noise", "order", ...) of a run.

    Source: NumPy's `SeedSequence`, whose outputs are independent even for neighbouring seeds.
    """
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)
    return int(state[0]) >> 1


@tf.autograph.experimental.do_not_convert
def stateless_seed(seed: int, purpose: str, step: tf.Tensor | int) -> tf.Tensor:
    """Return the seed, int64 of shape [2], for TensorFlow's stateless operations at one step of one purpose."""
    return tf.stack([tf.constant(derive_seed(seed, purpose), tf.int64), tf.cast(step, tf.int64)])


@contextlib.contextmanager
def keras_seed(seed: int) -> Iterator[None]:
    """Make `seed` decide the seeds of initializers and layers that are created in the block without a seed.

    Keras draws these from Python's global random numbers, whose state is restored at the end.
    """
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
