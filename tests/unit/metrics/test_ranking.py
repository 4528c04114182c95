"""Rank statistics against their definitions."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import spearmanr

from vlmscope.metrics.prediction import auroc, jaccard, mean_jaccard, spearman


def test_auroc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 5, 40).astype(float)  # with ties
    truth = rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a, b in product(scores[truth], scores[~truth])]
    assert auroc(scores, truth) == pytest.approx(np.mean(pairs))
    assert auroc(truth.astype(float), truth) == 1.0
    assert auroc(-truth.astype(float), truth) == 0.0
    assert auroc(np.zeros(40), truth) == 0.5
    with pytest.raises(ValueError, match="true and false"):
        auroc(scores, np.ones(40, bool))


def test_spearman_is_scipys() -> None:
    rng = np.random.default_rng(1)
    one, other = rng.integers(0, 6, (2, 50)).astype(float)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert spearman(one, np.exp(one)) == pytest.approx(1.0)
    assert np.isnan(spearman(one, np.zeros(50)))


def test_jaccard_counts_what_both_have() -> None:
    assert jaccard([1, 2, 3], [2, 3, 4]) == 0.5
    assert jaccard([], []) == 1.0
    assert mean_jaccard([{1}, {1}, {2}]) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="two or more"):
        mean_jaccard([{1}])
