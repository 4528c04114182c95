"""p-values by permutation, and what is left of them when many are looked at."""

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


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values of tests, of any shape (Benjamini and Hochberg 1995).

    Of the tests whose adjusted value is at most q, a share q is expected to be wrong.
    """
    flat = np.asarray(p, np.float64).ravel()
    order = np.argsort(flat)
    raised = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return adjusted.reshape(np.shape(p))
