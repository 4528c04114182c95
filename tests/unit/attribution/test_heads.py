"""Heads, scores of attention, pins and supernodes of a traced graph, in both of its files."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

import vlmscope
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.export import graph_to_json, load_graph, save_graph
from vlmscope.attribution.heads import HeadSplitter
from vlmscope.attribution.influence import edge_strengths
from vlmscope.attribution.trace import Trace, trace, with_heads
from vlmscope.core.artifacts import load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

SCHEMA = Path(vlmscope.__file__).parent / "attribution" / "schema" / "neuronpedia-graph.schema.json"
SIDES = ("pair_wise_contributors", "top_q_marginal_contributors", "top_k_marginal_contributors")


@pytest.fixture(scope="module")
def scope() -> Scope:
    vlm = tiny_gemma3(3, dtype=torch.float64)
    return Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 40, 5, seed=4, skip=True,
                                 dtype=torch.float64))  # fmt: skip


def traced(scope: Scope, **settings: Any) -> Trace:
    with exact_float64():
        config = AttributionConfig(dtype="float64", **settings)
        inputs = scope.vlm.prepare("what is this planet ?", [tiny_image(0)])
        return with_heads(scope, trace(scope, inputs, config), config)


@pytest.fixture(scope="module")
def whole(scope: Scope) -> Trace:
    return traced(scope, edge_threshold=0.7)


def test_parts_of_kept_edges_sum_to_them_and_those_of_scores_to_the_models(whole: Trace) -> None:
    graph, heads = whole.graph, whole.pruned.heads
    assert heads is not None and len(heads.edges) == whole.pruned.n_edges
    np.testing.assert_array_equal(heads.edges, edge_strengths(whole.pruned)[0])
    parts = heads.stream + heads.skip + heads.loadings.sum((1, 2))
    scale = graph.absolute_sums()[graph.targets_of(heads.edges)]
    assert np.abs(parts - graph.weights[heads.edges]).max() <= 1e-12 * scale.max()
    kinds = graph.nodes.kind[graph.indices[heads.edges]]
    assert {NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS} <= set(kinds.tolist())
    assert np.abs(heads.skip).max() > 0 and np.abs(heads.loadings[kinds == NodeKind.BIAS]).max() > 0
    stays, by_head = heads.parts()
    np.testing.assert_allclose(stays + by_head.sum((1, 2)), heads.strength)
    metrics = whole.metrics()
    assert metrics["heads/edge_residual"] < 1e-12 and 0 < metrics["heads/score_residual"] < 1e-12
    for one in heads.query_keys:
        query, key = one.pairs[0][:2]
        assert one.query == graph.nodes.position[one.node] and abs(one.total - one.score) < 1e-12 * one.sizes
        assert query.position in (*range(one.query + 1), -1) and key.position in (*range(len(graph.tokens)), -1)
    heads_told = [(one.layer, one.head) for one in heads.query_keys]
    assert len({one.node for one in heads.query_keys}) == len(set(heads_told)) == len(heads_told) > 1


def test_features_without_a_row_are_split_too(scope: Scope) -> None:
    found = traced(scope, max_nodes=40, heads=0)
    graph, end = found.graph, int(found.graph.nodes.ends()[0])
    sources, weights = graph.incoming(end)
    assert (graph.nodes.kind[sources] == NodeKind.LEFT_OUT).sum() > 1
    with exact_float64():
        splitter = HeadSplitter(found.replacement, graph.nodes, found.targets)
        parts = splitter.split(sources.astype(int), np.full(len(sources), end), 64)
    gap = np.abs(parts.stream + parts.skip + parts.heads.sum((1, 2)) - weights)
    assert gap.max() <= 1e-12 * np.abs(weights).sum()


def test_both_files_have_the_heads(whole: Trace, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    save_graph(path, whole.pruned)
    heads, again = whole.pruned.heads, load_graph(path).heads
    assert heads is not None and again is not None
    for name in ("edges", "strength", "loadings", "stream", "skip"):
        np.testing.assert_array_equal(getattr(heads, name), getattr(again, name))
    assert again.query_keys == heads.query_keys
    body = graph_to_json(whole.pruned, "s", "m")
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    nodes = {node["node_id"]: node for node in body["nodes"]}
    records = body["vlmscope"]["attention"]["scores"]
    assert len(records) == len(heads.query_keys) == sum("qk_tracing_results" in node for node in body["nodes"])
    named = {one for record in records for side in SIDES for row in record[side] for one in row[:-1]}
    assert named <= nodes.keys() | body["qk_only_nodes"].keys()
    assert not nodes.keys() & body["qk_only_nodes"].keys() and body["qk_only_nodes"].keys() <= named
    for record in records:
        node = nodes[record["node"]]
        assert node["ctx_idx"] == record["query"]
        assert node["qk_tracing_results"] == {side: record[side] for side in SIDES}
    for link in body["links"]:
        listed = sum(share for _, _, share in link["heads"]) + link.get("stream", 0) + link.get("skip", 0)
        # Left out are the fifth head and more, and those with less than a hundredth.
        assert len(link["heads"]) == 4 or abs(listed - 1) < 0.01 * heads.loadings[0].size


def test_heads_of_other_edges_than_the_graphs_are_refused(whole: Trace, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    save_graph(path, whole.pruned)
    arrays, metadata = load_tensors(path)
    save_tensors(path, {**arrays, "head_edges": arrays["head_edges"] + whole.graph.n_edges}, metadata)
    with pytest.raises(UserError, match="heads are not of its"):
        load_graph(path)
