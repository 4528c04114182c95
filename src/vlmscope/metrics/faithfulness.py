"""Faithfulness of circuits over their size, and its areas CPR and CMD (MIB, arXiv 2504.13151). Pure functions.

With m the mean logit difference over pairs,

    f(k) = (m(circuit of share k) - m(corrupt)) / (m(clean) - m(corrupt))
    CPR = integral of f(k) dk,   CMD = integral of |1 - f(k)| dk

*Integration rule*, that of MIB's published evaluation: the trapezoid rule over the shares 0.001, 0.002, 0.005, 0.01,
0.02, 0.05, 0.1, 0.2, 0.5 and 1 on a linear axis, without the part below 0.001. So CPR is 0.999 and CMD 0 for a circuit
method that is faithful at every size; f may leave [0, 1]. A circuit of share k of N things has floor(k N) of them.

Legend: K sizes, B pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.seeds import generator
from vlmscope.metrics.causal import RESAMPLES

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve:
    """f over size, with 95 % intervals of a bootstrap over pairs.

    Attributes:
        shares: K shares of all things that a circuit may have.
        counts: K numbers of things.
        rates: f at each size.
        cpr: area under f.
        cmd: area between f and 1.
    """

    shares: tuple[float, ...]
    counts: tuple[int, ...]
    rates: tuple[Rate, ...]
    cpr: Rate
    cmd: Rate


def faithfulness(circuit: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int = 0) -> Rate:
    """f of one circuit from logit differences [B]: a ratio of means over pairs, with its bootstrap 95 % interval.

    Raises:
        ValueError: no pairs, or clean and corrupt runs do not differ on average.
    """
    return _rates(np.asarray(circuit)[None], clean, corrupt, seed)[0]


def faithfulness_curve(
    circuits: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, counts: tuple[int, ...], seed: int = 0
) -> FaithfulnessCurve:
    """The curve of circuits at `SHARES` from their logit differences.

    Args:
        circuits: [K, B], K = len(SHARES).
        clean: [B].
        corrupt: [B].
        counts: K sizes.
        seed: of the bootstrap; the same pairs are drawn for every size.

    Raises:
        ValueError: as `faithfulness`, or not a row for each share.
    """
    if len(circuits) != len(SHARES):
        raise ValueError(f"{len(circuits)} sizes, but MIB's areas take {len(SHARES)}: {SHARES}")
    rates = _rates(circuits, clean, corrupt, seed)
    drawn = _resampled(circuits, clean, corrupt, seed)
    values = np.array([rate.value for rate in rates])
    areas = []
    for curve, resampled in ((values, drawn), (np.abs(1 - values), np.abs(1 - drawn))):
        low, high = np.quantile(area(resampled), (0.025, 0.975))
        areas.append(Rate(float(area(curve)), float(low), float(high), len(clean)))
    return FaithfulnessCurve(SHARES, tuple(counts), rates, *areas)


def cpr(values: np.ndarray) -> float:
    """Circuit performance ratio: area under f [K] at `SHARES`."""
    return float(area(values))


def cmd(values: np.ndarray) -> float:
    """Circuit-model distance: area of |1 - f| for f [K] at `SHARES`."""
    return float(area(np.abs(1 - np.asarray(values))))


def area(values: np.ndarray) -> np.ndarray:
    """Trapezoid rule over `SHARES` of values [.., K], on a linear axis."""
    values, x = np.asarray(values, float), np.asarray(SHARES)
    return ((values[..., 1:] + values[..., :-1]) / 2 * np.diff(x)).sum(-1)


def sizes(total: int, shares: tuple[float, ...] = SHARES) -> tuple[int, ...]:
    """floor(share x total) of things for each share."""
    return tuple(int(share * total + 1e-9) for share in shares)


def _rates(circuits: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int) -> tuple[Rate, ...]:
    circuits, clean, corrupt = (np.asarray(x, float) for x in (circuits, clean, corrupt))
    if not clean.size:
        raise ValueError("faithfulness needs at least one pair")
    whole = clean.mean() - corrupt.mean()
    if not abs(whole) > 0:
        raise ValueError("clean and corrupt runs have the same mean logit difference: there is nothing to recover")
    values = (circuits.mean(-1) - corrupt.mean()) / whole
    low, high = np.quantile(_resampled(circuits, clean, corrupt, seed), (0.025, 0.975), axis=0)
    return tuple(
        Rate(float(value), float(one), float(other), clean.size)
        for value, one, other in zip(values, low, high, strict=True)
    )


def _resampled(circuits: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int) -> np.ndarray:
    """f [RESAMPLES, K] under bootstrap resamples of the pairs."""
    rng = generator(seed, "faithfulness")
    # How often each pair is drawn: the resampled means are products with these counts.
    weights = rng.multinomial(clean.size, np.full(clean.size, 1 / clean.size), RESAMPLES) / clean.size
    low = weights @ corrupt
    return (weights @ np.asarray(circuits, float).T - low[:, None]) / (weights @ clean - low)[:, None]
