"""Clusters of a weighted graph by modularity: Louvain's method (Blondel et al. 2008), in a fixed order of nodes.

Each node in turn goes to the neighbouring cluster where modularity gains most, until none moves; then clusters become
the nodes of a smaller graph, and so on. The order is drawn from a seed, so the result is the same every time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from vlmscope.core.seeds import generator

_ROUNDS = 50  # passes over all nodes before a level is left; it settles in a few


def modularity(graph: Any, clusters: np.ndarray, resolution: float = 1.0) -> float:
    """Modularity of a division of the nodes [N] of a symmetric graph [N, N] of weights >= 0; 0 without an edge."""
    table: Any = sparse.coo_array(graph, dtype=np.float64)
    total = table.data.sum()
    if total == 0:
        return 0.0
    degree = np.bincount(table.row, weights=table.data, minlength=table.shape[0])
    inside = table.data[clusters[table.row] == clusters[table.col]].sum()
    by_cluster = np.bincount(clusters, weights=degree)
    return float(inside / total - resolution * np.square(by_cluster / total).sum())


def louvain(graph: Any, seed: int = 0, resolution: float = 1.0) -> np.ndarray:
    """Divide the nodes of a graph.

    Args:
        graph: [N, N] symmetric, sparse, weights >= 0.
        seed: of the order in which nodes are looked at.
        resolution: above 1 for more and smaller clusters.

    Returns:
        [N] int64, the largest cluster 0, the next 1 and so on; of equal ones that of the earliest node first. A node
        without an edge is a cluster of its own.

    Raises:
        ValueError: the graph is not symmetric, or has a negative weight.
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
