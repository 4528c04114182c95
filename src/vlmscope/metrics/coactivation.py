"""Which features fire together, from one sparse table of who fires where.

For features f and g that fire in n_f and n_g of N cases and together in n_fg, phi is the correlation of the two
yes/no series and NPMI (Bouma 2009) the pointwise mutual information over its largest value:

    phi  = (N n_fg - n_f n_g) / sqrt(n_f (N - n_f) n_g (N - n_g))
    npmi = log(N n_fg / (n_f n_g)) / -log(n_fg / N)

Only a block of features against all is ever dense, and of it only each feature's nearest are kept: memory is
O(entries + F neighbours + block F), whatever the number of cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

BLOCK = 256  # features against all at a time


@dataclass(frozen=True)
class Neighbours:
    """For every feature those that are nearest, strongest first.

    Attributes:
        index: [F, m] int64, -1 where there are fewer.
        score: [F, m] float64, 0 there.
        together: [F, m] int64, cases in which both fire; 0 where that was not counted.
    """

    index: np.ndarray
    score: np.ndarray
    together: np.ndarray

    def graph(self, least: float) -> sparse.csr_array:
        """[F, F], the score of each pair at or above `least` of which one names the other, symmetric, no diagonal."""
        rows, columns = np.nonzero((self.index >= 0) & (self.score >= least))
        shape = (len(self.index), len(self.index))
        one_way: Any = sparse.csr_array((self.score[rows, columns], (rows, self.index[rows, columns])), shape=shape)
        return one_way.maximum(one_way.T).tocsr()


def phi(together: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> np.ndarray:
    """Phi of pairs, from counts that broadcast; 0 where one of the two always or never fires."""
    together, first, second = (np.asarray(count, np.float64) for count in (together, first, second))
    spread = np.sqrt(first * (n - first) * second * (n - second))
    shape = np.broadcast_shapes(together.shape, spread.shape)
    return np.divide(n * together - first * second, spread, out=np.zeros(shape), where=spread > 0)


def npmi(together: np.ndarray, first: np.ndarray, second: np.ndarray, n: int) -> np.ndarray:
    """NPMI of pairs, in [-1, 1]; -1 where they never meet, 1 where neither fires without the other."""
    together, first, second = (np.asarray(count, np.float64) for count in (together, first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log(n * together / (first * second)) / -np.log(together / n)
    found = np.where(together >= n, 1.0, found)  # both always fire: 0 / 0
    return np.where(together > 0, found, -1.0)


def coactive(active: Any, neighbours: int = 10, least: int = 5, block: int = BLOCK) -> Neighbours:
    """The features with the largest phi beside each feature.

    Args:
        active: [N, F] sparse, non-zero where a feature fires.
        neighbours: m, kept for each.
        least: cases in which a feature must fire to have neighbours and to be one.
        block: features that are compared with all at a time.
    """
    table: Any = sparse.csc_array(active, dtype=np.float32)
    table.eliminate_zeros()
    table.data[:] = 1.0
    n, count = table.shape
    fired = np.diff(table.indptr)
    transposed = table.T.tocsr()

    def scores(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        together = (transposed[features] @ table).toarray()
        return phi(together, fired[features, None], fired, n), together

    return nearest_of(scores, count, neighbours, fired >= least, block)


def nearest_of(
    scores: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    count: int,
    neighbours: int,
    eligible: np.ndarray,
    block: int = BLOCK,
) -> Neighbours:
    """Each feature's best partners, block by block.

    Args:
        scores: features [b] -> their scores and counts against all, [b, F] each.
        count: F.
        neighbours: m; fewer where a feature has fewer partners with a score above 0.
        eligible: [F] bool, those that have partners and are some.
        block: b.
    """
    width = min(neighbours, max(count - 1, 0))
    index = np.full((count, width), -1)
    score, shared = np.zeros((count, width)), np.zeros((count, width), np.int64)
    chosen = np.flatnonzero(eligible)
    for start in range(0, len(chosen) if width else 0, block):
        features = chosen[start : start + block]
        found, together = scores(features)
        found = np.where(eligible[None], found, 0.0)
        found[np.arange(len(features)), features] = 0.0
        near = np.argpartition(-found, width - 1, axis=1)[:, :width]
        near = np.take_along_axis(near, np.argsort(-np.take_along_axis(found, near, 1), axis=1, kind="stable"), 1)
        best = np.take_along_axis(found, near, 1)
        there = best > 0
        index[features] = np.where(there, near, -1)
        score[features] = np.where(there, best, 0.0)
        shared[features] = np.where(there, np.take_along_axis(together, near, 1), 0)
    return Neighbours(index, score, shared)
