"""Agreement, rankings and faithfulness: against scipy, definitions and known values."""

from itertools import product

import numpy as np
import pytest
from scipy import stats
from scipy.stats import spearmanr

from vlmscope.metrics.prediction import (
    SHARES,
    agreement,
    auc,
    faithfulness,
    faithfulness_curve,
    sizes,
    spearman,
    trapezoid,
)


def cases(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(60)
    return x, 0.5 * x + noise * rng.standard_normal(60), np.repeat(np.arange(6), 10)


def test_values_are_those_of_scipy() -> None:
    x, y, groups = cases(0.4)
    found = agreement(x, y, groups)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert found.spearman.value == pytest.approx(np.asarray(stats.spearmanr(x, y))[0], abs=1e-12)
    assert found.slope.value == pytest.approx(float(np.linalg.lstsq(x[:, None], y, rcond=None)[0][0]), abs=1e-12)
    assert found.same_sign.value == np.mean(np.sign(x) == np.sign(y))
    for one in (found.pearson, found.spearman, found.slope):
        assert one.ci_low < one.value < one.ci_high
    assert found.spearman.control is not None and found.spearman.control < 0.3
    assert found == agreement(x, y, groups)  # the same seed


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 40).astype(float)  # with ties
    truth = rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(scores[truth], scores[~truth])]
    assert auc(scores, truth) == pytest.approx(np.mean(pairs))
    assert auc(truth.astype(float), truth) == 1.0
    assert auc(-truth.astype(float), truth) == 0.0
    assert auc(np.zeros(40), truth) == 0.5
    assert np.isnan(auc(scores, np.ones(40, bool)))  # no pair


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 6, (2, 50)).astype(float)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert spearman(one, np.exp(one)) == pytest.approx(1.0)
    assert np.isnan(spearman(one, np.zeros(50)))


def test_faithfulness_is_a_ratio_of_means() -> None:
    clean, corrupt = np.array([4.0, 8.0]), np.array([0.0, -2.0])
    found = faithfulness(np.array([1.0, 5.0]), clean, corrupt)
    assert found.value == pytest.approx((3 + 1) / (6 + 1))
    assert found.cases == 2
    assert found.ci_low <= found.value <= found.ci_high


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
