import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dae.analysis.statistics import differences, estimate, holm

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def test_holm_corrects_a_worked_example():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert np.isnan(holm([math.nan])).all()


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_or_changes_their_order(p_values):
    pairs = list(zip(p_values, holm(p_values), strict=True))
    for (other_p, other), (p, corrected) in itertools.pairwise([(0.0, 0.0), *pairs]):
        assert p <= corrected <= min(1, p * len(p_values) if p == min(p_values) else 1)
        assert p > other_p or corrected <= other


# float32 values, since the squares of differences such as 1e-218 vanish, of which SciPy warns.
@given(st.lists(st.floats(-1000, 1000, width=32, allow_subnormal=False), min_size=2, max_size=9, unique=True))
def test_the_interval_is_a_t_interval(values):
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    one = estimate(values)
    np.testing.assert_allclose([one.low, one.high], [low, high], rtol=1e-6, atol=1e-9)


def test_the_interval_contains_the_true_mean_in_95_percent_of_draws():
    draws = np.random.default_rng(0).normal(3, 2, (4000, 4))
    inside = np.mean([one.low < 3 < one.high for one in map(estimate, draws.tolist())])
    assert inside == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 4000))


def test_the_estimate_of_no_values_is_nan():
    one = estimate([])
    assert np.isnan([one.mean, one.low, one.high]).all()


def test_the_interval_of_equal_values_has_no_width_and_that_of_one_value_is_nan():
    equal, single = estimate([2.5, 2.5, 2.5]), estimate([2.5])
    assert (equal.mean, equal.low, equal.high) == (2.5, 2.5, 2.5)
    assert single.mean == 2.5
    assert np.isnan([single.low, single.high]).all()


def test_differences_are_paired_by_seed():
    first, better = [10.0, 20.0, 30.0], [10.5, 20.6, 30.55]  # seeds differ by far more than losses do
    one, same = differences([(first, better), (first, first)])
    assert one.mean == pytest.approx(0.55)
    assert one.low > 0.4
    assert one.p < 0.01
    assert one.p_corrected == pytest.approx(2 * one.p)
    assert not one.identical
    assert (same.identical, same.mean, same.p, same.p_corrected) == (True, 0, 1, 1)


def test_the_difference_of_a_single_seed_has_no_interval_or_p_value():
    (single,) = differences([([1.0], [2.0])])
    assert single.mean == 1
    assert np.isnan([single.low, single.high, single.p, single.p_corrected]).all()


def test_pairs_can_have_different_numbers_of_seeds():
    """As they do if some runs did not learn."""
    three, two = ([10.0, 20.0, 30.0], [11.0, 21.5, 31.0]), ([10.0, 30.0], [9.0, 28.5])
    for pair, one in zip((three, two), differences([three, two]), strict=True):
        assert one.mean == pytest.approx(np.subtract(pair[1], pair[0]).mean())
        assert one.p == pytest.approx(stats.ttest_rel(pair[1], pair[0]).pvalue)


def test_no_pairs_of_seeds_have_no_difference_and_do_not_hide_others():
    none, some = differences([([], []), ([10.0, 20.0, 30.0], [10.5, 20.6, 30.55])])
    assert np.isnan([none.mean, none.low, none.high, none.p, none.p_corrected]).all()
    assert not none.identical
    assert some.mean == pytest.approx(0.55)
    assert some.p <= some.p_corrected < 0.01
