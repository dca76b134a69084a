"""Tuning of the learning rate: a logarithmic grid with successive halving, scored on validation images.

Runs resume exactly, so that a run which survives a round continues as if it had never been paused. Tuning runs stop
before their test images are looked at. Sources: Jamieson and Talwalkar, Non-stochastic Best Arm Identification (2016),
for successive halving; Choi et al., On Empirical Comparisons of Optimizers (2019), and Musgrave et al., A Metric
Learning Reality Check (2020), for the same budget for everything that is compared.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path

from dae.config import RunConfig
from dae.errors import Diverged, RunError
from dae.evaluation.metrics import HIGHER_IS_BETTER
from dae.training.trainer import EpochEnd, train
from dae.workdir.workdir import read_metrics

# Neighbouring rates differ by this factor, so that two rates make a decade.
RATE_FACTOR = 10**0.5
# Half of the runs are kept after a quarter of the epochs, and again half of these after half of the epochs.
ROUNDS = (4, 2, 1)
# The grid is widened by a decade at most this often, where the best rate is the lowest or the highest.
MAX_WIDENINGS = 2


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of tuning the learning rate of one configuration."""

    scores: dict[float, float]
    """By learning rate: the metric on validation images; NaN if the run diverged."""
    epochs: dict[float, int]
    """By learning rate: the number of epochs it was trained for."""
    best: float
    """The best learning rate among those that were trained for all epochs."""
    seconds: float = 0.0
    """Training time of all runs."""


class Paused(Exception):
    """A run has been trained for as many epochs as it was asked for."""


def train_until(config: RunConfig, folder: Path, epochs: int) -> list[dict[str, float]]:
    """Train the run in `folder` until the end of its epoch number `epochs`; return the lines of its metrics.jsonl.

    A run that has come so far is left alone, and others are resumed. Raises RunError if the run fails.
    """

    def pause(epoch_end: EpochEnd) -> None:
        if epoch_end.values["epoch"] >= epochs:
            raise Paused

    if len(read_metrics(folder)) < epochs:
        with contextlib.suppress(Paused):
            train(config, folder, resume=True, quiet=True, on_epoch_end=pause)
    return read_metrics(folder)[:epochs]


def kept_line(lines: list[dict[str, float]]) -> dict[str, float]:
    """Return the line of the epoch whose model a run keeps, as `Task.criterion` says."""
    return min(lines, key=lambda line: line.get("validation_blind_spot_error", line["validation_loss"]))


def tune_learning_rate(config: RunConfig, metric: str, rates: int, folder: Path) -> Tuning:
    """Tune the learning rate of `config` around its present value, with a grid of an odd number of rates.

    The runs are in `folder`/rate-R; a line is printed for each. The result is a function of the arguments, however
    often the process was killed and the call repeated; only the seconds differ. Raises RunError if every rate diverges.
    """
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    scores: dict[float, float] = {}
    trained: dict[float, int] = {}

    def rate_of(step: int) -> float:
        """Return the rate `step` grid steps from the configured one, rounded to two significant digits."""
        return float(f"{config.learning_rate * RATE_FACTOR**step:.2g}") if step else config.learning_rate

    def run_of(rate: float) -> Path:
        return folder / f"rate-{rate:g}"

    def score(rate: float, until: int) -> None:
        try:
            lines = train_until(dataclasses.replace(config, learning_rate=rate), run_of(rate), until)
            scores[rate] = kept_line(lines)[f"validation_{metric}"]
        except Diverged:  # as may happen at a high rate
            scores[rate] = math.nan
        trained[rate] = until
        print(f"{folder.parent.name}, rate {rate:g}: validation {metric} {scores[rate]:.4f} after epoch {until}")

    def ranked(candidates: Iterable[float]) -> list[float]:
        return sorted(candidates, key=lambda rate: math.inf if math.isnan(scores[rate]) else -sign * scores[rate])

    def best() -> float:
        return ranked(rate for rate in scores if trained[rate] == config.epochs)[0]

    low, high = -(rates // 2), rates // 2
    grid = survivors = [rate_of(step) for step in range(low, high + 1)]
    rounds = sorted({math.ceil(config.epochs / divisor) for divisor in ROUNDS})
    for until in rounds:
        if scores:
            survivors = ranked(survivors)[: math.ceil(len(survivors) / 2)]
        for rate in survivors:
            score(rate, until)
    for rate in ranked(set(grid) - set(survivors)):
        if math.isnan(scores[best()]):  # then all survivors have diverged
            score(rate, config.epochs)
    if math.isnan(scores[best()]):
        raise RunError(f"--tune: {folder.parent.name} fails at each rate from {min(scores):g} to {max(scores):g}")
    for _ in range(MAX_WIDENINGS):
        if best() == min(scores):
            low, added = low - 2, (low - 2, low - 1)
        elif best() == max(scores):
            high, added = high + 2, (high + 1, high + 2)
        else:
            break
        for step in added:
            score(rate_of(step), config.epochs)
    seconds = sum(line["seconds"] for rate in scores for line in read_metrics(run_of(rate)))
    return Tuning(dict(sorted(scores.items())), trained, best(), seconds)
