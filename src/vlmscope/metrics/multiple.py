"""Correction of p-values when many hypotheses are tried at once."""

from __future__ import annotations

import numpy as np


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values that control the false discovery rate (Benjamini and Hochberg 1995).

    `q[i] = min over j with p[j] >= p[i] of p[j] * m / rank(j)`, at most 1: rejecting all with q <= alpha keeps the
    expected share of false rejections below alpha when the tests are independent or positively dependent.

    Args:
        p: any shape, m p-values in [0, 1].

    Returns:
        q, the same shape, float64.

    Raises:
        ValueError: a value is NaN or outside [0, 1].
    """
    values = np.asarray(p, np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values lie between 0 and 1")
    flat = values.ravel()
    order = np.argsort(flat, kind="stable")
    raised = flat[order] * len(flat) / np.arange(1, len(flat) + 1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return adjusted.reshape(values.shape)
