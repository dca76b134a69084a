import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from helpers import TINY
from runs import config_of

from dae.analysis import tuning
from dae.analysis.reproducibility import DURATIONS
from dae.analysis.tuning import Tuning, kept_line, train_until, tune_learning_rate
from dae.config import RunConfig
from dae.errors import Diverged, RunError
from dae.training.trainer import train
from dae.workdir.workdir import append_metrics, read_metrics


class FakeRuns:
    """Stands in for `train_until`: runs whose metric after each epoch is a function of the learning rate."""

    def __init__(self, metric: str, value: Callable[[float], float], fails: Callable[[float, int], bool]) -> None:
        self.metric, self.value, self.fails = metric, value, fails
        self.calls: list[tuple[RunConfig, Path, int]] = []

    def __call__(self, config: RunConfig, folder: Path, epochs: int) -> list[dict[str, float]]:
        self.calls.append((config, folder, epochs))
        if self.fails(config.learning_rate, epochs):
            raise Diverged("the loss of step 7 is not finite")
        value = self.value(config.learning_rate)
        return [{"validation_loss": -epoch, f"validation_{self.metric}": value} for epoch in range(epochs)]

    @property
    def rounds(self) -> list[tuple[int, int]]:
        """The number of runs that each round trains, and until which epoch."""
        untils = [until for _, _, until in self.calls]
        return [(untils.count(until), until) for until in sorted(set(untils))]


def tune_fake_runs(
    value: Callable[[float], float],
    *,
    metric: str = "psnr",
    rates: int = 7,
    config: RunConfig = TINY,
    fails: Callable[[float, int], bool] = lambda rate, until: False,
) -> tuple[Tuning, FakeRuns]:
    """Tune runs whose metric is `value` of the learning rate, and that fail if `fails` of rate and epoch is true."""
    runs = FakeRuns(metric, value, fails)
    with mock.patch.object(tuning, "train_until", runs):
        return tune_learning_rate(config, metric, rates, Path("none", "bce", "tuning")), runs


def is_at_edge(result: Tuning) -> bool:
    return result.best in (min(result.scores), max(result.scores))


def peak_at(best: float) -> Callable[[float], float]:
    return lambda rate: -abs(math.log10(rate / best))


@pytest.mark.parametrize(
    ("epochs", "rounds"),
    [(1, [(7, 1)]), (2, [(7, 1), (4, 2)]), (3, [(7, 1), (4, 2), (2, 3)]), (5, [(7, 2), (4, 3), (2, 5)])],
)
def test_rounds_halve_the_runs_after_a_quarter_and_a_half_of_the_epochs(epochs, rounds):
    result, runs = tune_fake_runs(peak_at(1e-3), config=replace(TINY, epochs=epochs))
    assert runs.rounds == rounds
    assert result.epochs[result.best] == epochs
    assert (result.best, is_at_edge(result)) == (1e-3, False)


@pytest.mark.parametrize("centre", [1e-3, 2.5])
def test_learning_rates_are_two_per_decade_around_that_of_the_configuration(centre):
    config = replace(TINY, learning_rate=centre, seed=4)
    result, runs = tune_fake_runs(peak_at(centre), config=config)
    rates = list(result.scores)
    assert len(rates) == 7
    assert rates == sorted(rates)
    assert rates[3] == centre
    for lower, rate in itertools.pairwise(rates):
        assert rate / lower == pytest.approx(math.sqrt(10), rel=0.05)
    for run, folder, _ in runs.calls:  # nothing but the rate is changed
        assert run == replace(config, learning_rate=run.learning_rate)
        assert folder == Path("none", "bce", "tuning", f"rate-{run.learning_rate:g}")


@pytest.mark.parametrize("best", [1e-4, 3.2e-3])
@pytest.mark.parametrize(("metric", "sign"), [("psnr", 1), ("mse", -1)])  # more dB is better, more error is worse
def test_the_best_rate_is_that_of_the_best_metric(best, metric, sign):
    value = peak_at(best)
    result, _ = tune_fake_runs(lambda rate: sign * value(rate), metric=metric)
    assert (result.best, is_at_edge(result)) == (best, False)
    assert result.scores == {rate: sign * value(rate) for rate in result.scores}
    assert len(result.scores) == 7


def test_a_run_is_scored_by_the_epoch_with_the_lowest_validation_loss():
    losses = [3.0, 1.0, 1.0, 2.0]
    lines = [{"validation_loss": loss, "validation_psnr": float(epoch)} for epoch, loss in enumerate(losses)]
    assert kept_line(lines) is lines[1]
    with mock.patch.object(tuning, "train_until", return_value=lines):
        assert set(tune_learning_rate(TINY, "psnr", 3, Path("none")).scores.values()) == {1.0}


@pytest.mark.parametrize(
    ("value", "widenings", "best", "at_edge"),
    [
        (peak_at(0.1), 1, 0.1, False),
        (peak_at(1e-5), 1, 1e-5, False),
        (math.log10, 2, 3.2, True),
        (lambda rate: -math.log10(rate), 2, 3.2e-7, True),
    ],
)
def test_a_grid_whose_edge_is_best_is_widened_twice_at_most(value, widenings, best, at_edge):
    result, runs = tune_fake_runs(value)
    assert len(result.scores) == 7 + 2 * widenings
    assert (result.best, is_at_edge(result)) == (best, at_edge)
    assert [until for _, _, until in runs.calls[-2 * widenings :]] == [TINY.epochs] * 2 * widenings


def test_runs_that_fail_also_in_their_last_round_score_nan_and_never_win():
    result, _ = tune_fake_runs(
        math.log10, fails=lambda rate, until: rate > 4e-3 or (rate > 2e-3 and until == TINY.epochs)
    )
    assert [rate for rate, score in result.scores.items() if math.isnan(score)] == [3.2e-3, 0.01, 0.032]
    assert (result.best, is_at_edge(result), len(result.scores)) == (1e-3, False, 7)


def test_it_is_an_error_if_every_rate_fails():
    with pytest.raises(RunError, match=r"--tune: bce fails at each rate from 0\.00032 to 0\.0032"):
        tune_fake_runs(peak_at(1e-3), rates=3, fails=lambda rate, until: True)


def test_a_run_that_has_come_far_enough_is_left_alone(tmp_path):
    for epoch in (1, 2, 3):
        append_metrics(tmp_path, {"epoch": epoch})
    with mock.patch.object(tuning, "train", side_effect=AssertionError):
        assert train_until(TINY, tmp_path, 2) == [{"epoch": 1}, {"epoch": 2}]
        assert len(train_until(TINY, tmp_path, 3)) == 3


def without_durations(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in DURATIONS} for line in lines]


@pytest.mark.slow
def test_tuning_is_exact_and_never_evaluates_test_images(files, tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "MAX_WIDENINGS", 0)
    config = config_of(files, epochs=4, checkpoint_every=None)
    result = tune_learning_rate(config, "psnr", 3, tmp_path / "tuning")
    assert sorted(result.epochs.values()) == [1, 2, 4]
    assert list(tmp_path.rglob("config.json"))
    assert not list(tmp_path.rglob("report.json"))
    assert not list(tmp_path.rglob("model.*"))
    for rate, epochs in result.epochs.items():
        lines = read_metrics(tmp_path / "tuning" / f"rate-{rate:g}")
        assert len(lines) == epochs
        assert result.scores[rate] == kept_line(lines)["validation_psnr"]
    train(replace(config, learning_rate=result.best), tmp_path / "whole", quiet=True)
    paused = read_metrics(tmp_path / "tuning" / f"rate-{result.best:g}")
    assert without_durations(paused) == without_durations(read_metrics(tmp_path / "whole"))
