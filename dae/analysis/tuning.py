"""Tuning of the learning rate on a logarithmic grid, by a metric on validation images.

Each run is trained to its end, since the best rate after some of the epochs need not be the best one after all of them.
Sources: Choi et al., On Empirical Comparisons of Optimizers (2019), and Musgrave et al., A Metric Learning Reality
Check (2020), for the same budget for everything that is compared.
"""

import dataclasses
import math
from pathlib import Path

from dae.config import RunConfig
from dae.errors import Diverged, RunError
from dae.evaluation.metrics import HIGHER_IS_BETTER
from dae.training.trainer import train
from dae.workdir.workdir import read_metrics

# Neighbouring rates differ by this factor, so that two rates make a decade.
RATE_FACTOR = 10**0.5


def tune_learning_rate(config: RunConfig, metric: str, rates: int, folder: Path) -> dict[float, float]:
    """Return the metric on validation images by learning rate, for an odd number of rates around that of `config`.

    It is NaN for a run that diverged. The runs are in `folder`/rate-R, finished ones are skipped and others resumed; a
    line is printed for each. Raises RunError if every rate diverges.
    """
    scores = {}
    for step in range(-(rates // 2), rates // 2 + 1):
        exact = config.learning_rate * RATE_FACTOR**step
        rate = float(f"{exact:.2g}") if step else config.learning_rate
        run = folder / f"rate-{rate:g}"
        try:
            report = train(dataclasses.replace(config, learning_rate=rate), run, resume=True, quiet=True)
            scores[rate] = read_metrics(run)[report["epoch"] - 1][f"validation_{metric}"]
        except Diverged:  # as may happen at a high rate
            scores[rate] = math.nan
        print(f"{folder.parent.name}, rate {rate:g}: validation {metric} {scores[rate]:.4f}")
    if all(map(math.isnan, scores.values())):
        raise RunError(f"--tune: {folder.parent.name} fails at each rate from {min(scores):g} to {max(scores):g}")
    return scores


def best_rate(scores: dict[float, float], metric: str) -> float:
    """Return the learning rate with the best score, among those that did not diverge."""
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    return max(scores, key=lambda rate: -math.inf if math.isnan(scores[rate]) else sign * scores[rate])
