"""What the viewers rely on in `graph.json`: ids, Cantor numbers, cumulative influence, labels."""

import dataclasses
import math
import re

import numpy as np
import pytest

from vlmscope.attribution.edges import smallest_set
from vlmscope.attribution.export import cantor_pair, graph_to_json, node_id
from vlmscope.attribution.influence import prune
from vlmscope.attribution.random_graph import random_graph
from vlmscope.core.graph import NodeKind, PrunedGraph


def whole(node_threshold: float = 0.8) -> PrunedGraph:
    """Layers, positions and feature indices overlap: the ids `0_<layer>_<position>` of others would collide."""
    graph = random_graph(4, 4, 12, left_out=True, seed=2)
    index = graph.nodes.index.copy()
    for layer in range(4):
        here = (graph.nodes.kind == NodeKind.FEATURE) & (graph.nodes.layer == layer)
        index[here] = np.arange(here.sum()) % 4
        for position in range(4):
            cell = here & (graph.nodes.position == position)
            index[cell] = np.arange(cell.sum())
    index[graph.nodes.of(NodeKind.TOKEN)] = [0, 1, 1, 3]
    index[graph.nodes.of(NodeKind.LOGIT)] = [0, 1, 2]
    nodes = dataclasses.replace(graph.nodes, index=index)
    graph = dataclasses.replace(graph, nodes=nodes, meta={**graph.meta, "max_nodes": 10})
    return prune(graph, node_threshold)


def test_no_two_nodes_have_one_id() -> None:
    graph = whole().graph
    ids = [node_id(graph, node) for node in range(graph.n_nodes)]
    assert len(set(ids)) == graph.n_nodes
    features = {node_id(graph, int(node)) for node in graph.nodes.of(NodeKind.FEATURE)}
    errors = [node_id(graph, int(node)) for node in graph.nodes.of(NodeKind.ERROR)]
    # circuit-tracer's id of the error at layer l and position p is that of feature l of layer 0 there.
    assert any(f"0_{error.split('_')[1]}_{error.split('_')[2]}" in features for error in errors)
    assert all(not error[0].isdigit() for error in errors)


def test_a_features_number_gives_layer_and_index_back_and_is_exact_in_a_browser() -> None:
    seen = set()
    for layer in (0, 1, 25, 61):
        for index in (0, 1, 7, 16383, 262143, 4_194_303):
            number = cantor_pair(layer, index)
            diagonal = (math.isqrt(8 * number + 1) - 1) // 2
            found = number - diagonal * (diagonal + 1) // 2
            assert (diagonal - found, found) == (layer, index)
            assert number < 2**53
            seen.add(number)
    assert len(seen) == 24


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_the_viewers_slider_keeps_the_nodes_that_pruning_keeps(threshold: float) -> None:
    pruned = whole(1.0)
    body = graph_to_json(pruned, "s", "m")
    by_id = {node["node_id"]: node["influence"] for node in body["nodes"] if node["feature_type"] != "logit"}
    wanted = smallest_set(pruned.influence, threshold) & pruned.node_mask
    names = {node_id(pruned.graph, int(node)) for node in np.flatnonzero(wanted)}
    below = {name for name, value in by_id.items() if value <= threshold}
    # The set reaches the share with the first node that passes it, the slider stops just before.
    assert below <= names and len(names - below) <= 1
    assert max(by_id.values()) <= 1.0


def test_labels_of_logits_hold_the_probability_that_viewers_read() -> None:
    pruned = whole()
    logits = [node for node in graph_to_json(pruned, "s", "m")["nodes"] if node["feature_type"] == "logit"]
    assert len(logits) == 3
    for node, probability in zip(logits, pruned.graph.logit_probabilities, strict=True):
        found = re.search(r"\(p=([\d.]+)\)", node["clerp"])
        assert found is not None
        assert float(found[1]) == pytest.approx(probability, abs=5e-4)
        assert node["layer"] == "5"
    assert [node["is_target_logit"] for node in logits] == [True, False, False]
