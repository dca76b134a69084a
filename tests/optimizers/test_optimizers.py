"""The optimizers and schedules that a configuration builds, alone and in runs."""

import math
from typing import Any

import pytest
from runs import config_of

from dae.config import RunConfig
from dae.optimizers import optimizers
from dae.optimizers.optimizers import cosine
from dae.workdir.workdir import read_metrics


@pytest.mark.parametrize(("warmup_ratio", "warmup"), [(0.091, 10), (0.0, 0)])
def test_cosine_schedule_rises_linearly_and_falls_to_zero(warmup_ratio, warmup):
    rate: Any = cosine(RunConfig(learning_rate=0.01, schedule="cosine", warmup_ratio=warmup_ratio), warmup + 100)
    assert [float(rate(step)) for step in range(warmup)] == pytest.approx([0.001 * step for step in range(warmup)])
    for step in (0, 10, 50, 90, 100):
        expected = 0.01 * (1 + math.cos(math.pi * step / 100)) / 2
        assert float(rate(warmup + step)) == pytest.approx(expected, abs=1e-8)


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
