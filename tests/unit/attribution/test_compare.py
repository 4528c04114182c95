"""Comparisons against sums made edge by edge; what viewers rely on."""

import dataclasses
from collections import defaultdict
from collections.abc import Hashable

import numpy as np
import pytest
from tests.random_graphs import random_graph

from vlmscope.attribution.compare import compare
from vlmscope.attribution.export import graph_to_json, node_id
from vlmscope.attribution.influence import edge_strengths, influence, logit_weights, prune
from vlmscope.attribution.storage import smallest_set
from vlmscope.core.graph import NodeKind, PrunedGraph
from vlmscope.core.records import PatchBox


def traced(seed: int, tokens: int = 6, pictures: int = 2, density: float = 0.7) -> PrunedGraph:
    """A random graph whose features come from few indices, so that graphs share some; soft tokens at 1, 2, ..."""
    graph = random_graph(4, tokens, 18, density=density, left_out=True, seed=seed)
    rng = np.random.default_rng(seed)
    index = graph.nodes.index.copy()
    for layer in range(4):
        for position in range(tokens):
            here = (graph.nodes.kind == NodeKind.FEATURE) & (graph.nodes.layer == layer)
            here &= graph.nodes.position == position
            index[here] = np.sort(rng.choice(5, here.sum(), replace=False))
    index[graph.nodes.of(NodeKind.TOKEN)] = rng.integers(0, 3, tokens)
    index[graph.nodes.of(NodeKind.LOGIT)] = [7, 8, 9 + seed]
    activation = rng.random(len(index)).astype(np.float32)
    is_image = np.array([1 <= at <= pictures for at in range(tokens)])
    boxes = [PatchBox(0.0, at / 4, 1.0, (at + 1) / 4) if is_image[at] else None for at in range(tokens)]
    roles = ["special", *["image"] * pictures, *["question"] * (tokens - pictures - 2), "last"]
    graph = dataclasses.replace(
        graph,
        nodes=dataclasses.replace(graph.nodes, index=index, activation=activation),
        is_image=is_image,
        image_index=np.where(is_image, 0, -1),
        patch_boxes=boxes,
        roles=np.array(roles),
        logit_tokens=["mars", "earth", f"other {seed}"],
        prompt=f"prompt {seed}",
        meta={**graph.meta, "model": "random", "max_nodes": 100},
    )
    return prune(graph, 0.7, 0.9)


def own_key(pruned: PrunedGraph, node: int, match: str) -> Hashable:
    graph, table = pruned.graph, pruned.graph.nodes
    at, index, layer = int(table.position[node]), int(table.index[node]), int(table.layer[node])
    where = {"position": at, "from_end": at - len(graph.tokens), "role": graph.roles[at], "feature": "any"}[match]
    match kind := NodeKind(int(table.kind[node])):
        case NodeKind.TOKEN:
            box = graph.patch_boxes[at]
            return (kind, index, where) if box is None else (kind, "soft", int(graph.image_index[at]), tuple(box))
        case NodeKind.FEATURE:
            return kind, layer, index, where
        case NodeKind.ERROR:
            return kind, layer, where
        case NodeKind.LOGIT:
            return kind, index, graph.logit_tokens[node - int(table.of(NodeKind.LOGIT)[0])]
        case _:
            return kind, layer


def own_sums(pruned: PrunedGraph, match: str) -> tuple[dict, dict, set, set]:
    """Share and weight of every matched node and edge of the whole graph, and which of them pruning kept."""
    graph = pruned.graph
    flow = influence(graph, logit_weights(graph)).nodes
    keys = [own_key(pruned, node, match) for node in range(graph.n_nodes)]
    share: dict = defaultdict(float)
    weight: dict = defaultdict(float)
    kept_edges = set()
    for node, key in enumerate(keys):
        share[key] += flow[node] / flow.sum()
    for edge, (source, target) in enumerate(zip(graph.indices, graph.edge_targets(), strict=True)):
        weight[keys[source], keys[target]] += float(graph.weights[edge])
        if pruned.edge_mask[edge]:
            kept_edges.add((keys[source], keys[target]))
    return share, weight, {keys[n] for n in np.flatnonzero(pruned.node_mask)}, kept_edges


@pytest.mark.parametrize("match", ["position", "from_end", "role", "feature"])
def test_shares_and_weights_are_those_summed_one_by_one(match: str) -> None:
    pair = traced(0), traced(1, tokens=7, pictures=3)
    found = compare(*pair, match=match)
    own = [own_sums(pruned, match) for pruned in pair]
    union = own[0][2] | own[1][2]
    assert len(found.nodes) == len(union)
    for graph in (0, 1):
        share, weight, nodes, edges = own[graph]
        assert found.kept[graph].sum() == len(nodes)
        assert found.edge_kept[graph].sum() == len(edges)
        assert np.allclose(np.sort(found.share[graph]), np.sort([share.get(key, 0.0) for key in union]), atol=1e-12)
        wanted = [weight.get(edge, 0.0) for edge in own[0][3] | own[1][3]]
        assert np.allclose(np.sort(found.weights[graph]), np.sort(wanted), atol=1e-6)
    assert found.summary().nodes_both == len(own[0][2] & own[1][2]) > 10
    assert found.summary().edges_both == len(own[0][3] & own[1][3]) > 2
    assert (found.sources < found.targets).all()


def test_a_graph_equals_itself() -> None:
    found = compare(traced(3), traced(3))
    numbers = found.summary()
    assert found.match == "position"
    assert not found.difference.any()
    assert numbers.nodes_first_only == numbers.edges_second_only == 0
    assert (numbers.node_jaccard, numbers.edge_jaccard, numbers.sign_agreement) == (1.0, 1.0, 1.0)
    assert numbers.edge_correlation == pytest.approx(1.0)


def test_edge_shares_add_up_to_the_shares_of_their_sources() -> None:
    whole = traced(2)
    kept = dataclasses.replace(
        whole, node_mask=np.ones(whole.graph.n_nodes, bool), edge_mask=np.ones(whole.graph.n_edges, bool)
    )
    found = compare(kept, traced(5), match="role")
    summed = np.bincount(found.sources, found.edge_share[0], len(found.nodes))
    assert np.allclose(summed, found.share[0], atol=1e-12)
    assert found.share[0].sum() == pytest.approx(1.0)


def test_prompts_of_different_length_are_matched_by_role_and_cells_wherever_they_stand() -> None:
    first, second = traced(0), traced(1, tokens=8, pictures=2)
    moved = dataclasses.replace(
        second.graph,
        is_image=np.roll(second.graph.is_image, 3),
        image_index=np.roll(second.graph.image_index, 3),
        patch_boxes=[*[None] * 3, *second.graph.patch_boxes[:5]],
    )
    found = compare(first, prune(moved, 0.7, 0.9))
    assert found.match == "role"
    cells = found.nodes.image >= 0
    assert cells.sum() == 2
    assert found.kept[:, cells].all()


def test_shares_and_strongest_edges_follow_the_convention_for_biases() -> None:
    graph = traced(0).graph
    folded = prune(graph, bias="fold")
    found = compare(folded, folded)
    kept = np.flatnonzero(folded.node_mask)
    share = folded.influence[kept] / folded.influence.sum()
    assert (found.nodes.kind != NodeKind.BIAS).all()
    assert np.sort(found.share[0]) == pytest.approx(np.sort(share))
    # A row is divided by what does not come from biases; the ends' weights are influence that they pass on.
    counts = graph.nodes.kind[graph.indices] != NodeKind.BIAS
    targets, sizes = graph.edge_targets(), np.abs(graph.weights.astype(np.float64)) * counts
    sums = np.bincount(targets, sizes, graph.n_nodes)
    worth = folded.influence.copy()
    worth[graph.nodes.ends()] += graph.end_weights
    strength = sizes / np.where(sums > 0, sums, 1.0)[targets] * worth[targets]
    strongest = np.flatnonzero(folded.edge_mask)
    strongest = strongest[np.argsort(-strength[strongest], kind="stable")][:20]
    np.testing.assert_array_equal(edge_strengths(folded)[0][:20], strongest)
    assert not np.array_equal(edge_strengths(prune(graph))[0][:20], strongest)


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


def test_the_viewers_slider_keeps_the_nodes_that_pruning_keeps(threshold: float = 0.8) -> None:
    pruned = whole(1.0)
    body = graph_to_json(pruned, "s", "m")
    by_id = {node["node_id"]: node["influence"] for node in body["nodes"] if node["feature_type"] != "logit"}
    wanted = smallest_set(pruned.influence, threshold) & pruned.node_mask
    names = {node_id(pruned.graph, int(node)) for node in np.flatnonzero(wanted)}
    below = {name for name, value in by_id.items() if value <= threshold}
    # The set reaches the share with the first node that passes it, the slider stops just before.
    assert below <= names and len(names - below) <= 1
    assert max(by_id.values()) <= 1.0
