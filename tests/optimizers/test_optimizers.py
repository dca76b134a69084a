"""The optimizers and schedules that a configuration builds, alone and in runs."""

import math
from dataclasses import replace

import keras
import pytest
from helpers import TINY

from dae.analysis.reproducibility import first_difference
from dae.config import RunConfig
from dae.errors import Interrupted, UsageError
from dae.optimizers import optimizers
from dae.optimizers.schedules import cosine
from dae.training import trainer
from dae.workdir.workdir import read_metrics

# 13 steps per epoch: an epoch ends between two updates of SOAP's eigenvectors.
COSINE = replace(
    TINY, batch_size=48, epochs=2, optimizer="soap", schedule="cosine", warmup_ratio=0.39, max_gradient_norm=0.1
)


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


@pytest.mark.parametrize(("change", "flag"), [({"optimizer": "adm"}, "--optimizer"), ({"schedule": "x"}, "--schedule")])
def test_build_refuses_unknown_names(change, flag):
    with pytest.raises(UsageError, match=flag):
        optimizers.build(RunConfig(**change), 10)


@pytest.mark.slow
def test_resumed_run_with_soap_schedule_and_clipping_equals_an_uninterrupted_one(tmp_path):
    def stop(line):
        raise Interrupted(2, "stopped by the test")

    trainer.train(COSINE, tmp_path / "uninterrupted", quiet=True)
    with pytest.raises(Interrupted):
        trainer.train(COSINE, tmp_path / "resumed", quiet=True, on_epoch_end=stop)
    assert len(read_metrics(tmp_path / "resumed")) == 1
    trainer.train(COSINE, tmp_path / "resumed", quiet=True, resume=True)
    assert first_difference(tmp_path / "uninterrupted", tmp_path / "resumed") is None
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "uninterrupted")]
    expected = [1e-3 * (1 + math.cos(math.pi * (step - 10) / 16)) / 2 for step in (13, 26)]
    assert rates == pytest.approx(expected, abs=1e-9)
    with pytest.raises(UsageError, match="--epochs was 2, now 3"):
        trainer.train(replace(COSINE, epochs=3), tmp_path / "resumed", quiet=True, resume=True)
