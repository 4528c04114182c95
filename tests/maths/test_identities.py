"""The identities of docs/maths.md, in float64, to 1e-9 of the sum of |incoming edges|."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.maths.maths_cases import TOLERANCE, Case, config, dense, key_of, read_targets, rows_of, sampled_features

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.trace import attribute
from vlmscope.core.graph import NodeKind
from vlmscope.replacement.model import ReplacementModel


def test_replay_is_the_same_model(case: Case) -> None:
    with torch.no_grad():
        logits = case.vlm.model(**case.inputs.tensors).logits[0]
    replay = case.replacement.replay()
    assert (replay.logits - logits).abs().max() <= TOLERANCE * logits.abs().max()
    expected = torch.from_numpy(case.replacement.feature_activations.pre_activation)
    assert (replay.pre_activation - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_rows_are_complete(case: Case) -> None:
    graph, rows = case.graph, rows_of(case.graph)
    matrix = dense(graph)
    error = np.abs(matrix[rows].sum(1) - graph.nodes.target[rows])
    assert (error <= TOLERANCE * np.abs(matrix[rows]).sum(1)).all()
    assert graph.residual[rows].max() <= TOLERANCE
    # Targets are the model's own numbers, not the engine's.
    table = case.replacement.feature_activations
    with torch.no_grad():
        logits = case.vlm.model(**case.inputs.tensors).logits[0, -1]
    feature_rows, logit_rows = graph.nodes.of(NodeKind.FEATURE), graph.nodes.of(NodeKind.LOGIT)
    np.testing.assert_allclose(graph.nodes.target[feature_rows], table.activation, rtol=1e-9)
    centred = (logits - logits.mean()).numpy()[graph.nodes.index[logit_rows]]
    np.testing.assert_allclose(graph.nodes.target[logit_rows], centred, rtol=1e-9, atol=1e-12)


def test_completeness_needs_every_kind_of_source(one_case: Case) -> None:
    graph, rows = one_case.graph, rows_of(one_case.graph)
    matrix = dense(graph)
    for kind in (NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS):
        without = matrix.copy()
        without[:, graph.nodes.of(kind)] = 0
        gap = np.abs(without[rows].sum(1) - graph.nodes.target[rows]) / np.abs(matrix[rows]).sum(1)
        assert gap.max() > 1e-3, kind


def test_direct_effects_are_edges(case: Case) -> None:
    graph, rows = case.graph, rows_of(case.graph)
    matrix = dense(graph)
    scale = np.abs(matrix[rows]).sum(1)
    for source in sampled_features(case):
        activation, delta = graph.nodes.activation[source], 0.7
        moved = read_targets(graph, case.replacement.direct({key_of(graph, source): delta}))
        assert (np.abs(moved - matrix[rows, source] / activation * delta) <= TOLERANCE * scale).all()
        # The same from two whole replays, which share nothing with the change's own code path but the pieces.
        after, before = case.replacement.replay({key_of(graph, source): delta}), case.replacement.replay()
        change = read_targets(graph, after) - read_targets(graph, before)
        assert (np.abs(change - moved) <= TOLERANCE * scale).all()


def test_total_effects_are_the_resolvent(case: Case) -> None:
    graph, rows = case.graph, rows_of(case.graph)
    features = graph.nodes.of(NodeKind.FEATURE)
    jacobian = dense(graph)[rows][:, features] / graph.nodes.activation[features]
    inner = jacobian[: len(features)]
    resolvent = np.linalg.inv(np.eye(len(features)) - inner)
    scale = np.abs(dense(graph)[rows]).sum(1)
    for source in sampled_features(case):
        delta = np.where(features == source, -0.4, 0.0)
        response = resolvent @ inner @ delta
        expected = np.concatenate([response, jacobian[len(features) :] @ (delta + response)])
        moved = read_targets(graph, case.replacement.total({key_of(graph, source): -0.4}))
        # Total effects add up over paths, so their rounding is measured against the larger of edge sums and effect.
        assert (np.abs(moved - expected) <= TOLERANCE * np.maximum(scale, np.abs(expected))).all()


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
    if kind == NodeKind.TOKEN:
        embeddings = replacement.state.embeddings.clone()
        embeddings[position] *= factor
        return dataclasses.replace(replacement, state=dataclasses.replace(replacement.state, embeddings=embeddings))
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


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batching_gives_the_same_graph(case: Case, batch_size: int) -> None:
    other = attribute(case.replacement, config(batch_size=batch_size), case.vlm.tokenizer)
    np.testing.assert_array_equal(other.indptr, case.graph.indptr)
    np.testing.assert_array_equal(other.indices, case.graph.indices)
    scale = np.abs(dense(case.graph)).sum(1)[case.graph.edge_targets()]
    assert (np.abs(other.weights - case.graph.weights) <= 1e-13 * scale).all()


def test_order_of_targets_gives_the_same_rows(case: Case) -> None:
    adjoint = Adjoint(case.replacement)
    generator = torch.Generator().manual_seed(5)
    for layer, features in enumerate(case.replacement.features):
        shuffled = torch.randperm(len(features), generator=generator)
        plain = adjoint.feature_rows(layer, torch.arange(len(features)))
        mixed = adjoint.feature_rows(layer, shuffled)
        assert ((mixed - plain[shuffled]).abs().sum(1) <= 1e-13 * plain[shuffled].abs().sum(1)).all()


def test_every_source_comes_before_its_target(case: Case) -> None:
    assert (case.graph.indices < case.graph.edge_targets()).all()
