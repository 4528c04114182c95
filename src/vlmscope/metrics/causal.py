"""Statistics of causal claims: rates with bootstrap intervals, p-values and their correction, ranges over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.records import generator

RESAMPLES = 2000


def bootstrap_rate(
    hits: Sequence[bool] | np.ndarray,
    seed: int = 0,
    control: float | None = None,
    groups: Sequence[str] | None = None,
) -> Rate:
    """The share of hits with its percentile-bootstrap 95 % interval; `groups` as for `bootstrap_mean`.

    When all cases agree every resample does too, which says nothing about the next case; the open end then comes from
    the rule of three (Hanley and Lippman-Hand 1983: 3 / n), so that 100 of 100 reads as 0.97 to 1.
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
    """The mean of a measure with its percentile-bootstrap 95 % interval.

    With `groups`, a name for each case, whole groups are drawn instead of cases: cases of one picture hang together.
    """
    found = np.asarray(values, dtype=float)
    if found.size == 0:
        raise ValueError("a mean needs at least one case")
    if groups is not None and len(groups) != found.size:
        raise ValueError(f"{found.size} cases, but {len(groups)} names of groups")
    low, high = _interval(found.tobytes(), None if groups is None else tuple(groups), seed)
    return Rate(float(found.mean()), low, high, int(found.size), control)


@lru_cache(maxsize=1024)  # metrics and every mark of a report ask for the same rates
def _interval(values: bytes, groups: tuple[str, ...] | None, seed: int) -> tuple[float, float]:
    """The interval of `bootstrap_mean`, from float64 values."""
    found, drawn = np.frombuffer(values), generator(seed, "bootstrap")
    if groups is None:
        resampled = drawn.choice(found, (RESAMPLES, found.size)).mean(1)
    else:
        _, of = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = np.bincount(of, found), np.bincount(of)
        chosen = drawn.integers(0, len(counts), (RESAMPLES, len(counts)))
        resampled = sums[chosen].sum(1) / counts[chosen].sum(1)
    low, high = (float(v) for v in np.quantile(resampled, (0.025, 0.975)))
    return low, high


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [.., V], in float64."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def paired_p(done: Sequence[bool] | np.ndarray, control: Sequence[bool] | np.ndarray) -> float:
    """One-sided exact p-value that an intervention hits no more cases than its control on the same cases.

    McNemar's test in its exact form: of the cases where only one of the two hits, at least as many hits of the
    intervention as were seen, if either were as likely. 1 when none differs.
    """
    a, b = np.asarray(done, bool), np.asarray(control, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} cases of the intervention, but {b.size} of the control")
    gained, lost = int((a & ~b).sum()), int((b & ~a).sum())
    n = gained + lost
    return sum(math.comb(n, k) for k in range(gained, n + 1)) / 2**n


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values q, of any shape, that control the false discovery rate (Benjamini and Hochberg 1995).

    `q[i] = min over j with p[j] >= p[i] of p[j] * m / rank(j)`, at most 1: rejecting all with q <= alpha keeps the
    expected share of false rejections below alpha when the tests are independent or positively dependent.
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


def permutation_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """One-sided p-values (r + 1) / (n + 1) of `observed` [..]: r of the n null draws [n, ..] are at least as large
    (Phipson and Smyth 2010), so never 0.
    """
    observed, null = np.asarray(observed), np.asarray(null)
    return ((null >= observed).sum(0) + 1) / (len(null) + 1)


SHARE_FLOOR = 0.03  # of a share: what 100 cases without a single failure leave open at 95 % (the rule of three)
VALUE_FLOOR = 0.05  # of any other number, relative to its mean
RULE = (
    "lowest and highest value over the seeds, widened on both sides by the larger of the spread between the seeds and "
    "the half-width of the 95 % interval of any seed; of a number without an interval, by the spread or "
    f"{SHARE_FLOOR:g} of a share, {VALUE_FLOOR:.0%} of the mean of anything else; shares stay within 0 and 1; rounded "
    "outwards to two decimals (three digits)"
)


def half_width(value: float, low: float, high: float) -> float:
    """The longer side of an interval around a value."""
    return max(value - low, high - value, 0.0)


def suggested_range(values: Sequence[float], half_widths: Sequence[float], share: bool) -> tuple[float, float]:
    """The range by `RULE` of values, one a seed, from the half-widths of those that have an interval; `share` says
    whether the number is a share of cases.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a range needs finite values: {list(values)}")
    low, high = min(values), max(values)
    floor = SHARE_FLOOR if share else VALUE_FLOOR * abs(sum(values) / len(values))
    margin = max([*(half_widths or [floor]), high - low])
    if share:
        return _outwards(max(low - margin, 0.0), -1, 2), _outwards(min(high + margin, 1.0), 1, 2)
    size = max(abs(low - margin), abs(high + margin))
    decimals = 2 - math.floor(math.log10(size)) if size else 2
    return _outwards(low - margin, -1, decimals), _outwards(high + margin, 1, decimals)


def _outwards(value: float, sign: int, decimals: int) -> float:
    """Rounded up for sign 1, down for -1; what float arithmetic alone moved past a decimal does not count."""
    scaled = round(value * 10.0**decimals, 6)
    return round((math.ceil(scaled) if sign > 0 else math.floor(scaled)) / 10.0**decimals, max(decimals, 0))
