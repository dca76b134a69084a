"""Tuning of the learning rate: a logarithmic grid with successive halving, scored on validation images.

Runs resume exactly, so that a run which survives a round continues as if it had never been paused. Tuning runs stop
before their test images are looked at. Sources: Jamieson and Talwalkar, Non-stochastic Best Arm Identification (2016),
for successive halving; Choi et al., On Empirical Comparisons of Optimizers (2019), and Musgrave et al., A Metric
Learning Reality Check (2020), for the same budget for everything that is compared.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from dae.config import RunConfig
from dae.errors import Diverged, RunError
from dae.evaluation.metrics import HIGHER_IS_BETTER
from dae.training.trainer import OnEpochEnd, train
from dae.workdir.workdir import METRICS, read_metrics

# Neighbouring rates differ by this factor, so that two rates make a decade.
RATE_FACTOR = 10**0.5
# Half of the runs are kept after a quarter of the epochs, and again half of these after half of the epochs.
ROUNDS = (4, 2, 1)
# How often the grid is widened by a decade where the best rate is the lowest or the highest.
MAX_WIDENINGS = 2


class Progress:
    """One progress bar over the epochs of many runs, with the remaining time."""

    def __init__(self, epochs: int) -> None:
        self.bar = tqdm(total=epochs, unit=" epochs", disable=None)

    def extend(self, epochs: int) -> None:
        """Expect further epochs."""
        self.bar.total += epochs
        self.bar.refresh()

    @contextlib.contextmanager
    def part(self, description: str, epochs: int) -> Iterator[OnEpochEnd]:
        """Yield the function to call after each epoch of a part; at its end, all of its epochs count as done."""
        self.bar.set_description(description)
        end = self.bar.n + epochs
        yield lambda line: self.bar.update()
        self.bar.update(end - self.bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The result of tuning the learning rate of one configuration."""

    scores: dict[float, float]
    """By learning rate, in ascending order: the metric on validation images; NaN if the run diverged."""
    epochs: dict[float, int]
    """By learning rate: how many epochs it was trained for."""
    best: float
    """The best learning rate among those that were trained for all epochs."""
    is_at_edge: bool
    """Whether the best rate is the lowest or the highest that was tried."""
    seconds: float
    """Training time of all runs."""


class Paused(Exception):
    """A run has been trained for as many epochs as it was asked for."""


def train_until(config: RunConfig, folder: Path, epochs: int, on_epoch_end: OnEpochEnd) -> list[dict[str, float]]:
    """Train the run in `folder` until the end of its epoch number `epochs`; return the lines of its metrics.jsonl.

    A run that has come so far is left alone, and others are resumed. `on_epoch_end` is that of `train`. Raises RunError
    if the run fails.
    """

    def pause(line: dict[str, float]) -> None:
        on_epoch_end(line)
        if line["epoch"] >= epochs:
            raise Paused

    lines = read_metrics(folder) if (folder / METRICS).exists() else []
    if len(lines) < epochs:
        try:
            train(config, folder, resume=True, quiet=True, on_epoch_end=pause)
        except Paused:
            lines = read_metrics(folder)
    return lines[:epochs]


def kept_line(lines: list[dict[str, float]]) -> dict[str, float]:
    """Return the line of the epoch whose model a run keeps, the first with the lowest validation loss."""
    return min(lines, key=lambda line: line["validation_loss"])


def planned_epochs(epochs: int, rates: int) -> int:
    """Return how many epochs tuning takes with a grid of `rates` rates that is not widened."""
    total = done = 0
    for count, until in _rounds(epochs, rates):
        total, done = total + count * (until - done), until
    return total


def _rounds(epochs: int, rates: int) -> list[tuple[int, int]]:
    """Return, for each round, how many runs are trained, and until which epoch."""
    rounds: list[tuple[int, int]] = []
    for divisor in ROUNDS:
        until = math.ceil(epochs / divisor)
        if not rounds or until > rounds[-1][1]:
            rounds.append((rates if not rounds else math.ceil(rounds[-1][0] / 2), until))
    return rounds


def tune(config: RunConfig, metric: str, rates: int, folder: Path, progress: Progress) -> Tuning:
    """Tune the learning rate of `config` around its present value, with a grid of an odd number of rates.

    The runs are in `folder`/rate-R. The result is a function of the arguments, however often the process was killed and
    the call repeated; only the seconds differ. Raises RunError if every rate of the grid diverges.
    """
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    scores: dict[float, float] = {}
    trained: dict[float, int] = {}
    seconds: dict[float, float] = {}

    def score(rate: float, until: int) -> None:
        run = folder / f"rate-{rate:g}"
        with progress.part(f"{folder.parent.name}, rate {rate:g}", until - trained.get(rate, 0)) as advance:
            try:
                lines = train_until(dataclasses.replace(config, learning_rate=rate), run, until, advance)
                scores[rate] = kept_line(lines)[f"validation_{metric}"]
            except Diverged:  # as may happen at a high rate
                lines = read_metrics(run) if (run / METRICS).exists() else []
                scores[rate] = math.nan
        trained[rate], seconds[rate] = until, sum(line["seconds"] for line in lines)

    def ranked(candidates: list[float]) -> list[float]:
        return sorted(candidates, key=lambda rate: -math.inf if math.isnan(scores[rate]) else sign * scores[rate])[::-1]

    grid = [_grid_rate(config.learning_rate, step) for step in range(-(rates // 2), rates // 2 + 1)]
    survivors = grid
    for count, until in _rounds(config.epochs, rates):
        survivors = ranked(survivors)[:count] if trained else grid
        for rate in survivors:
            score(rate, until)
    others = ranked([rate for rate in grid if rate not in survivors])
    while math.isnan(scores[ranked(survivors)[0]]):
        if not others:
            rates_tried = f"{min(scores):g} to {max(scores):g}"
            raise RunError(f"--tune: {folder.parent.name} fails at each learning rate from {rates_tried}")
        survivors = [*survivors, others.pop(0)]
        progress.extend(config.epochs - trained[survivors[-1]])
        score(survivors[-1], config.epochs)
    best = ranked(survivors)[0]
    low, high = -(rates // 2), rates // 2
    for _ in range(MAX_WIDENINGS):
        if best not in (min(scores), max(scores)):
            break
        steps = (low - 2, low - 1) if best == min(scores) else (high + 1, high + 2)
        low, high = min(low, *steps), max(high, *steps)
        progress.extend(2 * config.epochs)
        wider = [_grid_rate(config.learning_rate, step) for step in steps]
        for rate in wider:
            score(rate, config.epochs)
        survivors = [*survivors, *wider]
        best = ranked(survivors)[0]
    in_order = sorted(scores)
    return Tuning(
        {rate: scores[rate] for rate in in_order},
        {rate: trained[rate] for rate in in_order},
        best,
        best in (in_order[0], in_order[-1]),
        sum(seconds.values()),
    )


def _grid_rate(centre: float, step: int) -> float:
    """Return the rate `step` places from `centre`; others than the centre have two significant digits."""
    return centre if step == 0 else float(f"{centre * RATE_FACTOR**step:.2g}")
