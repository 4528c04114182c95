"""Facts, numbers and concepts are found in activations that hold them, and not in ones that do not."""

import numpy as np
import pandas as pd
import pytest

from vlmscope.core.records import generator
from vlmscope.metrics.decoding import (
    Rule,
    contrast,
    contrast_p,
    explained_by,
    held_out_r2,
    linear_prediction,
    partial_correlation,
    rank_correlation,
    shuffled,
    simplest,
)
from vlmscope.metrics.rates import benjamini_hochberg

C, EACH, M = 4, 12, 60


def digits(split: str, n: int) -> np.ndarray:
    return generator(0, split).integers(0, 10, (n, 2))


def activations(split: str, codes: np.ndarray) -> np.ndarray:
    """Features for: the first digit, both digits, the sum, a pair, noise, nothing; and one that fires once."""
    rng = generator(1, split)
    first, second = codes.T
    columns = [first == 3, first - second, first + second == 12, (first == 3) & (second == 4)]
    noise = rng.standard_normal((len(codes), 1))
    table = np.concatenate([np.stack(columns, 1).astype(float), noise, np.zeros((len(codes), 2))], 1)
    table[:, :4] += 0.01 * rng.standard_normal((len(codes), 4))
    if split == "train":
        table[0, 6] = 1.0
    return table


def kinds_of(shuffled: bool) -> list[str]:
    train_codes, codes = digits("train", 3000), digits("test", 1000)
    train, test = activations("train", train_codes), activations("test", codes)
    known = generator(2).permutation(train_codes) if shuffled else train_codes

    def facts(found: np.ndarray) -> pd.DataFrame:
        first, second = found.T
        return pd.DataFrame({"first": first, "second": second, "sum": first + second, "pair": 10 * first + second})

    kinds = {"first": ["first"], "sum": ["sum"], "both": ["first", "second"], "pair": ["pair"]}
    return simplest(explained_by(kinds, train, facts(known), test, facts(codes)), least=0.3).tolist()


def test_each_feature_is_of_the_simplest_kind_that_explains_it() -> None:
    assert kinds_of(shuffled=False) == ["first", "both", "sum", "pair", "", "", ""]


def test_shuffled_facts_explain_nothing_not_even_a_feature_that_fires_once() -> None:
    assert kinds_of(shuffled=True) == [""] * 7


def test_linear_prediction_reads_what_is_there_and_nothing_of_shuffled_targets() -> None:
    rng = generator(2, "targets")
    x = rng.standard_normal((300, 40))
    targets = np.stack([2 * x[:, 3] - x[:, 7] + 5, rng.standard_normal(300)], 1)
    predicted = linear_prediction(x[:200], targets[:200], x[200:])
    r2 = held_out_r2(targets[200:], predicted)
    assert r2[0] > 0.95 and r2[1] < 0.1
    silent = linear_prediction(np.zeros((4, 3)), np.arange(4.0)[:, None], np.ones((2, 3)))
    np.testing.assert_allclose(silent, 1.5)  # without a feature that varies: the mean


def test_a_feature_of_area_is_none_of_count() -> None:
    rng = np.random.default_rng(1)
    count = rng.integers(1, 7, 4000).astype(float)
    area = count + rng.normal(0, 1, 4000)
    values = np.stack([area + rng.normal(0, 0.3, 4000), count + rng.normal(0, 0.3, 4000)], 1)
    between = float(rank_correlation(count[:, None], area)[0])
    of_count = partial_correlation(rank_correlation(values, count), rank_correlation(values, area), between)
    assert abs(of_count[0]) < 0.1
    assert of_count[1] > 0.8


@pytest.fixture
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Features 0 to 3 prefer concept 0 to 3; 4 fires everywhere; 5 on one case of concept 1; the rest at random."""
    rng, labels = generator(0, "selective"), np.repeat(np.arange(C), EACH)
    values = rng.random((C * EACH, M)).astype(np.float32) * (rng.random((C * EACH, M)) < 0.5)
    values[:, :4] = 0.1 * values[:, :4] + (labels[:, None] == np.arange(C))
    values[:, 4], values[:, 5] = 1.0, 0.0
    values[EACH, 5] = 9.0
    order = rng.permutation(len(labels))
    return values[order], labels[order]


def test_contrast_equals_a_plain_loop(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = labelled
    found = contrast(values, labels, C)
    for concept in range(C):
        mine, others = values[labels == concept], values[labels != concept]
        np.testing.assert_allclose(found.mean[concept], mine.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.rest[concept], others.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.rate[concept], (mine > 0).mean(0))


def test_the_rule_wants_a_contrast_and_many_cases(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    chosen = contrast(*labelled, C).selective(Rule())
    assert np.array_equal(chosen[:, :4], np.eye(C, dtype=bool))
    assert not chosen[:, 4:6].any()
    assert contrast(*labelled, C).selective(Rule(fires=0.05))[1, 5]
    assert contrast(*labelled, C).selective(Rule(ratio=1.0))[:, 4].all()
    silent = contrast(np.zeros((8, 1)), np.arange(8) % 2, 2)
    assert not silent.selective(Rule(fires=0.0)).any()


def test_shuffled_labels_lose_it_and_p_values_tell(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = labelled
    null = list(shuffled(values, labels, C, 199, seed=3))
    assert np.mean([one.selective(Rule())[:, :4].sum() for one in null]) < 2  # of 16, where 4 are true
    q = benjamini_hochberg(contrast_p(contrast(values, labels, C), iter(null)))
    assert (q[np.arange(C), np.arange(C)] < 0.5).all()
    p = contrast_p(contrast(values, labels, C), iter(null))
    assert (p[np.arange(C), np.arange(C)] == 1 / 200).all()
    assert (p[:, 4] == 1).all()  # equal under every order
    assert 0.02 < (p[:, 6:] <= 0.05).mean() < 0.1
