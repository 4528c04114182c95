"""Statistics of causal claims: rates with bootstrap intervals, divergences. Pure functions of arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmscope.core.intervention import Mean, Rate
from vlmscope.core.seeds import generator

RESAMPLES = 2000


def bootstrap_rate(hits: Sequence[bool] | np.ndarray, seed: int = 0, control: float | None = None) -> Rate:
    """The share of hits with its percentile-bootstrap 95 % interval.

    When all cases agree every resample does too, which says nothing about the next case; the open end then comes from
    the rule of three (Hanley and Lippman-Hand 1983: 3 / n), so that 100 of 100 reads as 0.97 to 1.

    Raises:
        ValueError: no cases.
    """
    values = np.asarray(hits, dtype=float)
    if values.size == 0:
        raise ValueError("a rate needs at least one case")
    mean = float(values.mean())
    resampled = generator(seed, "bootstrap").choice(values, (RESAMPLES, values.size)).mean(1)
    low, high = (float(v) for v in np.quantile(resampled, (0.025, 0.975)))
    if mean == 1.0:
        low = max(1.0 - 3.0 / values.size, 0.0)
    elif mean == 0.0:
        high = min(3.0 / values.size, 1.0)
    return Rate(mean, low, high, int(values.size), control)


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0) -> Mean:
    """The mean of some values with its percentile-bootstrap 95 % interval.

    Raises:
        ValueError: no values.
    """
    found = np.asarray(values, dtype=float)
    if found.size == 0:
        raise ValueError("a mean needs at least one case")
    resampled = generator(seed, "bootstrap").choice(found, (RESAMPLES, found.size)).mean(1)
    low, high = (float(v) for v in np.quantile(resampled, (0.025, 0.975)))
    return Mean(float(found.mean()), low, high, int(found.size))


def kl_divergence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """KL(before || after) in nats of rows of logits [.., V] -> [..]."""
    log_p, log_q = log_softmax(before), log_softmax(after)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [.., V], in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
