"""Ranges from repeated seeds: the stated rule, bounded for shares, rounded outwards."""

import math

import pytest

from vlmscope.metrics.causal import half_width, suggested_range


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


def test_every_value_lies_in_its_own_range() -> None:
    for number in range(1, 400):
        value = number / 399
        low, high = suggested_range([value], [value / 7], True)
        assert low <= value <= high and round(low, 2) == low and round(high, 2) == high


def test_no_range_without_values() -> None:
    for values in ([], [math.nan], [1.0, math.inf]):
        with pytest.raises(ValueError, match="finite"):
            suggested_range(values, [], False)


def test_the_half_width_is_the_longer_side() -> None:
    assert half_width(0.9, 0.8, 0.95) == pytest.approx(0.1)
    assert half_width(1.0, 1.0, 1.0) == 0.0
