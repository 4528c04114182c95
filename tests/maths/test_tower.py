"""Graphs that begin at the patches: the identities with transcoders of the vision tower, on every family with one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from tests.maths.maths_cases import PROMPT, config, dense

import vlmscope
from vlmscope.attribution.adjoint import Adjoint, TowerRows, total_effects
from vlmscope.attribution.export import graph_to_json, load_graph, save_graph
from vlmscope.attribution.influence import prune
from vlmscope.attribution.targets import choose_logits, choose_targets
from vlmscope.attribution.trace import attribute
from vlmscope.circuits.circuit import FEEDS, direct_edges, supernode_mask
from vlmscope.conformance import (
    IDENTITIES,
    Limits,
    Subject,
    completeness,
    direct_effects,
    heads,
    make_subject,
    scores,
)
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import TOWER, FeatureId
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.models import attention
from vlmscope.models.attention import FrozenVision, Pattern
from vlmscope.models.base import VisionStack, exact_float64
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.report.graph_figure import attribution_graph
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

# Towers of all kinds: class tokens, windows, DeepStack, masked patches. The others repeat them.
KINDS = ("gemma3", "llava", "idefics3", "qwen2_5_vl", "qwen3_vl")
EVERY = [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in KINDS)]
SCHEMA = Path(vlmscope.__file__).parent / "attribution" / "schema" / "neuronpedia-graph.schema.json"
_CASES: dict[str, Subject] = {}


def subject_of(family: str, images: int = 1) -> Subject:
    """A tiny model with random transcoders of decoder and tower at one prompt; call it under `exact_float64`."""
    key = f"{family}{images}"
    if key not in _CASES:
        vlm = tiny_vlm(family, 3, dtype=torch.float64)
        stack = VisionStack(vlm.adapter)
        settings = {"seed": 4, "dtype": torch.float64, "skip": True}
        tower = random_set(stack.n_layers, stack.d_model, 24, 2, site="tower", **settings)
        decoder = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 40, 3, **settings)
        inputs = vlm.prepare(PROMPT, [tiny_image(number) for number in range(images)])
        _CASES[key] = make_subject(
            Scope(vlm, decoder, tower=tower), inputs, None, Limits(sources=4, positions=1, logits=2)
        )
    return _CASES[key]


@pytest.mark.parametrize("family", EVERY)
def test_identities_hold_down_to_the_patches(family: str) -> None:
    with exact_float64():
        subject = subject_of(family)
        nodes = subject.edges.nodes
        assert (nodes.layer[nodes.of(NodeKind.FEATURE)] < 0).any()
        for measure in IDENTITIES:
            outcome = measure(subject)
            assert outcome.held, outcome


def test_two_pictures(family: str = "qwen3_vl") -> None:
    with exact_float64():
        for measure in (completeness, direct_effects):
            assert measure(subject_of(family, 2)).held


def faulty(subject: Subject, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]) -> Subject:
    with monkeypatch.context() as patch:
        change(patch)
        return make_subject(subject.scope, subject.inputs, None, replace(subject.limits, targets=100))


@pytest.mark.parametrize("family", EVERY)
def test_a_source_that_is_dropped_breaks_the_sum(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of patches, errors, biases and features of the tower each is needed, so none may be lost in silence."""
    with exact_float64():
        subject = subject_of(family)
        nodes, matrix = subject.edges.nodes, subject.matrix.tocsc()
        ends = subject.edges.nodes.of(NodeKind.LOGIT)
        scale = np.abs(matrix[ends]).sum(1)
        for kind in (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.BIAS, NodeKind.FEATURE):
            mine = np.flatnonzero((nodes.kind == kind) & (nodes.layer < -1))
            part = np.abs(np.asarray(matrix[ends][:, mine].sum(1)).ravel())
            if kind == NodeKind.BIAS and family == "gemma4":
                continue  # it has none
            assert (part / scale).max() > 1e-6, (kind, family)


def _unfrozen(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FrozenVision, "keep", lambda _self, compute: compute())


def _shifted(patch: pytest.MonkeyPatch) -> None:
    made = TowerRows.__init__

    def init(self: TowerRows, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs)  # pyright: ignore[reportArgumentType]
        self._at_zero = self._run

    patch.setattr(TowerRows, "__init__", init)


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("fault", [_unfrozen, _shifted])
def test_faults_fail_an_identity(
    family: str, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients through what should be frozen, and constants that are not."""
    with exact_float64():
        broken = faulty(subject_of(family), monkeypatch, fault)
        assert completeness(broken).failed


@pytest.mark.parametrize("family", ["gemma3", *FAMILIES])
def test_faults_of_heads_fail_on_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is dropped from the loadings, and sources of the tower that are carried wrongly."""
    with exact_float64():
        subject = subject_of(family)
        assert heads(subject).held and scores(subject).held
        layers = [replace(layer, pattern=Pattern.of(layer.pattern.whole())) for layer in subject.replacement.layers]
        for layer in layers:
            layer.pattern.blocks[0].values[0] = 0
        wrong = replace(subject, replacement=replace(subject.replacement, layers=layers))
        assert heads(wrong).failed and scores(wrong).failed
        right = TowerRows.carried

        def doubled(self: TowerRows, slot: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            written, injected = right(self, slot, count)
            return 2 * written, 2 * injected

        monkeypatch.setattr(TowerRows, "carried", doubled)
        assert heads(subject).failed


def test_soft_tokens_are_passed_through_and_the_graph_says_where_patches_are() -> None:
    with exact_float64():
        subject = subject_of("gemma3")
        vlm, replacement = subject.scope.vlm, subject.replacement
        graph = attribute(replacement, config(), vlm.tokenizer)
        tower = replacement.tower
        assert tower is not None
        soft = np.flatnonzero((graph.nodes.layer == -1) & graph.is_image[graph.nodes.position])
        assert len(soft) == 4 and not np.isin(graph.indices, soft).any()
        assert len(graph.tokens) == len(graph.patch_boxes) == len(subject.inputs) + len(tower) and graph.n_patches == 16
        # A patch is drawn at its soft token: 4 x 4 patches, 2 x 2 soft tokens.
        columns = graph.prompt_positions()[len(subject.inputs) :].reshape(4, 4)
        first = int(np.flatnonzero(subject.inputs.is_image)[0])
        assert (columns == first + np.kron([[0, 1], [2, 3]], np.ones((2, 2), int))).all()


def test_the_viewers_file_is_valid_and_the_graph_comes_back(tmp_path: Path) -> None:
    """Nodes of the tower have ids and layers of their own, stand at soft tokens, and know their part of the picture."""
    with exact_float64():
        subject = subject_of("gemma3")
        pruned = prune(attribute(subject.replacement, config(), subject.scope.vlm.tokenizer), 1.0, 1.0)
    body, n_tokens = graph_to_json(pruned, "slug", "scan"), len(subject.inputs)
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    nodes = {node["node_id"]: node for node in body["nodes"]}
    assert len(nodes) == len(body["nodes"]) and len(body["metadata"]["prompt_tokens"]) == n_tokens
    assert {"P", "T0", "T1", "E", "0"} <= {node["layer"] for node in nodes.values()}
    assert all(node["ctx_idx"] < n_tokens for node in nodes.values())
    patch = nodes[f"PATCH_{n_tokens + 5}"]  # the second of the second row of four
    assert patch["patch"] == body["vlmscope"]["tower"][5] == {"image": 0, "box": [0.25, 0.25, 0.5, 0.5]}
    assert all(link["source"] in nodes and link["target"] in nodes for link in body["links"])
    save_graph(tmp_path / "graph.safetensors", pruned)
    again = load_graph(tmp_path / "graph.safetensors")
    assert again.graph.n_patches == 16 and np.array_equal(again.graph.weights, pruned.graph.weights)
    assert again.graph.nodes.feature_id(int(again.graph.nodes.of(NodeKind.FEATURE)[0])).layer == TOWER
    assert str(FeatureId.parse("T1/12")) == "T1/12"


def test_what_is_left_out_is_counted_by_layer_and_sums_stay() -> None:
    with exact_float64():
        subject = subject_of("gemma3")
        replacement = subject.replacement
        for choice in ("influence", "total_effect"):
            graph = attribute(replacement, config(max_nodes=30, choice=choice), subject.scope.vlm.tokenizer)
            assert graph.residual.max() < 1e-9 and (graph.left_out_mass.sum(0) > 0).sum() >= 3
            assert graph.meta["n_left_out_features"] == len(replacement.feature_activations) - 30
            rest = graph.nodes.of(NodeKind.LEFT_OUT)
            assert (graph.nodes.layer[rest] >= TOWER).all() and (graph.nodes.layer[rest] < 0).any()
            sums = np.abs(dense(graph)).sum(1)
            rows = np.flatnonzero(np.diff(graph.indptr))
            assert (sums[rows] > 0).all()


def test_total_effects_go_through_features_of_the_tower() -> None:
    """The sweep of total effects against (I - J)^-1 of the whole graph, for patches and the tower's features."""
    with exact_float64():
        subject = subject_of("qwen3_vl")
        replacement, graph = subject.replacement, attribute(subject.replacement, config(), subject.scope.vlm.tokenizer)
        matrix, features, ends = dense(graph), graph.nodes.of(NodeKind.FEATURE), graph.nodes.ends()
        jacobian = matrix[:, features] / graph.nodes.activation[features]
        sources = np.flatnonzero(
            (graph.nodes.layer < -1) & np.isin(graph.nodes.kind, (NodeKind.TOKEN, NodeKind.FEATURE))
        )
        response = np.linalg.solve(np.eye(len(features)) - jacobian[features], matrix[features][:, sources])
        expected = matrix[ends][:, sources] + jacobian[ends] @ response
        adjoint = Adjoint(replacement)
        found = total_effects(adjoint, choose_logits(replacement, 1.0, 5)).numpy()
        columns = [1 + int(graph.nodes.position[n]) - len(subject.inputs) for n in sources
                   if graph.nodes.kind[n] == NodeKind.TOKEN]  # fmt: skip
        columns += adjoint.columns.all_features()[: len(sources) - len(columns)].tolist()
        assert np.abs(found[:, columns] - expected).max() <= 1e-9 * np.abs(found).sum(1).max()


def test_patterns_in_files_give_the_same_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of towers whose patterns are too large for memory."""
    right, kept = attention.in_file, []

    def in_file(value: torch.Tensor) -> torch.Tensor:
        kept.append(right(value))
        assert torch.equal(kept[-1], value) and kept[-1].dtype == value.dtype
        return kept[-1]

    with exact_float64():
        subject = subject_of("gemma3")
        monkeypatch.setattr(attention, "KEPT_BYTES", 0)
        monkeypatch.setattr(attention, "LARGE_BYTES", 1)
        monkeypatch.setattr(attention, "in_file", in_file)
        again = make_subject(subject.scope, subject.inputs, None, subject.limits)
    assert len(kept) > 4 and any(one.ndim == 4 for one in kept)
    assert np.array_equal(again.edges.weights, subject.edges.weights)
    half = torch.randn(3, 5).bfloat16()
    assert torch.equal(right(half), half)


def test_a_set_of_another_site_is_one_line() -> None:
    vlm = tiny_vlm("gemma3", 3)
    decoder = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 40, 5)
    with pytest.raises(UserError, match="attribution.tower: the set is of the decoder's layers"):
        make_subject(Scope(vlm, decoder, tower=decoder), vlm.prepare(PROMPT, [tiny_image(0)]))


def test_edges_from_features_of_the_tower_into_supernodes_are_their_direct_effects() -> None:
    """The strongest ones of a circuit's table: all positions of a feature scaled by 1.5, nothing else responding."""
    with exact_float64():
        subject = subject_of("gemma3")
        replacement = subject.replacement
        graph = attribute(replacement, config(), subject.scope.vlm.tokenizer)
        nodes = graph.nodes.of(NodeKind.FEATURE)
        late = sorted({graph.nodes.feature_id(at) for at in nodes.tolist() if graph.nodes.layer[at] >= 1})[::2]
        node = Supernode("late", tuple(CircuitFeature(feature, "", 0.0, 0.0) for feature in late))
        edges = {edge.source: edge for edge in direct_edges([graph], [node], 1) if edge.target == "late"}
        feeds = {name: edge.weight for name, edge in edges.items() if "/" in name}
        members = supernode_mask(graph, node)
        whole = sum(edges[name].weight for name in edges if "/" not in name and name != "late")
        own = edges["late"].weight if "late" in edges else 0.0
        scale = np.abs(dense(graph)[members]).sum()
        assert len(feeds) == FEEDS and abs(whole + own - graph.nodes.target[members].sum()) <= 1e-9 * scale
        keys = [(int(graph.nodes.layer[at]), int(graph.nodes.position[at]), int(graph.nodes.index[at])) for at in nodes]
        activation = dict(zip(keys, graph.nodes.activation[nodes].tolist(), strict=True))
        inside = [row for row, key in enumerate(keys) if members[nodes[row]]]
        sums = {}
        for feature in {FeatureId(layer, index) for layer, _, index in keys if layer < 0}:
            change = {key: 0.5 * a for key, a in activation.items() if (key[0], key[2]) == feature}
            sums[str(feature)] = 2 * float(replacement.direct(change).pre_activation[inside].sum())
        strongest = sorted(sums, key=lambda name: -abs(sums[name]))[:FEEDS]
        assert set(feeds) == set(strongest)
        assert all(abs(feeds[name] - sums[name]) <= 1e-9 * scale for name in strongest)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "llava"])
def test_a_feature_of_the_tower_is_explained_by_what_is_below(family: str, tmp_path: Path) -> None:
    """Its pre-activation is the sum of its edges; each edge is the effect of its source; left-out features count."""
    with exact_float64():
        subject = subject_of(family)
        replacement, tokenizer = subject.replacement, subject.scope.vlm.tokenizer
        tower = replacement.tower
        assert tower is not None
        layer, top = TOWER + len(tower.features) - 1, tower.features[-1]
        name = str(FeatureId(layer, int(top.index[top.activation.argmax()])))
        asked = config(feature=name, tower=True)
        targets = choose_targets(replacement, asked, tokenizer)
        graph = attribute(replacement, asked, tokenizer, "", targets)
        ends, row = graph.nodes.ends(), dense(graph)[-1]
        assert targets.values.item() == pytest.approx(float(top.pre_activation[top.activation.argmax()]))
        assert abs(row.sum() - targets.values.item()) <= 1e-9 * np.abs(row).sum() and len(ends) == 1
        assert (graph.nodes.layer[row != 0] < layer).all() and graph.residual.max() < 1e-9
        key = layer, int(targets.positions[0]), FeatureId.parse(name).index
        table = replacement.feature_activations
        for source in graph.nodes.of(NodeKind.FEATURE)[:6].tolist():
            moved = int(graph.nodes.layer[source]), int(graph.nodes.position[source]), int(graph.nodes.index[source])
            change = replacement.direct({moved: float(graph.nodes.activation[source])})
            effect = float(change.pre_activation[table.row(*key)])
            assert abs(effect - row[source]) <= 1e-9 * np.abs(row).sum()
        few = attribute(replacement, config(feature=name, tower=True, max_nodes=3), tokenizer, "", targets)
        assert abs(dense(few)[-1].sum() - targets.values.item()) <= 1e-9 * np.abs(row).sum()
        assert few.meta["n_left_out_features"] == max(graph.meta["n_active_features"] - 3, 0)
        pruned = prune(graph, 0.8, 0.98)
        body = graph_to_json(pruned, "slug", "scan")
        jsonschema.validate(body, json.loads(SCHEMA.read_text()))
        attribution_graph(pruned, tmp_path / "graph.png", [])
        with pytest.raises(UserError, match="is active nowhere|has features 0 to"):
            choose_targets(replacement, config(feature="T0/9999", tower=True), tokenizer)
        with pytest.raises(UserError, match="the vision tower has layers 0 to"):
            choose_targets(replacement, config(feature="T9/1", tower=True), tokenizer)
    with pytest.raises(UserError, match=r"add attribution\.tower=true"):
        config(feature=name).check()
