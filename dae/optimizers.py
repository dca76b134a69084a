"""Adam, and how its learning rate goes over a run."""

from collections.abc import Callable
from typing import Any

import keras

from dae.config import RunConfig
from dae.errors import choose


def constant(config: RunConfig, steps: int) -> float:
    """`learning_rate` at every step."""
    return config.learning_rate


def cosine(config: RunConfig, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """From 0 up to `learning_rate` in `warmup_steps`, then down to 0 at the last step, along a cosine.

    Source: Keras's CosineDecay; Loshchilov and Hutter, SGDR (2017), without restarts.
    """
    if config.warmup_steps == 0:
        return keras.optimizers.schedules.CosineDecay(config.learning_rate, steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        max(1, steps - config.warmup_steps),
        warmup_target=config.learning_rate,
        warmup_steps=config.warmup_steps,
    )


SCHEDULES: dict[str, Callable[[RunConfig, int], Any]] = {"constant": constant, "cosine": cosine}


def build(config: RunConfig, steps: int) -> keras.optimizers.Optimizer:
    """Adam for a run of so many steps; raises UsageError for an unknown `schedule`."""
    return keras.optimizers.Adam(choose(SCHEDULES, config.schedule, "--schedule")(config, steps))
