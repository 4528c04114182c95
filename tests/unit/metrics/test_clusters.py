"""Louvain finds planted groups, and its numbers are modularity's."""

import numpy as np
import pytest
from scipy import sparse

from vlmscope.core.records import generator
from vlmscope.metrics.clusters import louvain


def planted(sizes: tuple[int, ...], inside: float, between: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng, truth = generator(seed, "planted"), np.repeat(np.arange(len(sizes)), sizes)
    upper = np.triu(rng.random((len(truth), len(truth))) < np.where(truth[:, None] == truth, inside, between), 1)
    order = rng.permutation(len(truth))
    graph = (upper + upper.T).astype(float)
    return graph[np.ix_(order, order)], truth[order]


def test_planted_groups_are_found() -> None:
    graph, truth = planted((30, 20, 12), 0.6, 0.02)
    found = louvain(sparse.csr_array(graph))
    assert found.max() == 2
    assert [np.unique(found[truth == group]).tolist() for group in range(3)] == [[0], [1], [2]]  # by size
    assert np.array_equal(found, louvain(sparse.csr_array(graph)))


def modularity(graph: sparse.csr_array, clusters: np.ndarray) -> float:
    """By its definition."""
    dense = graph.toarray()
    degree, total = dense.sum(1), dense.sum()
    return ((dense - np.outer(degree, degree) / total) * (clusters[:, None] == clusters)).sum() / total


def test_no_single_move_makes_it_better() -> None:
    rng = generator(3, "louvain")
    upper = np.triu(rng.random((25, 25)) * (rng.random((25, 25)) < 0.3), 1)
    graph = sparse.csr_array(upper + upper.T)
    found = louvain(graph)
    best = modularity(graph, found)
    assert best > modularity(graph, np.zeros(25, np.int64)) + 0.1
    better = 0
    for node in range(25):
        for cluster in range(int(found.max()) + 1):
            moved = found.copy()
            moved[node] = cluster
            better += modularity(graph, moved) > best + 0.02
    assert better == 0


def test_lonely_nodes_stay_alone_and_a_higher_resolution_divides_more() -> None:
    graph, _ = planted((20, 20), 0.5, 0.1)
    with_lonely = np.zeros((43, 43))
    with_lonely[:40, :40] = graph
    found = louvain(with_lonely)
    assert len(set(found[40:])) == 3 and not set(found[40:]) & set(found[:40])
    assert louvain(graph, resolution=4.0).max() > louvain(graph, resolution=0.5).max()
    assert louvain(np.zeros((0, 0))).tolist() == []


def test_other_graphs_are_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        louvain(np.array([[0.0, 1.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="weights"):
        louvain(np.array([[0.0, -1.0], [-1.0, 0.0]]))
