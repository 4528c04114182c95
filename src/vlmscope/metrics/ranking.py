"""How well scores put the right things first, and how alike two rankings or choices are. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

import numpy as np
from scipy.stats import rankdata


def auroc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Probability that a true case scores above a false one, ties counting half (Mann and Whitney 1947); 0.5 is chance.

    Args:
        scores: [N], larger is more likely.
        truth: [N] bool.

    Raises:
        ValueError: all cases are true, or none is.
    """
    truth = np.asarray(truth, bool)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        raise ValueError(f"an AUROC needs true and false cases, and there are {positive} and {negative}")
    ranks = rankdata(scores)
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two lists of scores [N], tied ones at their mean rank; NaN where one of them is constant."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    spread = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / spread) if spread > 0 else float("nan")


def jaccard(first: Collection, second: Collection) -> float:
    """|A and B| / |A or B| of two choices; 1 for two empty ones."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def mean_jaccard(choices: Sequence[Collection]) -> float:
    """Mean over all pairs of choices.

    Raises:
        ValueError: fewer than two choices.
    """
    if len(choices) < 2:
        raise ValueError("stability compares choices: give two or more")
    return float(np.mean([jaccard(a, b) for a, b in combinations(choices, 2)]))
