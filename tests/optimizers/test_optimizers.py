"""The optimizers and schedules that a configuration builds, alone and in runs."""

import math
from typing import Any

import keras
import pytest
from runs import config_of

from dae.config import RunConfig
from dae.optimizers import optimizers
from dae.optimizers.optimizers import cosine
from dae.workdir.workdir import read_metrics


def test_cosine_schedule_rises_linearly_and_falls_to_zero():
    rate = cosine(RunConfig(learning_rate=0.01, schedule="cosine", warmup_ratio=0.091), 110)
    assert isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    assert [float(rate(step)) for step in (0, 5, 10)] == pytest.approx([0, 0.005, 0.01])
    for step in (20, 60, 100, 110):
        expected = 0.01 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        assert float(rate(step)) == pytest.approx(expected, abs=1e-8)


def test_cosine_schedule_without_warmup_starts_at_its_peak():
    rate = cosine(RunConfig(learning_rate=0.01, schedule="cosine"), 100)
    assert isinstance(rate, keras.optimizers.schedules.LearningRateSchedule)
    assert [float(rate(step)) for step in (0, 50, 100)] == pytest.approx([0.01, 0.005, 0], abs=1e-8)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_build_passes_on_the_settings(name):
    optimizer = optimizers.build(RunConfig(optimizer=name, learning_rate=0.02, adam_beta_2=0.9), 10)
    assert type(optimizer) is optimizers.OPTIMIZERS[name]
    assert float(optimizer.learning_rate) == pytest.approx(0.02)
    assert (optimizer.beta_1, optimizer.beta_2) == (0.9, 0.9)


@pytest.mark.slow
def test_a_run_follows_its_schedule(finished_run, files):
    config, rates = config_of(files, "sum"), [line["learning_rate"] for line in read_metrics(finished_run("sum"))]
    schedule: Any = cosine(config, 14)
    assert rates == pytest.approx([float(schedule(step)) for step in (7, 14)], abs=1e-9)
    assert rates[0] > 1e-4 > rates[1]
