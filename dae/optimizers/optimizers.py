"""The optimizers and the learning-rate schedules by name, and those of users' files.

A schedule is a function `(learning_rate, total_steps) -> learning rate`, a number or a Keras schedule. An optimizer is
a function of that learning rate which returns a Keras optimizer. docs/optimizers.md
"""

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf

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
    schedule, or for a function that returns anything else.
    """
    ratio = ("--warmup-ratio", "warmup_ratio", config.warmup_ratio, RunConfig.warmup_ratio)
    rate: Any = _call(SCHEDULES, "schedule", config.schedule, ratio, config.learning_rate, total_steps)
    rate = float(rate) if isinstance(rate, numbers.Real) else rate  # also a NumPy scalar
    is_schedule = isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    if not (0 < rate < math.inf if isinstance(rate, float) else is_schedule):
        raise UsageError(
            f"--schedule: {plugins.source(config.schedule)}: expected a number > 0 or a schedule of "
            f"keras.optimizers.schedules, got {shown(rate)}"
        )
    beta_2 = ("--adam-beta-2", "beta_2", config.adam_beta_2, RunConfig.adam_beta_2)
    optimizer = _call(OPTIMIZERS, "optimizer", config.optimizer, beta_2, rate)
    source = f"--optimizer: {plugins.source(config.optimizer)}"
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UsageError(f"{source}: expected an optimizer of keras.optimizers, got {shown(optimizer)}")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UsageError(
            f"{source}: the loss is not scaled here, which bfloat16 does not need; return its inner optimizer"
        )
    if optimizer.built:
        raise UsageError(f"{source}: returns an optimizer that is in use; create one in each call")
    if optimizer.use_ema:
        raise UsageError(f"{source}: use_ema has no effect here; use --ema-decay")
    return optimizer


def check(config: RunConfig, total_steps: int, variables: list[keras.Variable]) -> None:
    """Raise UsageError unless a user's optimizer and schedule can be computed in a graph, for these variables."""
    if config.optimizer in OPTIMIZERS and config.schedule in SCHEDULES:
        return
    optimizer = build(config, total_steps)
    gradients = [tf.zeros(variable.shape) for variable in variables]
    # The schedule first: the optimizer calls it too, and would be named instead.
    for field, table, compute in (
        ("schedule", SCHEDULES, lambda: tf.convert_to_tensor(optimizer.learning_rate)),
        ("optimizer", OPTIMIZERS, lambda: optimizer.apply(gradients, variables)),
    ):
        text = getattr(config, field)
        file = "" if text in table else plugins.file_of(plugins.load(table, text, f"--{field}"))
        with plugins.errors_with_line(f"--{field}: {plugins.source(text)}", file):
            optimizer.build(variables)
            tf.function(compute).get_concrete_function()


def _call(table: dict[str, Any], field: str, name: str, setting: tuple[str, str, Any, Any], *arguments: Any) -> Any:
    """Call the function that `name` names, and with a setting if it has a parameter for it.

    `setting` is (flag, parameter, value, default); the default is passed only to a parameter without one. Raises
    UsageError if the value is another one and there is no such parameter.
    """
    function, source = plugins.load(table, name, f"--{field}"), f"--{field}: {plugins.source(name)}"
    flag, parameter, value, default = setting
    with plugins.errors_with_line(source, plugins.file_of(function)):
        found = inspect.signature(function).parameters.get(parameter)
        if found is None and value != default:
            raise UsageError(
                f"{flag}: {value} has no effect on --{field} {plugins.label(name)}, which has no parameter "
                f"`{parameter}`; set {flag} {default:g}"
            )
        is_needed = found is not None and (value != default or found.default is found.empty)
        return function(*arguments, **({parameter: value} if is_needed else {}))
