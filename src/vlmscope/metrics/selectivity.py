"""Which features prefer one concept to the others, and how many would if concepts were shuffled.

A feature is selective for a concept when it fires on at least a share of the concept's cases and its mean there is at
least `ratio` times its mean over the cases of all other concepts (a case counts with 0 where the feature is silent).

Legend: N cases, C concepts, M features (or features at places).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from vlmscope.core.seeds import generator
from vlmscope.metrics.permutation import permutation_p

_EXACT = 8  # concepts up to which all orders of their names are gone through
_DRAWS = 10_000  # orders that are drawn when there are more


@dataclass(frozen=True)
class Rule:
    """When a feature is selective: `ratio` > 1 and `fires`, a share of the concept's cases."""

    ratio: float = 2.0
    fires: float = 0.5


@dataclass(frozen=True)
class Contrast:
    """Each feature on each concept, [C, M] float64: mean, mean over all other concepts, share of cases that fire."""

    mean: np.ndarray
    rest: np.ndarray
    rate: np.ndarray

    def selective(self, rule: Rule) -> np.ndarray:
        """[C, M] bool."""
        return (self.rate >= rule.fires) & (self.mean > 0) & (self.mean >= rule.ratio * self.rest)


def contrast(values: np.ndarray, labels: np.ndarray, n_concepts: int) -> Contrast:
    """Compare concepts.

    Args:
        values: [N, M] activations >= 0.
        labels: [N] concept of each case, 0 .. C - 1; every concept has a case.
        n_concepts: C, at least two.
    """
    member = (labels == np.arange(n_concepts)[:, None]).astype(np.float32)
    counts = member.sum(1, keepdims=True)
    sums = (member @ values).astype(np.float64)
    rate = (member @ (values > 0).astype(np.float32)) / counts
    rest = (sums.sum(0) - sums) / (len(labels) - counts)
    return Contrast(sums / counts, rest, rate.astype(np.float64))


def shuffled(values: np.ndarray, labels: np.ndarray, n_concepts: int, count: int, seed: int) -> Iterator[Contrast]:
    """The contrast under `count` random orders of the labels, as if each case showed another's concept."""
    rng = generator(seed, "shuffled labels")
    for _ in range(count):
        yield contrast(values, rng.permutation(labels), n_concepts)


def contrast_p(observed: Contrast, null: Iterator[Contrast]) -> np.ndarray:
    """[C, M], one-sided p-value of each difference of mean and rest under shuffled labels."""
    gap = observed.mean - observed.rest
    draws, larger = 0, np.zeros(gap.shape)
    for one in null:
        draws += 1
        # A sum in another order must not turn an equal difference into a smaller one.
        larger += one.mean - one.rest >= gap - 1e-6 * np.abs(gap)
    return (larger + 1) / (draws + 1)


def matching_p(table: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Whether a table of coincidences [C, C] of the same concepts is heavier on its diagonal than under other names.

    Columns are put in every other order (a random 10,000 of them above eight concepts): the number that each row and
    each column adds up to stays, only who belongs to whom is lost.

    Returns:
        The mean of the diagonal's sum over orders, and the one-sided p-value of that which was seen.
    """
    count = len(table)
    rows = np.arange(count)
    if count <= _EXACT:
        orders = np.array(list(permutations(range(count))))
        sums = table[rows, orders].sum(1)
        return float(sums.mean()), float((sums >= table.trace()).mean())
    rng = generator(seed, "matching")
    sums = np.array([table[rows, rng.permutation(count)].sum() for _ in range(_DRAWS)])
    return float(sums.mean()), float(permutation_p(np.asarray(table.trace()), sums))
