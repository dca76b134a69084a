"""A profile of some training steps, for TensorBoard's profile plugin."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from dae.data.pipeline import Batch
from dae.errors import warn
from dae.training.train_step import TrainLoop

# The first calls of the train loop trace and warm up.
PROFILED_CALL = 4


@contextlib.contextmanager
def profiled(train_loop: TrainLoop, folder: Path, enabled: bool) -> Iterator[TrainLoop]:
    """Yield `train_loop`; if `enabled`, one of its calls is profiled, for the writer `train` in `folder`."""
    calls = 0

    def profiled_loop(batches: Iterator[Batch], num_steps: int, batch_size: int) -> tf.Tensor:
        nonlocal calls
        calls += 1
        if calls != PROFILED_CALL:
            return train_loop(batches, num_steps, batch_size)
        with tf.profiler.experimental.Profile(str(folder / "train")):
            return train_loop(batches, num_steps, batch_size)

    yield profiled_loop if enabled else train_loop
    if enabled and calls < PROFILED_CALL:
        warn("--profile: the run has too few steps to profile any")
