"""Louvain finds planted groups; phi against its definition on dense tables, whatever the blocks."""

import numpy as np
import pytest
from scipy import sparse

from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import coactive, louvain, phi


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


N, F = 300, 23


@pytest.fixture
def table() -> np.ndarray:
    rng = generator(0, "coactive")
    found = rng.random((N, F)) < rng.uniform(0.02, 0.5, F)
    found[:, 1] = found[:, 0] ^ (rng.random(N) < 0.05)  # nearly always together
    found[:, 5] = False
    found[:, 6] = True
    return found


def test_phi_is_the_correlation_of_the_two_series(table: np.ndarray) -> None:
    counts = table.sum(0)
    together = table.T.astype(int) @ table.astype(int)
    found = phi(together, counts[:, None], counts, N)
    plain = [f for f in range(F) if 0 < counts[f] < N]
    np.testing.assert_allclose(found[np.ix_(plain, plain)], np.corrcoef(table[:, plain].T), atol=1e-12)
    assert (found[5] == 0).all() and (found[:, 6] == 0).all()


@pytest.mark.parametrize("block", [1, 7, 256])
def test_nearest_are_those_of_the_whole_table(table: np.ndarray, block: int) -> None:
    found = coactive(sparse.csr_array(table), neighbours=4, least=8, block=block)
    counts = table.sum(0)
    together = table.T.astype(int) @ table.astype(int)
    whole = phi(together, counts[:, None], counts, N)
    whole[:, counts < 8] = whole[counts < 8] = 0
    np.fill_diagonal(whole, 0)
    for feature in range(F):
        wanted = [g for g in np.argsort(-whole[feature], kind="stable")[:4] if whole[feature, g] > 0]
        kept = found.index[feature] >= 0
        np.testing.assert_allclose(found.score[feature][kept], whole[feature, wanted], atol=1e-6)
    assert found.index[0, 0] == 1 and found.index[1, 0] == 0
    assert (found.index[5] == -1).all()
