"""Adam, and how its learning rate goes over a run."""

from collections.abc import Callable
from typing import Any

import keras

from dae.config import RunConfig
from dae.errors import UsageError, choose


def constant(config: RunConfig, steps: int) -> float:
    """`learning_rate` at every step."""
    return config.learning_rate


def cosine(config: RunConfig, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """From 0 up to `learning_rate` in `warmup_steps`, then down to 0 at the last step, along a cosine.

    Source: Keras's CosineDecay; Loshchilov and Hutter, SGDR (2017), without restarts.
    """
    warmup = config.warmup_steps
    if warmup == 0:
        return keras.optimizers.schedules.CosineDecay(config.learning_rate, steps)
    if warmup >= steps:
        raise UsageError(f"--warmup-steps: is {warmup}, but the whole run has {steps} steps; give it fewer")
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=config.learning_rate, warmup_steps=warmup
    )


SCHEDULES: dict[str, Callable[[RunConfig, int], Any]] = {"constant": constant, "cosine": cosine}


def build(config: RunConfig, steps: int) -> keras.optimizers.Optimizer:
    """Adam for a run of so many steps; raises UsageError for an unknown schedule or too long a warm-up."""
    rate = choose(SCHEDULES, config.schedule, "--schedule")(config, steps)
    return keras.optimizers.Adam(rate, beta_2=config.adam_beta_2, global_clipnorm=config.max_gradient_norm)
