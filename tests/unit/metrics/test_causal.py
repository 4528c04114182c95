"""Rates, intervals, p-values and their correction, and ranges, against values known by hand or by another library."""

import numpy as np
import pytest
from scipy.stats import binomtest, false_discovery_control

from vlmscope.core.records import generator
from vlmscope.metrics.rates import (
    benjamini_hochberg,
    effective_size,
    paired_p,
    permutation_p,
    share_rate,
    suggested_range,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 7), (30, 100), (99, 100), (100, 100)])
def test_shares_of_independent_cases_have_scipys_exact_interval(hits: int, n: int) -> None:
    rate, exact = share_rate([True] * hits + [False] * (n - hits)), binomtest(hits, n).proportion_ci(method="exact")
    assert (rate.value, rate.cases) == (hits / n, n)
    assert (rate.ci_low, rate.ci_high) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_cases_of_one_group_are_drawn_together() -> None:
    hits = np.repeat([True, False, True, False, False, True], 10)
    groups = [f"picture {i // 10}" for i in range(60)]
    alone, together = share_rate(hits), share_rate(hits, groups=groups)
    assert alone.value == together.value == 0.5
    assert together.ci_high - together.ci_low > 2.5 * (alone.ci_high - alone.ci_low)
    assert share_rate(hits, groups=[str(i) for i in range(60)]).ci_low == pytest.approx(alone.ci_low, abs=0.04)
    two = share_rate([True] * 40, groups=["a", "b"] * 20)
    assert two.ci_low == pytest.approx(share_rate([True, True]).ci_low) and two.ci_low < 0.2  # two pictures say little


def test_grouped_shares_are_worth_fewer_cases() -> None:
    hits = np.array([True, True, False, False] * 10)
    each = [str(i) for i in range(40)]
    assert effective_size(hits.astype(float), each) == 40
    same = [str(i // 4) for i in range(40)]  # groups alike: as many cases as groups
    assert effective_size(hits.astype(float), same) == 10
    ones = effective_size(np.repeat([0.0, 1.0], 20), [str(i // 2) for i in range(40)])  # pairs of equal cases
    assert 15 < ones < 20


def test_a_paired_p_value_by_hand() -> None:
    done = [True, True, True, True, False, True]
    control = [False, False, False, True, False, False]
    assert paired_p(done, control) == 1 / 16  # four cases differ, all for the intervention
    assert paired_p(control, done) == 1.0
    assert paired_p([True, False], [False, True]) == 0.75
    assert paired_p([], []) == paired_p([True], [True]) == 1.0


def test_correction_equals_scipys() -> None:
    p = generator(1, "p").random((5, 8)) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p, axis=None).reshape(5, 8))


def test_p_counts_draws_as_large() -> None:
    null = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert permutation_p(np.array([2.0, 6.0]), null).tolist() == [3 / 5, 1 / 5]


@pytest.mark.parametrize(
    ("values", "halves", "share", "expected"),
    [
        ([0.9, 0.92, 0.91], [0.05, 0.06, 0.04], True, (0.84, 0.98)),  # the interval is the widest
        ([0.5, 0.7], [0.05], True, (0.3, 0.9)),  # the spread is
        ([1.0, 1.0, 1.0], [0.02], True, (0.98, 1.0)),  # 1 is the most
        ([1.0, 1.0, 1.0], [], True, (0.97, 1.0)),  # the floor, where there is no interval
        ([0.0, 0.01], [], True, (0.0, 0.04)),
        ([290.0, 300.0], [], False, (275.0, 315.0)),
        ([1234.0, 1234.0], [], False, (1170.0, 1300.0)),  # rounded outwards to three digits
        ([-2.0, -1.0], [], False, (-3.0, 0.0)),
        ([0.0], [], False, (0.0, 0.0)),
    ],
)
def test_the_rule(values: list[float], halves: list[float], share: bool, expected: tuple[float, float]) -> None:
    assert suggested_range(values, halves, share) == pytest.approx(expected, abs=1e-12)
