import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY

from dae.analysis import tuning
from dae.analysis.tuning import best_rate, tune_learning_rate
from dae.config import RunConfig
from dae.errors import Diverged, RunError
from dae.workdir.workdir import append_metrics


@pytest.fixture
def tune(monkeypatch, tmp_path) -> Callable[..., tuple[dict[float, float], list[tuple[RunConfig, Path]]]]:
    """A function that tunes runs whose PSNR is a function of the learning rate; None: the run diverges."""

    def tune(
        value: Callable[[float], float | None], config: RunConfig = TINY, rates: int = 7
    ) -> tuple[dict[float, float], list[tuple[RunConfig, Path]]]:
        calls = []

        def train(config: RunConfig, folder: Path, **options: Any) -> dict[str, int]:
            calls.append((config, folder))
            if (psnr := value(config.learning_rate)) is None:
                raise Diverged("the loss of step 7 is not finite")
            folder.mkdir(parents=True)
            for difference in (-1.0, 0.0, 1.0):  # the run keeps the second of three epochs
                append_metrics(folder, {"validation_psnr": psnr + difference})
            return {"epoch": 2}

        monkeypatch.setattr(tuning, "train", train)
        return tune_learning_rate(config, "psnr", rates, tmp_path / "bce" / "tuning"), calls

    return tune


def peak_at(best: float) -> Callable[[float], float]:
    return lambda rate: -abs(math.log10(rate / best))


@pytest.mark.parametrize("centre", [1e-3, 2.5])
def test_learning_rates_are_two_per_decade_around_that_of_the_configuration(centre, tune, tmp_path):
    config = replace(TINY, learning_rate=centre, seed=4)
    scores, calls = tune(peak_at(centre), config)
    rates = list(scores)
    assert (len(rates), rates[3]) == (7, centre)
    for lower, rate in itertools.pairwise(rates):
        assert rate / lower == pytest.approx(math.sqrt(10), rel=0.05)
    assert calls == [  # nothing but the rate is changed
        (replace(config, learning_rate=rate), tmp_path / "bce" / "tuning" / f"rate-{rate:g}") for rate in rates
    ]


def test_a_run_is_scored_by_the_epoch_that_it_keeps(tune):
    scores, _ = tune(peak_at(1e-4))
    assert scores == {rate: peak_at(1e-4)(rate) for rate in scores}


@pytest.mark.parametrize(("metric", "best"), [("psnr", 0.1), ("mse", 0.001)])  # more dB is better, more error is worse
def test_the_best_rate_is_that_of_the_best_metric_among_those_that_did_not_diverge(metric, best):
    assert best_rate({0.001: 10.0, 0.01: 11.0, 0.1: 12.0, 1.0: math.nan}, metric) == best


def test_diverged_runs_score_nan(tune):
    scores, _ = tune(lambda rate: None if rate > 4e-3 else math.log10(rate))
    assert [rate for rate, score in scores.items() if math.isnan(score)] == [0.01, 0.032]


def test_it_is_an_error_if_every_rate_fails(tune):
    with pytest.raises(RunError, match=r"--tune: bce fails at each rate from 0\.00032 to 0\.0032"):
        tune(lambda rate: None, rates=3)
