"""Every random number of a run is a function of (seed, purpose, step); nothing random is global."""

import numpy as np
import tensorflow as tf


def key(seed: int, purpose: str) -> int:
    """A whole number in [0, 2**31) for one purpose ("noise", "order" ...) of a run with `seed`.

    Source: NumPy's `SeedSequence`, which spreads neighbouring seeds and purposes far apart.
    """
    state = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)
    return int(state[0]) >> 1


def stateless_seed(seed: int, purpose: str, step: tf.Tensor | int) -> tf.Tensor:
    """The seed, int64 of shape [2], of TensorFlow's stateless operations at one step of one purpose."""
    return tf.stack([tf.constant(key(seed, purpose), tf.int64), tf.cast(step, tf.int64)])
