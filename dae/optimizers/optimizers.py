"""The optimizers by name."""

import keras

from dae.config import RunConfig
from dae.errors import lookup
from dae.optimizers.adam import Adam
from dae.optimizers.schedules import SCHEDULES
from dae.optimizers.soap import Soap

OPTIMIZERS: dict[str, type[Adam | Soap]] = {"adam": Adam, "soap": Soap}


def build(config: RunConfig, total_steps: int) -> keras.optimizers.Optimizer:
    """Return the optimizer that `config` names, with its schedule over `total_steps` steps.

    Gradients are clipped by the train step, not by the optimizer. Raises UsageError for an unknown optimizer or
    schedule.
    """
    kind = lookup(OPTIMIZERS, config.optimizer, "--optimizer")
    schedule = lookup(SCHEDULES, config.schedule, "--schedule")
    optimizer = kind(schedule(config, total_steps), beta_2=config.adam_beta_2)
    # In float16, gradients smaller than 6e-8 would be 0, so the loss is multiplied by a number as high as possible.
    return keras.optimizers.LossScaleOptimizer(optimizer) if config.precision == "float16" else optimizer
