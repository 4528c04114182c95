"""Which features fire together, from one sparse table of who fires where, and clusters of them.

For features f and g that fire in n_f and n_g of N cases and together in n_fg, phi is the correlation of the two yes/no
series:

    phi = (N n_fg - n_f n_g) / sqrt(n_f (N - n_f) n_g (N - n_g))

Only a block of features against all is ever dense, and of it only each feature's nearest are kept: memory is
O(entries + F neighbours + block F), whatever the number of cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from vlmscope.core.records import generator

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


def coactive(active: Any, neighbours: int = 10, least: int = 5, block: int = BLOCK) -> Neighbours:
    """The `neighbours` features with the largest phi beside each feature, from `active` [N, F] sparse, non-zero where a
    feature fires. A feature that fires in fewer than `least` cases has none and is none.
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
        neighbours: kept for each; fewer where a feature has fewer partners with a score above 0.
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


_ROUNDS = 50  # passes over all nodes before a level is left; it settles in a few


def louvain(graph: Any, seed: int = 0, resolution: float = 1.0) -> np.ndarray:
    """Clusters [N] of a graph [N, N] (sparse, symmetric, weights >= 0) by modularity (Louvain: Blondel et al. 2008).

    Each node in turn goes to the neighbouring cluster where modularity gains most, until none moves; then clusters
    become the nodes of a smaller graph, and so on. The order is drawn from `seed`. Above 1, `resolution` gives more and
    smaller clusters. The largest is 0, the next 1 and so on; of equal ones that of the earliest node first. A node
    without an edge is a cluster of its own.
    """
    table: Any = sparse.csr_array(graph, dtype=np.float64)
    if table.nnz and (table.data.min() < 0 or abs(table - table.T).max() > 1e-9 * abs(table).max()):
        raise ValueError("the graph must be symmetric, with weights of 0 or more")
    clusters = np.arange(table.shape[0])
    level = 0
    while True:
        found = _move(table, generator(seed, "louvain", level).permutation(table.shape[0]), resolution)
        _, found = np.unique(found, return_inverse=True)
        clusters = found[clusters]
        count = int(found.max()) + 1 if len(found) else 0
        if count == table.shape[0]:
            return _by_size(clusters)
        member = sparse.csr_array((np.ones(len(found)), (np.arange(len(found)), found)), shape=(len(found), count))
        table = (member.T @ table @ member).tocsr()
        level += 1


def _move(table: Any, order: np.ndarray, resolution: float) -> np.ndarray:
    """One level: [n] the cluster of each node, numbered as nodes."""
    n = table.shape[0]
    degree = np.asarray(table.sum(1)).ravel().tolist()
    total = sum(degree)
    cluster, weight = list(range(n)), list(degree)
    if not total:
        return np.array(cluster)
    starts, columns, values = table.indptr.tolist(), table.indices.tolist(), table.data.tolist()
    for _ in range(_ROUNDS):
        moved = False
        for node in order.tolist():
            home = cluster[node]
            links: dict[int, float] = {home: 0.0}
            for entry in range(starts[node], starts[node + 1]):
                if columns[entry] != node:
                    other = cluster[columns[entry]]
                    links[other] = links.get(other, 0.0) + values[entry]
            weight[home] -= degree[node]
            pull = resolution * degree[node] / total
            best, most = home, links[home] - pull * weight[home]
            for other, link in links.items():
                gain = link - pull * weight[other]
                if gain > most + 1e-12 * total:
                    best, most = other, gain
            weight[best] += degree[node]
            cluster[node] = best
            moved |= best != home
        if not moved:
            break
    return np.array(cluster)


def _by_size(clusters: np.ndarray) -> np.ndarray:
    sizes = np.bincount(clusters)
    first = np.full(len(sizes), len(clusters))
    np.minimum.at(first, clusters, np.arange(len(clusters)))
    rank = np.empty(len(sizes), np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[clusters]
