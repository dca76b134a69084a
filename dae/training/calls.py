"""Calls of the train loop: how many steps each takes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from dae.data.pipeline import equal_batches
from dae.training.task import Task

# One call of the train loop takes as many steps as process this many pixel values, those of 20 batches of 128 MNIST
# images. Signals and the progress bar are handled only between calls, so a call takes fewer steps of larger images.
VALUES_PER_LOOP = 20 * 128 * 28 * 28


class LoopCall(NamedTuple):
    """A call of the train loop."""

    num_steps: int
    batch_size: int
    is_last: bool
    """True if it ends the epoch."""


def loop_calls(task: Task, step: int) -> Iterator[LoopCall]:
    """Yield the calls of the train loop from `step` to the end of its epoch.

    The batches of a call have one size, and a call ends at each step at which a checkpoint is due.
    """
    config, end = task.config, (step // task.steps_per_epoch + 1) * task.steps_per_epoch
    most = max(1, VALUES_PER_LOOP // (config.batch_size * math.prod(task.model.input_shape[1:])))
    while step < end:
        num_steps, batch_size = equal_batches(task.examples, config.batch_size, step)
        num_steps = min(num_steps, most, task.checkpoint_every - step % task.checkpoint_every)
        step += num_steps
        yield LoopCall(num_steps, batch_size, is_last=step == end)
