"""Optimizers, and how their learning rate goes over a run."""

from collections.abc import Callable
from typing import Any

import keras

from dae.config import RunConfig
from dae.errors import UsageError, choose
from dae.soap import Soap


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
OPTIMIZERS: dict[str, type[keras.optimizers.Adam]] = {"adam": keras.optimizers.Adam, "soap": Soap}


def build(config: RunConfig, steps: int) -> keras.optimizers.Optimizer:
    """The optimizer that `config` names, for a run of so many steps.

    Raises UsageError for an unknown optimizer or schedule, or too long a warm-up.
    """
    optimizer = choose(OPTIMIZERS, config.optimizer, "--optimizer")
    rate = choose(SCHEDULES, config.schedule, "--schedule")(config, steps)
    return optimizer(rate, beta_2=config.adam_beta_2, global_clipnorm=config.max_gradient_norm)
