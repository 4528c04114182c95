"""Selective features are found, shuffled labels find none, and names matter only where they match."""

from itertools import permutations

import numpy as np
import pytest

from vlmscope.core.records import generator
from vlmscope.metrics.causal import benjamini_hochberg
from vlmscope.metrics.decoding import Rule, contrast, contrast_p, matching_p, shuffled

C, EACH, M = 4, 12, 60


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    """Features 0 to 3 prefer concept 0 to 3; 4 fires everywhere; 5 on one case of concept 1; the rest at random."""
    rng, labels = generator(0, "selective"), np.repeat(np.arange(C), EACH)
    values = rng.random((C * EACH, M)).astype(np.float32) * (rng.random((C * EACH, M)) < 0.5)
    values[:, :4] = 0.1 * values[:, :4] + (labels[:, None] == np.arange(C))
    values[:, 4], values[:, 5] = 1.0, 0.0
    values[EACH, 5] = 9.0
    order = rng.permutation(len(labels))
    return values[order], labels[order]


def test_contrast_equals_a_plain_loop(case: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = case
    found = contrast(values, labels, C)
    for concept in range(C):
        mine, others = values[labels == concept], values[labels != concept]
        np.testing.assert_allclose(found.mean[concept], mine.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.rest[concept], others.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.rate[concept], (mine > 0).mean(0))


def test_the_rule_wants_a_contrast_and_many_cases(case: tuple[np.ndarray, np.ndarray]) -> None:
    chosen = contrast(*case, C).selective(Rule())
    assert np.array_equal(chosen[:, :4], np.eye(C, dtype=bool))
    assert not chosen[:, 4:6].any()
    assert contrast(*case, C).selective(Rule(fires=0.05))[1, 5]
    assert contrast(*case, C).selective(Rule(ratio=1.0))[:, 4].all()
    silent = contrast(np.zeros((8, 1)), np.arange(8) % 2, 2)
    assert not silent.selective(Rule(fires=0.0)).any()


def test_shuffled_labels_lose_it_and_p_values_tell(case: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = case
    null = list(shuffled(values, labels, C, 199, seed=3))
    assert np.mean([one.selective(Rule())[:, :4].sum() for one in null]) < 2  # of 16, where 4 are true
    q = benjamini_hochberg(contrast_p(contrast(values, labels, C), iter(null)))
    assert (q[np.arange(C), np.arange(C)] < 0.5).all()
    p = contrast_p(contrast(values, labels, C), iter(null))
    assert (p[np.arange(C), np.arange(C)] == 1 / 200).all()
    assert (p[:, 4] == 1).all()  # equal under every order
    assert 0.02 < (p[:, 6:] <= 0.05).mean() < 0.1


def test_matching_goes_through_all_orders() -> None:
    table = generator(1, "matching").integers(0, 9, (5, 5))
    table[np.arange(5), np.arange(5)] += 4
    sums = np.array([sum(table[i, j] for i, j in enumerate(order)) for order in permutations(range(5))])
    mean, p = matching_p(table)
    assert mean == pytest.approx(sums.mean()) == pytest.approx(table.sum() / 5)
    assert p == pytest.approx((sums >= table.trace()).mean())
    assert matching_p(np.ones((4, 4)))[1] == 1.0
    big = np.eye(10) * 5
    assert matching_p(big)[1] == pytest.approx(1 / 10_001)
