"""How features depend on a number: tuning curves, rank correlation, and the shape of a curve. Pure functions of arrays.

Legend: N cases, F features, C levels of the number.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

SLACK = 0.05  # of a curve's range, by which a step may go the wrong way
UP, DOWN, PEAK, OTHER = "up", "down", "peak", "other"


def tuning_curves(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """[C, F], mean of `values [N, F]` at each of the C different `levels [N]`, ascending."""
    _, codes = np.unique(levels, return_inverse=True)
    counts = np.bincount(codes)
    return (np.eye(len(counts), dtype=values.dtype)[codes].T @ values) / counts[:, None]


def rank_correlation(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[F], Spearman's rho of each column of `values [N, F]` with `x [N]`; 0 where either is constant."""
    ranks = stats.rankdata(values, axis=0)
    other = stats.rankdata(x)
    ranks -= ranks.mean(0)
    other -= other.mean()
    norms = np.sqrt((ranks**2).sum(0)) * np.sqrt((other**2).sum())
    return np.divide(other @ ranks, norms, out=np.zeros(values.shape[1]), where=norms > 0)


def partial_correlation(first: np.ndarray, second: np.ndarray, between: float) -> np.ndarray:
    """[F], what is left of correlations `first [F]` with one quantity when another is held fixed.

    Args:
        first: [F], with the quantity of interest.
        second: [F], with the one that is held fixed.
        between: of the two quantities.
    """
    spread = np.sqrt(np.clip((1 - second**2) * (1 - between**2), 1e-12, None))
    return (first - second * between) / spread


def level_p(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """[F], p-values of a one-way analysis of variance: does the mean of `values [N, F]` differ between `levels [N]`?

    1 where a feature never varies, 0 where it varies between levels alone.
    """
    names, codes = np.unique(levels, return_inverse=True)
    curves = tuning_curves(values.astype(np.float64), levels)
    counts = np.bincount(codes)[:, None]
    mean = values.mean(0, dtype=np.float64)
    between = (counts * (curves - mean) ** 2).sum(0)
    within = ((values - curves[codes]) ** 2).sum(0)
    freedom = len(values) - len(names)
    varies = between + within > 1e-8 * (values.astype(np.float64) ** 2).sum(0)
    ratio = np.where(varies, np.inf, 0.0)
    np.divide(between / (len(names) - 1), within / freedom, out=ratio, where=varies & (within > 0))
    return np.where(varies, stats.f.sf(ratio, len(names) - 1, freedom), 1.0)


def curve_kinds(curves: np.ndarray) -> np.ndarray:
    """[F] names of the shape of `curves [C, F]`: up, down, peak (one maximum, not at an end), or other.

    A curve goes up when no step goes down by more than `SLACK` of its range, and it peaks when it goes up to its
    maximum and down from there. A constant one is other.
    """
    count, width = curves.shape
    span = curves.max(0) - curves.min(0)
    steps = np.diff(curves, axis=0)
    rising, falling = steps >= -SLACK * span, steps <= SLACK * span
    top = curves.argmax(0)
    at = np.arange(count - 1)[:, None]
    single = np.where(at < top, rising, falling).all(0)
    kinds = np.full(width, OTHER, dtype=object)
    varies = span > 0
    kinds[varies & single & (top > 0) & (top < count - 1)] = PEAK
    kinds[varies & rising.all(0)] = UP
    kinds[varies & falling.all(0)] = DOWN
    return kinds
