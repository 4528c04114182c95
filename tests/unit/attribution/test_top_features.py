"""The features that matter most to the most probable answer: sums over positions of exact influence."""

import numpy as np
import pytest
import torch

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import top_features
from vlmscope.attribution.trace import trace
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    vlm = tiny_gemma3(2)
    transcoders = random_set(4, vlm.adapter.d_model, 30, 4, False, 1, torch.float32, "random")
    return trace(Scope(vlm, transcoders), vlm.prepare("what is this ?", [tiny_image(0)]), AttributionConfig()).graph


def by_paths(graph: AttributionGraph) -> dict[FeatureId, float]:
    """Influence on the most probable logit by a dense power series."""
    matrix = np.zeros((graph.n_nodes, graph.n_nodes))
    matrix[graph.edge_targets(), graph.indices] = np.abs(graph.weights)
    matrix /= np.where(matrix.sum(1, keepdims=True) > 0, matrix.sum(1, keepdims=True), 1.0)
    row = np.zeros(graph.n_nodes)
    row[graph.nodes.of(NodeKind.LOGIT)[0]] = 1.0
    total = np.zeros(graph.n_nodes)
    for _ in range(graph.n_layers + 2):
        row = row @ matrix
        total += row
    sums: dict[FeatureId, float] = {}
    for node in graph.nodes.of(NodeKind.FEATURE).tolist():
        feature = graph.nodes.feature_id(node)
        sums[feature] = sums.get(feature, 0.0) + total[node]
    return sums


def test_they_are_the_strongest_in_order(graph: AttributionGraph) -> None:
    assert graph.logit_probabilities.argmax() == 0
    expected = by_paths(graph)
    found = top_features(graph, 8)
    assert len(found) == 8
    for feature, value in found.items():
        assert value == pytest.approx(expected[feature], rel=1e-5)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert min(found.values()) >= sorted(expected.values(), reverse=True)[7] * (1 - 1e-5)
    everything = top_features(graph, 10**6)
    assert list(everything)[:8] == list(found)
    assert set(everything) == {feature for feature, value in expected.items() if value > 0}
