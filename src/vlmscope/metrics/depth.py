"""At what layer something is carried: the mean layer of a cumulative curve. Pure functions of arrays.

With r_k the share of an effect that layers 0 .. k recover together (k = 0 .. L - 1, r of all layers last), the share
that layer k adds is r_k - r_{k-1}, and its mean layer is

    depth = sum_k k (r_k - r_{k-1}) / r_{L-1} = sum_{k < L-1} (1 - r_k / r_{L-1})

Legend: n cases, L layers.
"""

from __future__ import annotations

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.seeds import generator
from vlmscope.metrics.causal import RESAMPLES


def mean_depth(curves: np.ndarray) -> float:
    """Depth, in layers, of the mean of cumulative curves [n, L]."""
    mean = curves.mean(0)
    return float((1 - mean[:-1] / mean[-1]).sum())


def bootstrap_depth(curves: np.ndarray, less: np.ndarray | None = None, seed: int = 0) -> Rate:
    """Depth with its percentile-bootstrap 95 % interval over cases.

    Args:
        curves: [n, L].
        less: [n, L] of the same cases: the value is then the difference of the two depths, on the same draws.
        seed: of the draws.
    """

    def value(rows: np.ndarray) -> float:
        found = mean_depth(curves[rows])
        return found if less is None else found - mean_depth(less[rows])

    n = len(curves)
    drawn = [value(rows) for rows in generator(seed, "bootstrap depth").integers(0, n, (RESAMPLES, n))]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Rate(value(np.arange(n)), float(low), float(high), n)
