"""Statistics over seeds: confidence intervals, paired differences and corrected p-values. Needs SciPy."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

# Of confidence intervals.
LEVEL = 0.95
# Two differences can be nearly equal by chance.
MIN_SEEDS = 3


class Interval(NamedTuple):
    """A mean, and the ends of its confidence interval, which are NaN if it has none."""

    mean: float
    low: float = math.nan
    high: float = math.nan

    def __format__(self, number_format: str) -> str:
        ends = "" if math.isnan(self.low) else f" [{self.low:{number_format}}, {self.high:{number_format}}]"
        return f"{self.mean:{number_format}}{ends}"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value per seed and its 95 % t-interval, whose ends are NaN for fewer than two values."""
    if len(values) < 2:
        return Interval(*values) if values else Interval(math.nan)
    mean, half_width = float(np.mean(values)), float(stats.sem(values) * stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Interval(mean, mean - half_width, mean + half_width)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean over seeds of a metric of one setting, and its paired difference from the first setting."""

    mean: Interval
    difference: Interval = dataclasses.field(default=Interval(math.nan))
    """NaN for the first setting."""
    p: float = math.nan
    """The p-value of the paired t-test; NaN for fewer than MIN_SEEDS seeds."""
    p_corrected: float = math.nan
    """Holm's, over the comparisons of one metric."""


def estimates(values: Mapping[str, Mapping[int, float]]) -> dict[str, Estimate]:
    """Compare the values of each setting, by seed, with those of the first in the seeds that both have."""
    first, *others = values
    differences = [
        [value - values[first][seed] for seed, value in values[name].items() if seed in values[first]]
        for name in others
    ]
    p_values = [_p_value(paired) for paired in differences]
    compared = zip(map(interval, differences), p_values, holm(p_values), strict=True)
    means = {name: interval(list(by_seed.values())) for name, by_seed in values.items()}
    return {first: Estimate(means[first])} | {
        name: Estimate(means[name], *found) for name, found in zip(others, compared, strict=True)
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number; NaN stays NaN.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    order = np.argsort(p_values)  # NaN last
    factors = np.maximum(np.count_nonzero(~np.isnan(p_values)) - np.arange(len(p_values)), 1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, float)[order] * factors), 1)
    return corrected.tolist()


def _p_value(differences: Sequence[float]) -> float:
    """Return the p-value of the two-sided t-test of mean 0; 1 if all differences are 0."""
    if len(differences) < MIN_SEEDS:
        return math.nan
    if not any(differences):
        return 1.0
    with np.errstate(divide="ignore"):  # equal differences have no standard error
        t = np.abs(np.mean(differences)) / stats.sem(differences)
    return float(2 * stats.t.sf(t, len(differences) - 1))
