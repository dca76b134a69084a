import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dae.analysis.statistics import estimates, holm, interval

P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=8)


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


def test_holm_corrects_a_worked_example():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert np.isnan(holm([math.nan])).all()


@given(P_VALUES)
def test_holm_never_lowers_a_p_value_or_changes_their_order(p_values):
    pairs = list(zip(p_values, holm(p_values), strict=True))
    for (other_p, other), (p, corrected) in itertools.pairwise([(0.0, 0.0), *pairs]):
        assert p <= corrected <= min(1, p * len(p_values) if p == min(p_values) else 1)
        assert p > other_p or corrected <= other


@given(st.lists(st.floats(-1000, 1000, width=32, allow_subnormal=False), min_size=2, max_size=9, unique=True))
def test_the_interval_is_a_t_interval(values):
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(interval(values)[1:], expected, rtol=1e-6, atol=1e-9)


def test_the_interval_of_equal_values_has_no_width_and_that_of_fewer_than_two_is_nan():
    assert interval([2.5, 2.5, 2.5]) == (2.5, 2.5, 2.5)
    assert interval([2.5]).mean == 2.5
    assert np.isnan([*interval([2.5])[1:], *interval([])]).all()


def test_differences_are_paired_by_seed():
    # Seeds differ by far more than settings do; the last seed has a value of one setting only.
    first, better = by_seed(10.0, 20.0, 30.0, 90.0), by_seed(10.5, 20.6, 30.55)
    found = estimates({"first": first, "better": better, "same": first})
    assert found["better"].mean == interval(list(better.values()))
    assert found["better"].difference == pytest.approx(interval([0.5, 0.6, 0.55]))
    assert found["better"].p == pytest.approx(stats.ttest_rel([10.5, 20.6, 30.55], [10.0, 20.0, 30.0]).pvalue)
    assert found["better"].p_corrected == pytest.approx(2 * found["better"].p)
    assert (found["same"].difference, found["same"].p) == ((0, 0, 0), 1)
    assert math.isnan(found["first"].difference.mean)


def test_fewer_than_three_common_seeds_have_no_p_value_and_do_not_hide_others():
    first = by_seed(10.0, 20.0, 30.0)
    values = {"single": {1: 21.0}, "two": by_seed(11.0, 21.0001), "none": {}, "some": by_seed(10.5, 20.6, 30.55)}
    found = estimates({"first": first, **values})
    assert found["single"].difference.mean == 1
    assert np.isnan([found[name].p for name in ("single", "two", "none")]).all()
    assert np.isnan([found["single"].p_corrected, found["two"].p_corrected]).all()
    assert np.isnan(found["none"].difference).all()
    assert found["some"].p <= found["some"].p_corrected < 0.01
