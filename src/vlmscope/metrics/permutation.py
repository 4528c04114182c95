"""p-values by permutation."""

from __future__ import annotations

import numpy as np


def permutation_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """One-sided p-values (r + 1) / (n + 1), r null draws at least as large (Phipson and Smyth 2010): never 0.

    Args:
        observed: [..].
        null: [n, ..], the same under n permutations.
    """
    observed, null = np.asarray(observed), np.asarray(null)
    return ((null >= observed).sum(0) + 1) / (len(null) + 1)
