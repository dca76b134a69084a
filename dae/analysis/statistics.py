"""Statistics over seeds: confidence intervals, paired differences and corrected p-values. Needs SciPy."""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % t-interval; the bounds are NaN for a single seed."""

    mean: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Difference(Estimate):
    """The mean over seeds of a loss's metric minus that of the first loss, with the p-values of the paired t-test.

    `p_corrected` is Holm's, over the comparisons of one metric. P-values are NaN for a single seed. `identical` says
    that every seed gave exactly the same value.
    """

    p: float
    p_corrected: float
    identical: bool


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of one value per seed and its 95 % t-interval, or NaN. Source: SciPy's `ttest_1samp`."""
    if not values:
        return Estimate(math.nan, math.nan, math.nan)
    mean = float(np.mean(values))
    if len(set(values)) == 1 and len(values) > 1:  # no variance, for which SciPy returns NaN
        return Estimate(mean, mean, mean)
    with _no_warnings():
        interval = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return Estimate(mean, float(interval.low), float(interval.high))


def differences(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Difference]:
    """Compare the second values of each pair, one per seed, with the first ones. Source: SciPy's `ttest_rel`."""
    paired = [np.subtract(other, first).tolist() for first, other in pairs]
    identical = [len(each) > 0 and not any(each) for each in paired]
    with _no_warnings():
        p_values = [
            1.0 if same else float(stats.ttest_rel(other, first).pvalue)
            for (first, other), same in zip(pairs, identical, strict=True)
        ]
    return [
        Difference(**vars(estimate(each)), p=p, p_corrected=p_corrected, identical=same)
        for each, p, p_corrected, same in zip(paired, p_values, holm(p_values), identical, strict=True)
    ]


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number; NaN stays NaN.

    Source: Holm, A Simple Sequentially Rejective Multiple Test Procedure (1979).
    """
    order = np.argsort(p_values)  # NaN last
    factors = np.maximum(np.count_nonzero(~np.isnan(p_values)) - np.arange(len(p_values)), 1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p_values, float)[order] * factors), 1)
    return corrected.tolist()


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Ignore SciPy's warnings about single seeds and nearly equal values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
