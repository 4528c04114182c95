"""Agreement of predictions with measurements, against scipy and by construction."""

import numpy as np
import pytest
from scipy import stats

from vlmscope.metrics.prediction import agreement


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


def test_exact_predictions_leave_no_doubt() -> None:
    x, y, groups = cases(0.0)
    found = agreement(2 * x, y * 4, groups)
    for one in (found.pearson, found.spearman, found.slope, found.same_sign):
        assert (one.value, one.ci_low, one.ci_high) == pytest.approx((1.0, 1.0, 1.0))
    assert found.error.value == pytest.approx(0.0)


def test_intervals_follow_groups_not_cases() -> None:
    """Ten copies of six cases say no more than the six."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(6), rng.standard_normal(6)
    few, many = (
        agreement(x, y, np.arange(6)),
        agreement(np.repeat(x, 10), np.repeat(y, 10), np.repeat(np.arange(6), 10)),
    )
    assert many.pearson.ci_high - many.pearson.ci_low == pytest.approx(
        few.pearson.ci_high - few.pearson.ci_low, rel=0.2
    )


def test_constants_correlate_with_nothing() -> None:
    found = agreement(np.ones(4), np.arange(4.0), np.array([0, 0, 1, 1]))
    assert (found.pearson.value, found.spearman.value) == (0.0, 0.0)


@pytest.mark.parametrize("groups", [[0, 0, 0, 0], [0, 0, 1]])
def test_too_little_is_an_error(groups: list[int]) -> None:
    with pytest.raises(ValueError, match=r"groups"):
        agreement(np.arange(4.0), np.arange(4.0), np.array(groups))
