"""The optimizers and schedules that a configuration builds, alone and in runs."""

import math
from typing import Any

import keras
import pytest
import tensorflow as tf
from helpers import new_state, new_train_step, rejected
from runs import config_of

from dae.config import PLUGIN_FIELDS, RunConfig
from dae.data.pipeline import training_batches
from dae.errors import UsageError
from dae.optimizers import optimizers
from dae.optimizers.optimizers import cosine
from dae.workdir.workdir import read_metrics


@pytest.mark.parametrize(("warmup_ratio", "warmup"), [(0.091, 10), (0.0, 0)])
def test_cosine_schedule_rises_linearly_and_falls_to_zero(warmup_ratio, warmup):
    rate: Any = cosine(0.01, warmup + 100, warmup_ratio)
    assert [float(rate(step)) for step in range(warmup)] == pytest.approx([0.001 * step for step in range(warmup)])
    for step in (0, 10, 50, 90, 100):
        expected = 0.01 * (1 + math.cos(math.pi * step / 100)) / 2
        assert float(rate(warmup + step)) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_build_passes_on_the_settings(name):
    has_beta_2 = name in ("adam", "soap", "adamw", "nadam", "adamax", "lamb", "lion")
    beta_2: dict[str, Any] = {"adam_beta_2": 0.9} if has_beta_2 else {}
    optimizer: Any = optimizers.build(RunConfig(optimizer=name, learning_rate=0.02, **beta_2), 10)
    assert type(optimizer) is optimizers.OPTIMIZERS[name]
    assert float(optimizer.learning_rate) == pytest.approx(0.02)
    assert not has_beta_2 or optimizer.beta_2 == 0.9


OWN = """
import keras
import numpy as np

USED = keras.optimizers.Lion(0.1)
USED.build([keras.Variable(0.0)])


def used(learning_rate):
    return USED


def averaged(learning_rate):
    return keras.optimizers.SGD(learning_rate, use_ema=True)


def number(learning_rate):
    return 3


def scaled(learning_rate):
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(learning_rate))


def uphill(learning_rate, total_steps):
    return -1


def ramp(learning_rate, total_steps, warmup_ratio):
    return np.float32(warmup_ratio + 0.25)


def fails(learning_rate):
    return keras.optimizers.SGD(rate=learning_rate)
"""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "{}:used"}, "--optimizer: {}:used: returns an optimizer that is in use"),
        ({"optimizer": "{}:averaged"}, "--optimizer: {}:averaged: use_ema has no effect here; use --ema-decay"),
        ({"optimizer": "{}:number"}, "--optimizer: {}:number: expected an optimizer of keras.optimizers, got 3"),
        ({"optimizer": "{}:fails"}, "--optimizer: {}:fails: fails in line 34 ("),
        ({"optimizer": "{}:scaled"}, "--optimizer: {}:scaled: the loss is not scaled here"),
        ({"schedule": "{}:uphill"}, "--schedule: {}:uphill: expected a number > 0 or a schedule of keras.optimizers."),
        ({"schedule": "{}:uphill", "warmup_ratio": 0.1}, "--warmup-ratio: 0.1 has no effect on --schedule uphill"),
        ({"optimizer": "sgd", "adam_beta_2": 0.9}, "--adam-beta-2: 0.9 has no effect on --optimizer sgd"),
        ({"optimizer": "adan"}, "--optimizer: unknown name 'adan'; did you mean 'adam'? (known: adam, soap, sgd, "),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_rejected_in_one_line(fields: dict[str, Any], message, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    own: dict[str, Any] = {name: str(value).replace("{}", str(file)) for name, value in fields.items()}
    changes = {**fields, **{name: text for name, text in own.items() if name in PLUGIN_FIELDS}}
    config = RunConfig(**changes)
    with rejected(message.format(file)):
        optimizers.build(config, 10)


def test_a_schedule_gets_the_warm_up_that_it_asks_for_and_can_return_a_numpy_scalar(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    for ratio in (0.0, 0.5):
        optimizer = optimizers.build(RunConfig(schedule=f"{tmp_path}/own.py:ramp", warmup_ratio=ratio), 10)
        assert float(optimizer.learning_rate) == ratio + 0.25


def python_branch(learning_rate: float, total_steps: int) -> Any:
    class Branch(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return learning_rate if int(step) < 2 else 0.0

    return Branch()


def test_a_schedule_that_fails_in_a_graph_is_rejected_before_the_run_starts():
    own: Any = python_branch
    config = RunConfig(schedule=own, learning_rate=0.1)
    with pytest.raises(UsageError, match=r"^--schedule: python_branch: fails in line \d+ \("):
        optimizers.check(config, 10, [keras.Variable([0.0, 1.0])])


@pytest.mark.slow
def test_a_run_follows_its_schedule(finished_run, files):
    config, rates = config_of(files, "sum"), [line["learning_rate"] for line in read_metrics(finished_run("sum"))]
    schedule: Any = cosine(config.learning_rate, 14, config.warmup_ratio)
    assert rates == pytest.approx([float(schedule(step)) for step in (7, 14)], abs=1e-9)
    assert rates[0] > 1e-4 > rates[1]


class Halving(keras.optimizers.SGD):
    def apply(self, grads, trainable_variables=None):
        if tf.reduce_max(tf.abs(grads[0])) > 1e6:
            grads = [gradient / 2 for gradient in grads]
        super().apply(grads, trainable_variables)


def test_an_optimizer_of_a_user_can_branch_on_tensors(mnist):
    own: Any = Halving
    config = RunConfig(optimizer=own, learning_rate=0.1, loss="mse", bce_steps=0, batch_size=16)
    state = new_state(config)
    optimizers.check(config, 30, state.model.trainable_variables)
    (batch,) = training_batches(mnist.train[:16], config).take(1)
    new_train_step(state, config)(batch)
    assert int(state.step) == 1
