"""Influence, pruning and scores in sparse form, against the definitions written out on dense matrices."""

import itertools

import numpy as np
import pytest
from tests.random_graphs import random_graph

from vlmscope.attribution import influence as influence_module
from vlmscope.attribution import storage as shares
from vlmscope.attribution.influence import influence, logit_weights, prune, scores
from vlmscope.attribution.storage import smallest_set
from vlmscope.core.graph import AttributionGraph, NodeKind

GRAPHS = {
    "dense": {"n_layers": 4, "n_positions": 5, "n_features": 12},
    "thin": {"n_layers": 6, "n_positions": 4, "n_features": 9, "density": 0.15},
    "thinner": {"n_layers": 6, "n_positions": 4, "n_features": 9, "density": 0.05},
    "ties": {"n_layers": 3, "n_positions": 4, "n_features": 8, "grid": 4, "density": 0.5},
    "left out": {"n_layers": 4, "n_positions": 3, "n_features": 10, "left_out": True, "density": 0.4},
    "float64": {"n_layers": 3, "n_positions": 3, "n_features": 10, "dtype": "float64"},
}
CASES = list(itertools.product(GRAPHS, range(2)))


@pytest.fixture(params=CASES, ids=[f"{name} {seed}" for name, seed in CASES])
def graph(request: pytest.FixtureRequest) -> AttributionGraph:
    name, seed = request.param
    return random_graph(**GRAPHS[name], seed=seed)


@pytest.fixture(params=[1 << 17, 37], ids=["one block", "many blocks"], autouse=True)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence_module, "BLOCK", request.param)
    monkeypatch.setattr(shares, "_SORTED", request.param)


def dense_absolute(graph: AttributionGraph) -> np.ndarray:
    out = np.zeros((graph.n_nodes, graph.n_nodes))
    for target in range(graph.n_nodes):
        for edge in range(graph.indptr[target], graph.indptr[target + 1]):
            source = graph.indices[edge]
            size = abs(float(graph.weights[edge]))
            if graph.nodes.kind[source] == NodeKind.LEFT_OUT:
                size = graph.left_out_mass[target, graph.nodes.layer[source]]
            out[target, source] = size
    return out


def dense_normalised(matrix: np.ndarray) -> np.ndarray:
    sums = matrix.sum(1, keepdims=True)
    return matrix / np.where(sums > 0, sums, 1.0)


def dense_influence(matrix: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total, term = np.zeros(len(weights)), weights
    for _ in range(len(weights)):
        term = term @ matrix
        total = total + term
    return total


def fewest(values: np.ndarray, share: float) -> np.ndarray:
    order = np.argsort(-values, kind="stable")
    reached = np.cumsum(values[order])
    mask = np.zeros(len(values), dtype=bool)
    for place, number in enumerate(order):
        if values[number] > 0 and (share == 1.0 or place == 0 or reached[place - 1] < share * reached[-1]):
            mask[number] = True
    return mask


def dense_prune(graph: AttributionGraph, node_share: float, edge_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Kept nodes `[N]` and edges `[N, N]`, straight from the definition."""
    absolute, weights, kind = dense_absolute(graph), logit_weights(graph), graph.nodes.kind
    flow = dense_influence(dense_normalised(absolute), weights)
    nodes = fewest(flow, node_share) | (kind == NodeKind.TOKEN) | (kind == NodeKind.LOGIT)
    again = dense_normalised(absolute * nodes[:, None] * nodes[None, :])
    score = again * (dense_influence(again, weights) + weights)[:, None]
    edges = fewest(score.flatten(), edge_share).reshape(score.shape)
    while True:
        dead = np.zeros(graph.n_nodes, dtype=bool)
        for node in np.flatnonzero(nodes):
            if kind[node] not in (NodeKind.TOKEN, NodeKind.LOGIT) and not edges[:, node].any():
                dead[node] = True
            if kind[node] == NodeKind.FEATURE and not edges[node].any():
                dead[node] = True
        if not dead.any():
            return nodes, edges
        nodes = nodes & ~dead
        edges = edges & nodes[:, None] & nodes[None, :]


def test_influence_is_the_power_series(graph: AttributionGraph) -> None:
    expected = dense_influence(dense_normalised(dense_absolute(graph)), logit_weights(graph))
    found = influence(graph, logit_weights(graph))
    np.testing.assert_allclose(found.nodes, expected, rtol=1e-12, atol=1e-18)
    inside = np.random.default_rng(1).random(graph.n_nodes) < 0.6
    inside[graph.nodes.of(NodeKind.LOGIT)] = True
    cut = dense_normalised(dense_absolute(graph) * inside[:, None] * inside[None, :])
    expected = dense_influence(cut, logit_weights(graph))
    np.testing.assert_allclose(influence(graph, logit_weights(graph), inside).nodes, expected, rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.7), (1.0, 1.0), (0.95, 0.6), (0.02, 0.02)])
def test_pruning_keeps_what_the_definition_keeps(graph: AttributionGraph, thresholds: tuple[float, float]) -> None:
    nodes, edges = dense_prune(graph, *thresholds)
    pruned = prune(graph, *thresholds)
    np.testing.assert_array_equal(pruned.node_mask, nodes)
    np.testing.assert_array_equal(pruned.edge_mask, edges[graph.edge_targets(), graph.indices])


def test_dead_ends_of_both_kinds_are_met() -> None:
    """The reference must have something to drop, else the test above proves nothing about dropping."""
    nodes_dropped, edges_dropped = 0, 0
    for seed in range(4):
        graph = random_graph(**GRAPHS["thinner"], seed=seed)
        flow = dense_influence(dense_normalised(dense_absolute(graph)), logit_weights(graph))
        pruned = prune(graph, 0.8, 0.7)
        always = np.isin(graph.nodes.kind, (NodeKind.TOKEN, NodeKind.LOGIT))
        nodes_dropped += int((fewest(flow, 0.8) | always).sum()) - pruned.n_nodes
        edges_dropped += int(pruned.edge_mask.sum() < pruned.graph.n_edges)
    assert nodes_dropped > 0
    assert edges_dropped > 0


def test_scores_follow_their_definition(graph: AttributionGraph) -> None:
    kind, weights = graph.nodes.kind, logit_weights(graph)
    normalised = dense_normalised(dense_absolute(graph))
    flow = dense_influence(normalised, weights)
    unexplained = (kind == NodeKind.ERROR) | (kind == NodeKind.LEFT_OUT)
    tokens = flow[kind == NodeKind.TOKEN].sum()
    output = flow + weights
    completeness = ((1 - normalised[:, unexplained].sum(1)) * output).sum() / output.sum()
    found = scores(graph)
    assert found.completeness == pytest.approx(completeness, rel=1e-12)
    assert found.replacement == pytest.approx(tokens / (tokens + flow[unexplained].sum()), rel=1e-12)
    assert found.token_share + found.error_share + found.bias_share + found.left_out_share == pytest.approx(1.0)


def cut_at(values: np.ndarray, share: float) -> float:
    """The value down to which the largest values are kept, by circuit-tracer's rule."""
    ordered = np.sort(values)[::-1]
    place = np.searchsorted(np.cumsum(ordered) / ordered.sum(), share)
    return ordered[min(place, len(ordered) - 1)]


def circuit_tracer(
    graph: AttributionGraph, node_share: float, edge_share: float
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Kept nodes `[N]`, kept edges `[N, N]`, replacement and completeness, by circuit-tracer's formulas.

    It has no bias nodes, so their columns are left out before rows are normalised. After `prune_graph` and
    `compute_graph_scores` of circuit-tracer 0.5.0, which on Orrery's graphs give the same nodes and scores.
    """
    kind, weights = graph.nodes.kind, logit_weights(graph)
    is_error, is_token = kind == NodeKind.ERROR, kind == NodeKind.TOKEN
    adjacency = dense_absolute(graph)
    adjacency[:, kind == NodeKind.BIAS] = 0.0
    normalised = dense_normalised(adjacency)
    flow = dense_influence(normalised, weights)
    replacement = flow[is_token].sum() / (flow[is_token].sum() + flow[is_error].sum())
    output = flow + weights
    completeness = ((1 - normalised[:, is_error].sum(1)) * output).sum() / output.sum()

    always = is_token | (kind == NodeKind.LOGIT)
    nodes = (flow >= cut_at(flow, node_share)) | always
    cut = dense_normalised(adjacency * nodes[:, None] * nodes[None, :])
    score = cut * (dense_influence(cut, weights) + weights)[:, None]
    edges = score >= cut_at(score.flatten(), edge_share)
    while True:
        before = nodes.copy()
        nodes = nodes & (edges.any(0) | always) & (edges.any(1) | (kind != NodeKind.FEATURE))
        edges = edges & nodes[:, None] & nodes[None, :]
        if (nodes == before).all():
            return nodes, edges, replacement, completeness


@pytest.mark.parametrize("thresholds", [(0.8, 0.98), (0.5, 0.7)])
@pytest.mark.parametrize("name", ["dense", "thin", "thinner", "float64"])
def test_folded_biases_give_circuit_tracers_graph_and_scores(name: str, thresholds: tuple[float, float]) -> None:
    graph = random_graph(**GRAPHS[name], seed=3)
    nodes, edges, replacement, completeness = circuit_tracer(graph, *thresholds)
    folded, pruned = prune(graph, *thresholds, bias="fold"), prune(graph, *thresholds)
    np.testing.assert_array_equal(folded.node_mask, nodes)
    np.testing.assert_array_equal(folded.edge_mask, edges[graph.edge_targets(), graph.indices])
    for found in (folded.scores, pruned.scores):  # whatever the convention of the pruning
        assert found.replacement_no_bias == pytest.approx(replacement, rel=1e-12)
        assert found.completeness_no_bias == pytest.approx(completeness, rel=1e-12)
    assert folded.scores.replacement == folded.scores.replacement_no_bias and folded.scores.bias_share == 0
    assert folded.scores.completeness == folded.scores.completeness_no_bias
    assert pruned.scores.bias_share > 0 and pruned.scores.completeness != pytest.approx(completeness)
    assert not folded.node_mask[graph.nodes.of(NodeKind.BIAS)].any()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.8, 0.98, 1.0])
def test_the_smallest_set_needs_no_sort(seed: int, share: float) -> None:
    """Values of very different size, then many equal ones: exact in any order of addition."""
    rng = np.random.default_rng(seed)
    spread = np.ldexp(rng.integers(0, 4, 3000).astype(np.float64), rng.integers(-12, 12, 3000))
    for values in (spread, rng.integers(0, 3, 2000) / 8.0, np.full(1000, 0.125), np.zeros(50), np.zeros(0)):
        np.testing.assert_array_equal(smallest_set(values, share), fewest(values, share))


def test_a_source_above_its_target_is_no_graph() -> None:
    graph = random_graph(2, 2, 3)
    graph.indices[graph.indptr[-1] - 1] = graph.n_nodes - 1
    with pytest.raises(AssertionError, match="does not come before it"):
        influence(graph, logit_weights(graph))
