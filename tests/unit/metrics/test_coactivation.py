"""Phi against its definition on dense tables, whatever the blocks."""

import numpy as np
import pytest
from scipy import sparse

from vlmscope.core.records import generator
from vlmscope.metrics.clusters import coactive, phi

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
        assert found.together[feature][kept].tolist() == together[feature, found.index[feature][kept]].tolist()
    assert found.index[0, 0] == 1 and found.index[1, 0] == 0
    assert (found.index[5] == -1).all()


def test_the_graph_has_each_pair_both_ways_above_the_threshold(table: np.ndarray) -> None:
    found = coactive(sparse.csr_array(table), neighbours=3)
    graph = found.graph(0.5).toarray()
    np.testing.assert_array_equal(graph, graph.T)
    assert (graph.diagonal() == 0).all()
    assert set(zip(*np.nonzero(graph), strict=True)) == {(0, 1), (1, 0)}


def test_values_count_as_firing_whatever_their_size_and_stored_zeros_do_not(table: np.ndarray) -> None:
    rng = generator(1, "coactive")
    values = sparse.csr_array(table * rng.uniform(0.1, 9.0, (N, F)))
    values.data[values.indices == 2] = 0.0  # stored, yet not active
    found = coactive(values, neighbours=3)
    table[:, 2] = False
    np.testing.assert_array_equal(found.index, coactive(sparse.csr_array(table), neighbours=3).index)
