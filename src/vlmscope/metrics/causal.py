"""Statistics of causal claims: rates with bootstrap intervals, divergences. Pure functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.seeds import generator

RESAMPLES = 2000


def bootstrap_rate(
    hits: Sequence[bool] | np.ndarray,
    seed: int = 0,
    control: float | None = None,
    groups: Sequence[str] | None = None,
) -> Rate:
    """The share of hits with its percentile-bootstrap 95 % interval.

    With `groups`, a name for each case, whole groups are drawn instead of cases: cases of one picture hang together.

    When all cases agree every resample does too, which says nothing about the next case; the open end then comes from
    the rule of three (Hanley and Lippman-Hand 1983: 3 / n), so that 100 of 100 reads as 0.97 to 1.

    Raises:
        ValueError: no cases, or not a group for each.
    """
    found = bootstrap_mean(np.asarray(hits, dtype=float), seed, control, groups)
    n = found.cases if groups is None else len(set(groups))
    if found.value == 1.0:
        return replace(found, ci_low=max(1.0 - 3.0 / n, 0.0))
    return replace(found, ci_high=min(3.0 / n, 1.0)) if found.value == 0.0 else found


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    seed: int = 0,
    control: float | None = None,
    groups: Sequence[str] | None = None,
) -> Rate:
    """The mean of a measure with its percentile-bootstrap 95 % interval; `groups` as for `bootstrap_rate`.

    Raises:
        ValueError: no cases, or not a group for each.
    """
    found = np.asarray(values, dtype=float)
    if found.size == 0:
        raise ValueError("a mean needs at least one case")
    drawn = generator(seed, "bootstrap")
    if groups is None:
        resampled = drawn.choice(found, (RESAMPLES, found.size)).mean(1)
    else:
        if len(groups) != found.size:
            raise ValueError(f"{found.size} cases, but {len(groups)} names of groups")
        _, of = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(of, found), np.bincount(of)
        chosen = drawn.integers(0, len(counts), (RESAMPLES, len(counts)))
        resampled = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = (float(v) for v in np.quantile(resampled, (0.025, 0.975)))
    return Rate(float(found.mean()), low, high, int(found.size), control)


def kl_divergence(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """KL(before || after) in nats of rows of logits [.., V] -> [..]."""
    log_p, log_q = log_softmax(before), log_softmax(after)
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [.., V], in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def paired_p(done: Sequence[bool] | np.ndarray, control: Sequence[bool] | np.ndarray) -> float:
    """One-sided exact p-value that an intervention hits no more cases than its control on the same cases.

    McNemar's test in its exact form: of the cases where only one of the two hits, at least as many hits of the
    intervention as were seen, if either were as likely. 1 when none differs.

    Raises:
        ValueError: not the same number of cases.
    """
    a, b = np.asarray(done, bool), np.asarray(control, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} cases of the intervention, but {b.size} of the control")
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n
