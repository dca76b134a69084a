"""Estimates over seeds: intervals, paired differences, and p-values corrected for their number. Needs SciPy."""

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t-interval; NaN ends where one seed gives none."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """A loss's metric less that of the first loss, seed by seed; p-values of the paired t-test, NaN where none.

    `p_corrected` is Holm's, over the comparisons of one metric; `same` says that every seed gave the very same figure.
    """

    p: float
    p_corrected: float
    same: bool


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval of the mean of one value per seed, by Student's t. Source: SciPy."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else np.nan
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * spread / len(values) ** 0.5 if spread else 0.0
    return Estimate(mean, mean - half, mean + half)


def differences(first: Sequence[float], others: Sequence[Sequence[float]]) -> list[Difference]:
    """Of each of `others`, one value per seed, how it differs from `first`. Source: SciPy's `ttest_rel`."""
    found = []
    for other in others:
        each = np.subtract(other, first).tolist()
        if not any(each):
            found.append((estimate(each), 1.0, True))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of one seed, and of nearly equal differences
            found.append((estimate(each), float(stats.ttest_rel(other, first).pvalue), False))
    corrected = holm([p for _, p, _ in found])
    return [
        Difference(mean.mean, mean.low, mean.high, p, p_corrected, same)
        for (mean, p, same), p_corrected in zip(found, corrected, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number; NaN stays NaN.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, float)[order] * factors), 1)
    return corrected.tolist()
