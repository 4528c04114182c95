"""Areas under the curve against brute force; cross-validation by groups leaks nothing."""

import numpy as np
import pytest

from vlmscope.metrics.prediction import PredictorTest, auc, group_folds, held_out_scores


def brute(scores: np.ndarray, wrong: np.ndarray, strata: np.ndarray | None = None) -> float:
    won, pairs = 0.0, 0
    for i in np.flatnonzero(wrong):
        for j in np.flatnonzero(~wrong):
            if strata is None or strata[i] == strata[j]:
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                pairs += 1
    return won / pairs


@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties
def test_the_area_is_the_share_of_pairs_in_order(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, wrong = rng.integers(levels, size=60).astype(float), rng.random(60) < 0.3
    strata = rng.integers(4, size=60)
    assert auc(scores, wrong) == pytest.approx(brute(scores, wrong))
    assert auc(scores, wrong, strata) == pytest.approx(brute(scores, wrong, strata))
    assert auc(-scores, wrong) == pytest.approx(1 - auc(scores, wrong))


def test_folds_never_split_a_group_and_are_even() -> None:
    groups = np.random.default_rng(1).integers(30, size=200)
    folds = group_folds(groups, 5, seed=3)
    assert all(len(set(folds[groups == name])) == 1 for name in np.unique(groups))
    sizes = np.bincount([folds[groups == name][0] for name in np.unique(groups)])
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1
    assert len(set(group_folds(groups, None))) == len(np.unique(groups))
    assert not np.array_equal(folds, group_folds(groups, 5, seed=4))


def test_cross_validation_by_groups_leaks_nothing() -> None:
    """Each group has a signature of its own and one outcome at random: learnt by heart, it says nothing of others."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 6)
    values = rng.normal(size=(60, 40))[groups] + 0.01 * rng.normal(size=(360, 40))
    wrong = rng.permutation(np.arange(60) % 2 == 0)[groups]
    grouped = held_out_scores(values, wrong, group_folds(groups, 6))
    leaking = held_out_scores(values, wrong, rng.integers(6, size=360))
    assert auc(leaking, wrong) > 0.9
    assert auc(grouped, wrong) < 0.65


@pytest.mark.parametrize(("news", "more"), [(0.0, False), (1.5, True)])
def test_a_fitted_predictor_adds_to_the_prior_only_what_the_prior_lacks(news: float, more: bool) -> None:
    """Wrong answers follow from an uncertainty and, with `news`, from something that it does not know."""
    rng = np.random.default_rng(5)
    groups, hidden, sure = np.repeat(np.arange(150), 3), rng.normal(size=450), rng.normal(size=450)
    wrong = sure + news * hidden + rng.normal(size=450) > 0.5
    test = PredictorTest(wrong, groups, group_folds(groups, 10), shuffles=20)
    scores, area, high = test.fitted(np.column_stack([sure + 0.1 * rng.normal(size=450), hidden]))
    assert area.control is not None and abs(area.control - 0.5) < 0.05 < high - 0.4 and area.ci_low > high
    gain = test.area(scores, sure)
    assert gain.value == pytest.approx(auc(scores, wrong) - auc(sure, wrong)) and (gain.ci_low > 0) == more
