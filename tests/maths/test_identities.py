"""The identities of docs/maths.md, in float64, to 1e-9 of the sum of |incoming edges|, and what they rest on."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.maths.maths_cases import CASES, TOLERANCE, Case, case_of, config, dense, make_case, read_targets, rows_of

from vlmscope.attribution.trace import attribute
from vlmscope.conformance import BEHAVIOUR, IDENTITIES, Check, Subject, soft_tokens
from vlmscope.core.graph import NodeKind
from vlmscope.models import attention
from vlmscope.models.base import exact_float64
from vlmscope.replacement import FrozenLayer, ReplacementModel


@pytest.mark.parametrize("identity", [*IDENTITIES, *BEHAVIOUR], ids=lambda identity: identity.__name__)
def test_identity_holds(case: Case, identity: Callable[[Subject], Check]) -> None:
    found = identity(case.subject)
    if identity is soft_tokens and not case.inputs.is_image.any():
        assert found.skipped
    else:
        assert found.held, found


@pytest.mark.parametrize("name", ["all_sliding", "one_image_skip_biases"])
def test_long_prompts_keep_the_parts_of_patterns_that_are_seen(
    name: str, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    with exact_float64():
        whole = case_of(name, cases)
        monkeypatch.setattr(attention, "QUERIES", 5)
        cut = make_case(**CASES[name])
        for identity in IDENTITIES:
            assert identity(cut.subject).held, identity.__name__
    patterns = zip(whole.replacement.state.patterns, cut.replacement.state.patterns, strict=True)
    for one, other in patterns:
        assert torch.equal(one.whole(), other.whole()) and torch.equal(one.reach(), other.reach())
        assert torch.equal(one.row(1, 8), other.row(1, 8))
        kept = sum(block.values.numel() for block in other.blocks)
        assert kept < (0.8 if name == "all_sliding" else 1) * one.whole().numel()
    np.testing.assert_array_equal(cut.graph.indices, whole.graph.indices)
    scale = np.abs(whole.graph.weights).max()
    np.testing.assert_allclose(cut.graph.weights, whole.graph.weights, rtol=0, atol=1e-12 * scale)


def test_the_graph_of_a_trace_is_the_one_checked(case: Case) -> None:
    edges, graph = case.subject.edges, case.graph
    np.testing.assert_array_equal(edges.indptr, graph.indptr)
    np.testing.assert_array_equal(edges.indices, graph.indices)
    np.testing.assert_array_equal(edges.weights, graph.weights)
    np.testing.assert_array_equal(edges.nodes.target, graph.nodes.target)


def test_completeness_needs_every_kind_of_source(one_case: Case) -> None:
    graph, rows = one_case.graph, rows_of(one_case.graph)
    matrix = dense(graph)
    for kind in (NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS):
        without = matrix.copy()
        without[:, graph.nodes.of(kind)] = 0
        gap = np.abs(without[rows].sum(1) - graph.nodes.target[rows]) / np.abs(matrix[rows]).sum(1)
        assert gap.max() > 1e-3, kind


@pytest.mark.parametrize("kind", [NodeKind.TOKEN, NodeKind.ERROR, NodeKind.BIAS])
def test_edges_of_other_sources_are_causal(one_case: Case, kind: NodeKind) -> None:
    graph, rows, replacement = one_case.graph, rows_of(one_case.graph), one_case.replacement
    matrix = dense(graph)
    scale, before = np.abs(matrix[rows]).sum(1), read_targets(graph, replacement.replay())
    for source in graph.nodes.of(kind):
        layer, position = int(graph.nodes.layer[source]), int(graph.nodes.position[source])
        changed = scaled_source(one_case, kind, layer, position, 1.5)
        moved = read_targets(graph, changed.replay()) - before
        assert (np.abs(moved - 0.5 * matrix[rows, source]) <= TOLERANCE * scale).all()


def scaled_source(case: Case, kind: NodeKind, layer: int, position: int, factor: float) -> ReplacementModel:
    """The replacement model with one source that is no feature multiplied."""
    replacement = case.replacement

    def _written_again(frozen: FrozenLayer) -> FrozenLayer:
        """A soft token is one source, however often it is written (DeepStack)."""
        if frozen.injection is None:
            return frozen
        injection = frozen.injection.clone()
        injection[position] *= factor
        return dataclasses.replace(frozen, injection=injection)

    if kind == NodeKind.TOKEN:
        embeddings = replacement.state.embeddings.clone()
        embeddings[position] *= factor
        state = dataclasses.replace(replacement.state, embeddings=embeddings)
        return dataclasses.replace(replacement, state=state, layers=[_written_again(f) for f in replacement.layers])
    if kind == NodeKind.ERROR:
        errors = replacement.errors.clone()
        errors[layer, position] *= factor
        return dataclasses.replace(replacement, errors=errors)
    layers, features = list(replacement.layers), list(replacement.features)
    frozen, found = layers[layer], features[layer]
    assert frozen.value_bias is not None
    output_bias = None if frozen.output_bias is None else frozen.output_bias * factor  # Qwen 2 has none
    layers[layer] = dataclasses.replace(frozen, value_bias=frozen.value_bias * factor, output_bias=output_bias)
    features[layer] = dataclasses.replace(found, b_enc=found.b_enc * factor, b_dec=found.b_dec * factor)
    return dataclasses.replace(replacement, layers=layers, features=features)


def test_one_batch_gives_the_same_graph(case: Case) -> None:
    check_batching(case, 1000)


def test_small_batches_give_the_same_graph(one_case: Case) -> None:
    check_batching(one_case, 7)


@pytest.mark.parametrize("case", ["text_only_model", "one_image_skip_biases", "cross_layer_qwen3_vl"], indirect=True)
def test_one_target_at_a_time_gives_the_same_graph(case: Case) -> None:
    check_batching(case, 1)


def check_batching(case: Case, batch_size: int) -> None:
    other = attribute(case.replacement, config(batch_size=batch_size), case.vlm.tokenizer)
    np.testing.assert_array_equal(other.indptr, case.graph.indptr)
    np.testing.assert_array_equal(other.indices, case.graph.indices)
    scale = np.abs(dense(case.graph)).sum(1)[case.graph.edge_targets()]
    assert (np.abs(other.weights - case.graph.weights) <= 1e-13 * scale).all()


def test_every_source_comes_before_its_target(case: Case) -> None:
    assert (case.graph.indices < case.graph.edge_targets()).all()
