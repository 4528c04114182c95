"""How well a label tells the items on which a feature fires from others: detection AUROC and balanced accuracy.

AUROC is the chance that a random positive gets a higher grade than a random negative, ties counting one half. Its
variance is that of DeLong et al. (1988), its 95 % interval Wilson's with as many trials as that variance is worth; p is
Mann and Whitney's, one-sided, corrected for ties. Chance is 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from vlmscope.metrics.multiple import benjamini_hochberg

_Z = 1.959964


@dataclass(frozen=True)
class Detection:
    """The score of a label on `positives` and `negatives` items.

    Attributes:
        auroc, low, high: with its 95 % interval.
        balanced: balanced accuracy of "the grade is above one half".
        p: that of grades which know nothing.
        positives, negatives: how many items.
    """

    auroc: float
    low: float
    high: float
    balanced: float
    p: float
    positives: int
    negatives: int


def detection(positive: np.ndarray, negative: np.ndarray) -> Detection | None:
    """Score grades (0 to 1) of items of both sides; None when a side is empty."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return None
    levels, code = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    up = np.bincount(code[:n], minlength=len(levels))
    down = np.bincount(code[n:], minlength=len(levels))
    beaten = (np.cumsum(down) - 0.5 * down) / m  # by a positive of each level
    beating = (n - np.cumsum(up) + 0.5 * up) / n  # a negative of each level
    auroc = float(up @ beaten / n)
    variance = _spread(beaten, up) / n + _spread(beating, down) / m
    trials = auroc * (1 - auroc) / variance if variance > 0 else min(n, m)
    low, high = wilson(auroc, max(min(trials, n + m), 1.0))
    both = up + down
    ties = float((both.astype(float) ** 3 - both).sum())
    null = (n + m + 1 - ties / max((n + m) * (n + m - 1), 1)) / (12.0 * n * m)
    p = float(ndtr(-(auroc - 0.5) / np.sqrt(null))) if null > 1e-15 else 1.0
    balanced = 0.5 * (float((positive > 0.5).mean()) + float((negative <= 0.5).mean()))
    return Detection(auroc, low, high, balanced, p, n, m)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of so many trials."""
    middle = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * np.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def discoveries(p: np.ndarray, rate: float = 0.05) -> np.ndarray:
    """`[..]` bool: what may be called better than chance so that at most `rate` of it is not (Benjamini & Hochberg).

    p-values that are no number are never.
    """
    known = np.isfinite(p)
    found = np.zeros(p.shape, dtype=bool)
    found[known] = benjamini_hochberg(p[known]) <= rate
    return found


def would_pass(p: np.ndarray, passed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Which p-values that chance gave would be called discoveries beside the real ones.

    Args:
        p: `[N]`, of the real set.
        passed: `[N]` bool, its `discoveries`.
        chance: `[M]`, where nothing is to be found; nan for none.

    Returns:
        `[M]` bool: at most the largest p that passed. The share of these, times N over the number that passed,
        estimates the false discovery rate without assuming that p is right.
    """
    cut = float(p[passed].max()) if passed.any() else -1.0
    return np.isfinite(chance) & (np.nan_to_num(chance, nan=np.inf) <= cut)


def _spread(values: np.ndarray, counts: np.ndarray) -> float:
    """The sample variance of values with multiplicities."""
    total = counts.sum()
    if total < 2:
        return 0.0
    mean = values @ counts / total
    return float((values - mean) ** 2 @ counts / (total - 1))
