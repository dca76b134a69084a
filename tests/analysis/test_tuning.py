import dataclasses
import itertools
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from helpers import TINY
from hypothesis import given
from hypothesis import strategies as st

from dae.analysis import tuning
from dae.analysis.reproducibility import DURATIONS
from dae.analysis.tuning import Progress, Tuning, kept_line, planned_epochs, train_until, tune
from dae.config import RunConfig
from dae.errors import Diverged, Interrupted
from dae.training.trainer import train
from dae.workdir.workdir import append_metrics, read_metrics

# Of each round: how many runs are trained, and until which epoch.
Rounds = list[tuple[int, int]]


def ignore(line: dict[str, float]) -> None:
    pass


class FakeRuns:
    """Stands in for `train_until`: runs whose metric after each epoch is a function of the learning rate."""

    def __init__(self, metric: str, value: Callable[[float], float], fails: Callable[[float, int], bool]) -> None:
        self.metric, self.value, self.fails = metric, value, fails
        self.calls: list[tuple[RunConfig, Path, int]] = []

    def __call__(self, config: RunConfig, folder: Path, epochs: int, on_epoch_end: object) -> list[dict[str, float]]:
        self.calls.append((config, folder, epochs))
        if self.fails(config.learning_rate, epochs):
            raise Diverged("the loss of step 7 is not finite")
        value = self.value(config.learning_rate)
        return [
            {"validation_loss": -epoch, f"validation_{self.metric}": value, "seconds": 2.0} for epoch in range(epochs)
        ]

    @property
    def rounds(self) -> Rounds:
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
        return tune(config, metric, rates, Path("none", "bce", "tuning"), Progress(0)), runs


def peak_at(best: float) -> Callable[[float], float]:
    return lambda rate: -abs(math.log10(rate / best))


def test_rounds_halve_the_runs_after_a_quarter_and_a_half_of_the_epochs():
    result, runs = tune_fake_runs(peak_at(1e-3), config=replace(TINY, epochs=5))
    assert runs.rounds == [(7, 2), (4, 3), (2, 5)]
    assert planned_epochs(5, 7) == 7 * 2 + 4 * 1 + 2 * 2
    assert sorted(result.epochs.values()) == [2, 2, 2, 3, 3, 5, 5]
    assert result.seconds == 2 * sum(result.epochs.values())


@given(st.integers(1, 200), st.integers(1, 7).map(lambda half: 2 * half + 1))
def test_rounds_end_with_all_epochs_and_take_the_planned_ones(epochs, rates):
    result, runs = tune_fake_runs(peak_at(TINY.learning_rate), rates=rates, config=replace(TINY, epochs=epochs))
    counts = [count for count, _ in runs.rounds]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == rates
    assert runs.rounds[-1][1] == epochs
    assert sum(result.epochs.values()) == planned_epochs(epochs, rates)
    assert result.epochs[result.best] == epochs
    assert (result.best, result.is_at_edge) == (TINY.learning_rate, False)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_rounds_of_few_epochs_train_each_run_at_least_once(epochs):
    _, runs = tune_fake_runs(peak_at(1e-3), config=replace(TINY, epochs=epochs))
    assert runs.rounds == [(7, 1), (4, 2), (2, 3)][:epochs]


@pytest.mark.parametrize("centre", [1e-3, 0.03, 2.5])
def test_learning_rates_are_two_per_decade_around_that_of_the_configuration(centre):
    config = replace(TINY, learning_rate=centre, seed=4)
    result, runs = tune_fake_runs(peak_at(centre), config=config)
    rates = list(result.scores)
    assert len(rates) == 7
    assert rates == sorted(rates)
    assert rates[3] == centre
    for lower, rate in itertools.pairwise(rates):
        assert rate / lower == pytest.approx(math.sqrt(10), rel=0.05)
    for lower, rate in zip(rates, rates[2:], strict=False):
        assert rate / lower == pytest.approx(10, rel=0.05)
    for run, folder, _ in runs.calls:  # nothing but the rate is changed
        assert run == replace(config, learning_rate=run.learning_rate)
        assert folder == Path("none", "bce", "tuning", f"rate-{run.learning_rate:g}")


@pytest.mark.parametrize("best", [1e-4, 3.2e-4, 3.2e-3, 1e-2])
@pytest.mark.parametrize(("metric", "sign"), [("psnr", 1), ("mse", -1)])  # more dB is better, more error is worse
def test_the_best_rate_is_that_of_the_best_metric(best, metric, sign):
    value = peak_at(best)
    result, _ = tune_fake_runs(lambda rate: sign * value(rate), metric=metric)
    assert (result.best, result.is_at_edge) == (best, False)
    assert result.scores == {rate: sign * value(rate) for rate in result.scores}
    assert len(result.scores) == 7


def test_a_run_is_scored_by_the_epoch_with_the_lowest_validation_loss():
    losses, values = [3.0, 1.0, 1.0, 2.0], [10.0, 11.0, 12.0, 13.0]
    lines = [{"validation_loss": one, "validation_psnr": other} for one, other in zip(losses, values, strict=True)]
    assert kept_line(lines) is lines[1]
    with mock.patch.object(tuning, "train_until", return_value=[line | {"seconds": 1.0} for line in lines]):
        assert set(tune(TINY, "psnr", 3, Path("none"), Progress(0)).scores.values()) == {11.0}


@pytest.mark.parametrize(("direction", "best"), [(1, 3.2), (-1, 3.2e-7)])
def test_a_grid_whose_edge_is_best_is_widened_twice_and_then_reported(direction, best):
    result, runs = tune_fake_runs(lambda rate: direction * math.log10(rate))
    assert len(result.scores) == 7 + 2 * 2
    assert (result.best, result.is_at_edge) == (best, True)
    assert best == (max(result.scores) if direction == 1 else min(result.scores))
    assert list(result.scores) == sorted(result.scores)
    wider = runs.calls[-4:]
    assert [until for _, _, until in wider] == [TINY.epochs] * 4
    assert result.epochs[best] == TINY.epochs


@pytest.mark.parametrize("best", [0.1, 1e-5])
def test_a_grid_is_widened_only_while_the_edge_is_best(best):
    result, _ = tune_fake_runs(peak_at(best))
    assert len(result.scores) == 7 + 2
    assert (result.best, result.is_at_edge) == (best, False)


def test_widening_is_added_to_the_expected_epochs():
    progress = Progress(planned_epochs(TINY.epochs, 7))
    runs = FakeRuns("psnr", math.log10, lambda rate, until: False)
    with mock.patch.object(tuning, "train_until", runs):
        result = tune(TINY, "psnr", 7, Path("none"), progress)
    assert progress.bar.total == sum(result.epochs.values())


@pytest.mark.parametrize("metric", ["psnr", "mse"])
def test_failed_runs_score_nan_and_never_win(metric):
    sign = 1 if metric == "psnr" else -1
    result, _ = tune_fake_runs(
        lambda rate: sign * math.log10(rate), metric=metric, fails=lambda rate, until: rate > 4e-3
    )
    assert [rate for rate, score in result.scores.items() if math.isnan(score)] == [0.01, 0.032]
    assert (result.best, result.is_at_edge) == (3.2e-3, False)
    assert len(result.scores) == 7


def test_a_run_that_fails_in_its_last_round_does_not_win():
    result, _ = tune_fake_runs(
        peak_at(1e-3), rates=3, config=replace(TINY, epochs=4), fails=lambda rate, until: rate == 1e-3 and until == 4
    )
    assert math.isnan(result.scores[1e-3])
    assert not math.isnan(result.scores[result.best])


def test_a_run_that_has_come_far_enough_is_left_alone(tmp_path):
    for epoch in (1, 2, 3):
        append_metrics(tmp_path, {"epoch": epoch})
    with mock.patch.object(tuning, "train", side_effect=AssertionError):
        assert train_until(TINY, tmp_path, 2, ignore) == [{"epoch": 1}, {"epoch": 2}]
        assert len(train_until(TINY, tmp_path, 3, ignore)) == 3


def without_durations(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name not in DURATIONS} for line in lines]


@pytest.mark.slow
def test_a_run_that_was_paused_continues_as_if_it_had_not_been(tmp_path, tiny_run):
    seen: list[float] = []
    for epochs in (1, 3):
        lines = train_until(TINY, tmp_path / "run", epochs, lambda line: seen.append(line["epoch"]))
        assert lines == read_metrics(tmp_path / "run")
        assert len(lines) == epochs
    assert seen == [1, 2, 3]
    assert without_durations(read_metrics(tmp_path / "run")) == without_durations(read_metrics(tiny_run))
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_ctrl_c_at_the_end_of_the_epoch_that_pauses_a_run_still_interrupts(tmp_path):
    def interrupt(line: dict[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    config = replace(TINY, train_examples=64, validation_examples=64)
    with pytest.raises(Interrupted, match="epoch 1") as caught:
        train_until(config, tmp_path / "run", 1, interrupt)
    assert caught.value.signal_number == signal.SIGINT
    assert [line["epoch"] for line in read_metrics(tmp_path / "run")] == [1]


@pytest.mark.slow
def test_tuning_is_exact_and_never_evaluates_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "MAX_WIDENINGS", 0)
    config = replace(TINY, train_examples=128, validation_examples=64, epochs=4)
    result = tune(config, "psnr", 3, tmp_path / "tuning", Progress(0))
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

    again = tune(config, "psnr", 3, tmp_path / "tuning", Progress(0))
    assert replace(again, seconds=0) == replace(result, seconds=0)
    assert dataclasses.asdict(again)["seconds"] == pytest.approx(result.seconds)
