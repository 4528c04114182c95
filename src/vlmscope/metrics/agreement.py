"""How well predictions agree with what was measured: correlations and slope with intervals. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.seeds import generator
from vlmscope.metrics.ranking import spearman

RESAMPLES = 400
SHUFFLES = 50


@dataclass(frozen=True)
class Agreement:
    """Predicted x against measured y over n cases, each number with its bootstrap 95 % interval.

    Attributes:
        pearson, spearman: correlations; `control` is the mean absolute correlation after shuffling x within groups.
        slope: of the line through the origin, sum x y / sum x x; 1 where predictions have the right size.
        same_sign: the share of cases with x != 0 where y has the sign of x.
        error: sum |y - x| / sum |x|, 0 where predictions are exact.
    """

    pearson: Rate
    spearman: Rate
    slope: Rate
    same_sign: Rate
    error: Rate


def agreement(
    predicted: np.ndarray, measured: np.ndarray, groups: Sequence[str] | np.ndarray, seed: int = 0
) -> Agreement:
    """Compare [n] predictions with [n] measurements; whole `groups` [n] are drawn for the intervals.

    A correlation with something constant is 0.

    Raises:
        ValueError: not a measurement and a group for each, fewer than three cases, or fewer than two groups.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    names, of = np.unique(np.asarray(groups), return_inverse=True)
    if not x.shape == y.shape == of.shape:
        raise ValueError(f"{x.size} predictions, {y.size} measurements and {of.size} groups")
    if x.size < 3 or len(names) < 2:
        raise ValueError(f"an interval needs 3 cases of 2 groups, not {x.size} of {len(names)}")
    members = [np.flatnonzero(of == g) for g in range(len(names))]
    drawn = generator(seed, "agreement")
    resampled = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[g] for g in drawn.integers(0, len(names), len(names))])
        resampled.append(_numbers(x[rows], y[rows]))
    low, high = np.quantile(np.array(resampled), (0.025, 0.975), axis=0)
    shuffled = []
    for _ in range(SHUFFLES):
        mixed = x.copy()
        for rows in members:
            mixed[rows] = x[drawn.permutation(rows)]
        shuffled.append([abs(pearson(mixed, y)), abs(_rank_correlation(mixed, y))])
    controls = [*np.mean(shuffled, 0).tolist(), None, None, None]
    values = _numbers(x, y)
    return Agreement(*(Rate(values[i], float(low[i]), float(high[i]), x.size, controls[i]) for i in range(len(values))))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of [n] and [n]; 0 where either is constant."""
    a, b = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """0 where one of them is constant."""
    return float(np.nan_to_num(spearman(x, y)))


def _numbers(x: np.ndarray, y: np.ndarray) -> list[float]:
    square, size, signed = float(x @ x), float(np.abs(x).sum()), x != 0
    return [
        pearson(x, y),
        _rank_correlation(x, y),
        float(x @ y) / square if square > 0 else 0.0,
        float((np.sign(x) == np.sign(y))[signed].mean()) if signed.any() else 0.0,
        float(np.abs(y - x).sum()) / size if size > 0 else 0.0,
    ]
