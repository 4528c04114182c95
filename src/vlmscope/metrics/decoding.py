"""What a feature's activation says about a fact, on data that were not used to learn it. Pure functions of arrays.

Legend: n training cases, m held-out cases, F features, c classes of a fact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def held_out_r2(test: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[F], 1 - squared error of `predicted` [m, F] over that of the mean of `test` [m, F] itself; 0 if it is constant.

    The held-out mean, not the training one: a feature that fires once in training and never again would else be
    explained by any model whose cells are mostly empty.
    """
    error = ((test - predicted) ** 2).sum(0)
    spread = ((test - test.mean(0)) ** 2).sum(0)
    # What varies by rounding alone is constant.
    varies = spread > 1e-8 * (test**2).sum(0)
    return np.where(varies, 1 - error / np.where(varies, spread, 1), 0.0)


def class_means(train: np.ndarray, codes: np.ndarray, test_codes: np.ndarray) -> np.ndarray:
    """[m, F], each held-out case predicted by the training mean of its class; the overall mean for a new class.

    Args:
        train: [n, F] activations.
        codes: [n] int, classes.
        test_codes: [m] int.
    """
    size = int(max(codes.max(), test_codes.max())) + 1
    counts = np.bincount(codes, minlength=size)
    onehot = np.eye(size, dtype=train.dtype)[codes]
    means = onehot.T @ train / np.maximum(counts, 1)[:, None]
    means[counts == 0] = train.mean(0)
    return means[test_codes]


def additive(train: np.ndarray, codes: Sequence[np.ndarray], test_codes: Sequence[np.ndarray]) -> np.ndarray:
    """[m, F], predicted by a sum of one term a fact, by least squares.

    Args:
        train: [n, F] activations.
        codes: for each fact [n] int.
        test_codes: for each fact [m] int.
    """
    sizes = [int(max(a.max(), b.max())) + 1 for a, b in zip(codes, test_codes, strict=True)]

    def design(found: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.eye(size)[code] for size, code in zip(sizes, found, strict=True)], 1)

    weights = np.linalg.lstsq(design(codes), train, rcond=None)[0]
    return design(test_codes) @ weights


def linear_accuracy(
    train: np.ndarray, codes: np.ndarray, test: np.ndarray, test_codes: np.ndarray, ridge: float = 1.0
) -> np.ndarray:
    """[m] bool, which held-out cases a linear readout of activations classifies rightly.

    Ridge regression to one-hot classes on standardised features; the largest output is the answer. Without a feature
    that varies it is the most frequent class.

    Args:
        train: [n, F] activations.
        codes: [n] int.
        test: [m, F].
        test_codes: [m] int.
        ridge: penalty, in units of 1 % of the mean squared norm of a training case.
    """
    classes = np.eye(int(max(codes.max(), test_codes.max())) + 1)[codes]
    return linear_prediction(train, classes, test, ridge).argmax(1) == test_codes


def linear_prediction(train: np.ndarray, targets: np.ndarray, test: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """[m, t], held-out targets as ridge regression on standardised features reads them off.

    Args:
        train: [n, F] activations.
        targets: [n, t].
        test: [m, F].
        ridge: as for `linear_accuracy`.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    scale = train.std(0)
    used = scale > 1e-5 * np.abs(train).max(0)  # what varies by rounding alone is constant
    mean, scale = train[:, used].mean(0), scale[used]
    x = (train[:, used] - mean) / scale
    # The dual form: n by n, since there may be more features than cases.
    gram = x @ x.T
    penalty = ridge * 0.01 * np.trace(gram) / len(x) if used.any() else 1.0
    dual = np.linalg.solve(gram + penalty * np.eye(len(x)), targets - targets.mean(0))
    return ((test[:, used] - mean) / scale) @ (x.T @ dual) + targets.mean(0)


def simplest(scores: Mapping[str, np.ndarray], least: float, share: float = 0.9) -> np.ndarray:
    """[F] names: the first model, in the order given, whose R^2 is at least `share` of the best one's; "" where the
    best is below `least`.

    Args:
        scores: model -> held-out R^2 [F], simplest first.
        least: below this a feature says nothing.
        share: how near to the best a simpler model must come.
    """
    best = np.max(list(scores.values()), axis=0)
    kinds = np.full(len(best), "", dtype=object)
    for name in reversed(list(scores)):
        kinds[(best >= least) & (scores[name] >= share * best)] = name
    return kinds
