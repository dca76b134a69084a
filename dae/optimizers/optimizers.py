"""The optimizers and the learning-rate schedules by name.

A schedule is a function `(config, total_steps) -> learning rate`, a number or a Keras schedule.
"""

from collections.abc import Callable
from typing import TypeAlias

import keras

from dae.config import RunConfig
from dae.errors import lookup
from dae.optimizers.adam import Adam
from dae.optimizers.soap import Soap

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


def cosine(config: RunConfig, total_steps: int) -> LearningRate:
    """Linear warm-up from 0 over the fraction `warmup_ratio` of the steps, then a cosine from there down to 0.

    Source: Keras's CosineDecay; Loshchilov and Hutter, SGDR (2017), without restarts.
    """
    warmup_steps = int(config.warmup_ratio * total_steps)
    first, target = (0.0, config.learning_rate) if warmup_steps else (config.learning_rate, None)
    return keras.optimizers.schedules.CosineDecay(
        first, total_steps - warmup_steps, warmup_target=target, warmup_steps=warmup_steps
    )


SCHEDULES: dict[str, Callable[[RunConfig, int], LearningRate]] = {
    "constant": lambda config, total_steps: config.learning_rate,
    "cosine": cosine,
}
OPTIMIZERS: dict[str, type[Adam | Soap]] = {"adam": Adam, "soap": Soap}


def build(config: RunConfig, total_steps: int) -> keras.optimizers.Optimizer:
    """Return the optimizer that `config` names, with its schedule over `total_steps` steps.

    Gradients are clipped by the train state, not by the optimizer. Raises UsageError for an unknown optimizer or
    schedule.
    """
    kind = lookup(OPTIMIZERS, config.optimizer, "--optimizer")
    schedule = lookup(SCHEDULES, config.schedule, "--schedule")
    return kind(schedule(config, total_steps), beta_2=config.adam_beta_2)
