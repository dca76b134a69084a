"""The optimizers and the learning-rate schedules by name, and those of users' files.

A schedule is a function `(learning_rate, total_steps) -> learning rate`, a number or a Keras schedule. An optimizer is
a function of that learning rate which returns a Keras optimizer. docs/optimizers.md
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import keras

from dae import plugins
from dae.config import RunConfig
from dae.errors import UsageError, shown
from dae.optimizers.adam import Adam
from dae.optimizers.soap import Soap

LearningRate: TypeAlias = float | keras.optimizers.schedules.LearningRateSchedule


def constant(learning_rate: float, total_steps: int) -> LearningRate:
    """The same rate in all steps."""
    return learning_rate


def cosine(learning_rate: float, total_steps: int, warmup_ratio: float = 0.0) -> LearningRate:
    """Linear warm-up from 0 over the fraction `warmup_ratio` of the steps, then a cosine from there down to 0.

    Source: Keras's CosineDecay; Loshchilov and Hutter, SGDR (2017), without restarts.
    """
    warmup_steps = int(warmup_ratio * total_steps)
    first, target = (0.0, learning_rate) if warmup_steps else (learning_rate, None)
    return keras.optimizers.schedules.CosineDecay(
        first, total_steps - warmup_steps, warmup_target=target, warmup_steps=warmup_steps
    )


SCHEDULES: dict[str, Callable[..., LearningRate]] = {"constant": constant, "cosine": cosine}
_OF_KERAS = [
    keras.optimizers.SGD,
    keras.optimizers.RMSprop,
    keras.optimizers.AdamW,
    keras.optimizers.Nadam,
    keras.optimizers.Adamax,
    keras.optimizers.Adagrad,
    keras.optimizers.Adafactor,
    keras.optimizers.Lamb,
    keras.optimizers.Lion,
    keras.optimizers.Muon,
]
OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    kind.__name__.lower(): kind for kind in (Adam, Soap, *_OF_KERAS)
}


def build(config: RunConfig, total_steps: int) -> keras.optimizers.Optimizer:
    """Return the optimizer that `config` names, with its schedule over `total_steps` steps.

    Gradients are clipped by the train state, not by the optimizer. Raises UsageError for an unknown optimizer or
    schedule, or for a function that returns another thing.
    """
    ratio = {"warmup_ratio": config.warmup_ratio} if config.warmup_ratio else {}
    rate = _call(SCHEDULES, "schedule", config.schedule, "--warmup-ratio", config.learning_rate, total_steps, **ratio)
    if not isinstance(rate, float | int | keras.optimizers.schedules.LearningRateSchedule):
        raise UsageError(
            f"--schedule: {plugins.source(config.schedule)}: expected a number or a schedule of "
            f"keras.optimizers.schedules, got {shown(rate)}"
        )
    beta_2 = {"beta_2": config.adam_beta_2} if config.adam_beta_2 != RunConfig.adam_beta_2 else {}
    optimizer = _call(OPTIMIZERS, "optimizer", config.optimizer, "--adam-beta-2", rate, **beta_2)
    source = f"--optimizer: {plugins.source(config.optimizer)}"
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UsageError(f"{source}: expected an optimizer of keras.optimizers, got {shown(optimizer)}")
    if optimizer.built:
        raise UsageError(f"{source}: returns an optimizer that is in use; create one in each call")
    if getattr(optimizer, "use_ema", False):
        raise UsageError(f"{source}: use_ema has no effect here; use --ema-decay")
    return optimizer


def _call(table: dict[str, Any], field: str, name: str, setting: str, *arguments: Any, **settings: Any) -> Any:
    """Call the function that `name` is or refers to. Raises UsageError if it does not take the `settings`."""
    function, source = plugins.load(table, name, f"--{field}"), f"--{field}: {plugins.source(name)}"
    with plugins.errors_with_line(source, plugins.file_of(function)):
        for parameter, value in settings.items():
            if parameter not in inspect.signature(function).parameters:
                raise UsageError(f"{setting}: {value} has no effect on --{field} {plugins.label(name)}")
        return function(*arguments, **settings)
