"""Faithfulness, CPR and CMD: known values, and intervals that behave as intervals do."""

import numpy as np
import pytest

from vlmscope.metrics.prediction import SHARES, faithfulness, faithfulness_curve, sizes, trapezoid


def test_areas_follow_the_trapezoid_rule_on_a_linear_axis() -> None:
    x, late = np.array(SHARES), np.zeros(10)
    late[-1] = 1.0
    for values, expected in ((np.ones(10), 0.999), (x, (1 - 0.001**2) / 2), (late, 0.25)):  # exact on a line
        assert trapezoid(x, values) == pytest.approx(expected)
    assert trapezoid(x, np.stack([np.ones(10), x])).tolist() == pytest.approx([0.999, 0.4999995])


def test_faithfulness_is_a_ratio_of_means() -> None:
    clean, corrupt = np.array([4.0, 8.0]), np.array([0.0, -2.0])
    found = faithfulness(np.array([1.0, 5.0]), clean, corrupt)
    assert found.value == pytest.approx((3 + 1) / (6 + 1))
    assert found.cases == 2
    assert found.ci_low <= found.value <= found.ci_high
    with pytest.raises(ValueError, match="nothing to recover"):
        faithfulness(clean, clean, clean)
    with pytest.raises(ValueError, match="at least one"):
        faithfulness(np.array([]), np.array([]), np.array([]))


def test_curves_carry_the_ends_and_narrow_with_more_pairs() -> None:
    def curve(pairs: int):
        rng = np.random.default_rng(3)
        clean, corrupt = rng.normal(5, 1, pairs), rng.normal(-3, 1, pairs)
        share = np.sqrt(np.array(SHARES))[:, None]
        noise = rng.normal(0, 1, (10, pairs)) * (1 - share)
        return faithfulness_curve(corrupt + share * (clean - corrupt) + noise, clean, corrupt, sizes(1000))

    few, many = curve(10), curve(1000)
    assert many.counts == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert many.rates[-1].value == pytest.approx(1.0)
    assert many.cpr.value == pytest.approx(trapezoid(SHARES, np.sqrt(SHARES)), abs=0.02)
    assert many.cpr.value + many.cmd.value == pytest.approx(0.999)  # f stays below 1
    assert many.cpr.ci_low < many.cpr.value < many.cpr.ci_high
    assert many.cpr.ci_high - many.cpr.ci_low < few.cpr.ci_high - few.cpr.ci_low
    with pytest.raises(ValueError, match="MIB's areas"):
        faithfulness_curve(np.zeros((3, 4)), np.ones(4), np.zeros(4), (1, 2, 3))
