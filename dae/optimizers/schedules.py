"""Learning-rate schedules: functions `(config, total_steps) -> learning rate`, a number or a Keras schedule."""

from collections.abc import Callable
from typing import TypeAlias

import keras

from dae.config import RunConfig

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


def constant(config: RunConfig, total_steps: int) -> LearningRate:
    """`learning_rate` at every step."""
    return config.learning_rate


def cosine(config: RunConfig, total_steps: int) -> LearningRate:
    """Linear warm-up from 0 over the share `warmup_ratio` of the steps, then a cosine from `learning_rate` down to 0.

    Source: Keras's CosineDecay; Loshchilov and Hutter, SGDR (2017), without restarts.
    """
    warmup_steps = int(config.warmup_ratio * total_steps)
    if warmup_steps == 0:
        return keras.optimizers.schedules.CosineDecay(config.learning_rate, total_steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, total_steps - warmup_steps, warmup_target=config.learning_rate, warmup_steps=warmup_steps
    )


SCHEDULES: dict[str, Callable[[RunConfig, int], LearningRate]] = {"constant": constant, "cosine": cosine}
