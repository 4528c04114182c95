"""Facts are found in activations that hold them, on held-out cases, and not in ones that do not."""

import numpy as np
import pytest

from vlmscope.core.records import generator
from vlmscope.metrics.decoding import (
    additive,
    class_means,
    held_out_r2,
    linear_prediction,
    mean_depth,
    simplest,
)


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

    def cells(found: np.ndarray) -> dict[str, np.ndarray]:
        return {"first": found[:, 0], "sum": found.sum(1), "pair": found @ (10, 1)}

    scores = {
        name: held_out_r2(test, class_means(train, cells(known)[name], cells(codes)[name])) for name in cells(codes)
    }
    scores["both"] = held_out_r2(test, additive(train, list(known.T), list(codes.T)))
    order = ("first", "sum", "both", "pair")
    return simplest({name: scores[name] for name in order}, least=0.3).tolist()


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


def test_the_depth_is_the_mean_of_the_layers_by_what_they_add() -> None:
    added = np.array([0.1, 0.0, 0.5, 0.2])
    curve = np.cumsum(added)[None]
    assert mean_depth(curve) == pytest.approx((np.arange(4) * added).sum() / added.sum())
    assert mean_depth(np.array([[0, 0, 0, 2.0]])) == 3
    assert mean_depth(np.array([[2.0, 2, 2, 2]])) == 0
