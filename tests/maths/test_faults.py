"""Deliberate faults: each must break the identities, or these would prove nothing."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from tests.maths.maths_cases import TOLERANCE, Case, case_of

from vlmscope.activations import capture_state
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.conformance import (
    Check,
    Subject,
    batching,
    completeness,
    direct_effects,
    direct_mode,
    find_edges,
    generation,
    heads,
    in_float64,
    parity,
    scores,
    soft_tokens,
    total_effects,
    weights,
)
from vlmscope.interventions import run
from vlmscope.interventions.edits import LayerEdit
from vlmscope.models.attention import Pattern
from vlmscope.models.base import exact_float64
from vlmscope.replacement import ReplacementModel, active_features, feature_table
from vlmscope.transcoders.transcoder import SparseCode, Transcoder

Fault = Callable[[Case], ReplacementModel]


def wrong_rope_base(case: Case) -> ReplacementModel:
    """Patterns of a model that turns queries and keys by other angles; in Gemma 3 full layers by the sliding base's."""
    rotary = case.vlm.adapter.decoder().get_submodule("rotary_emb")
    buffers = dict(rotary.named_buffers())
    angles = buffers.get("full_attention_inv_freq", buffers.get("inv_freq"))
    assert angles is not None
    right = angles.clone()
    wrong = buffers.get("sliding_attention_inv_freq", right)
    try:  # reversed where there is one base, or heads of several widths
        angles.copy_(right.flip(0) if wrong is right or wrong.shape != right.shape else wrong)
        patterns = capture_state(case.vlm.adapter, case.inputs).patterns
    finally:
        angles.copy_(right)
    pairs = zip(patterns, case.replacement.state.patterns, strict=True)
    assert max(float((one.whole() - other.whole()).abs().max()) for one, other in pairs) > 1e-3
    layers = [dataclasses.replace(old, pattern=new) for old, new in zip(case.replacement.layers, patterns, strict=True)]
    state = dataclasses.replace(case.replacement.state, patterns=patterns)
    return dataclasses.replace(case.replacement, state=state, layers=layers)


def dropped_decoder_bias(case: Case) -> ReplacementModel:
    features = [dataclasses.replace(old, b_dec=torch.zeros_like(old.b_dec)) for old in case.replacement.features]
    return dataclasses.replace(case.replacement, features=features)


def dropped_attention_bias(case: Case) -> ReplacementModel:
    layers = [dataclasses.replace(old, value_bias=None) for old in case.replacement.layers]
    return dataclasses.replace(case.replacement, layers=layers)


def dropped_skip(case: Case) -> ReplacementModel:
    features = [dataclasses.replace(old, w_skip=None) for old in case.replacement.features]
    return dataclasses.replace(case.replacement, features=features)


def unscaled_embeddings(case: Case) -> ReplacementModel:
    state = case.replacement.state
    embeddings = state.embeddings.clone()
    embeddings[~torch.from_numpy(case.inputs.is_image)] /= case.vlm.adapter.d_model**0.5
    return dataclasses.replace(case.replacement, state=dataclasses.replace(state, embeddings=embeddings))


def k_ignored(case: Case) -> ReplacementModel:
    """Every positive pre-activation counts as active, though the errors were taken with TopK."""
    features = []
    for layer, mlp_in in enumerate(case.replacement.state.mlp_in):
        old = case.transcoders[layer]
        dense = Transcoder(dataclasses.replace(old.config, k=old.config.n_features), dtype=torch.float64)
        dense.load_state_dict(old.state_dict())
        features.append(active_features(dense, mlp_in))
    return dataclasses.replace(case.replacement, features=features, feature_activations=feature_table(features))


FAULTS = [
    wrong_rope_base,
    dropped_decoder_bias,
    dropped_attention_bias,
    dropped_skip,
    unscaled_embeddings,
    k_ignored,
]


def dropped_injections(case: Case) -> ReplacementModel:
    """DeepStack forgotten."""
    layers = [dataclasses.replace(old, injection=None) for old in case.replacement.layers]
    return dataclasses.replace(case.replacement, layers=layers)


def dropped_value_norm(case: Case) -> ReplacementModel:
    layers = [dataclasses.replace(old, value_scale=None) for old in case.replacement.layers]
    return dataclasses.replace(case.replacement, layers=layers)


def dropped_layer_constant(case: Case) -> ReplacementModel:
    layers = [dataclasses.replace(old, stream_scale=1.0) for old in case.replacement.layers]
    return dataclasses.replace(case.replacement, layers=layers)


def dropped_later_writes(case: Case) -> ReplacementModel:
    """Features of a cross-layer set taken for those of one layer."""
    features = [dataclasses.replace(old, w_later=()) for old in case.replacement.features]
    return dataclasses.replace(case.replacement, features=features)


def dropped_head(case: Case) -> ReplacementModel:
    """The second head of the first layer looks at nothing."""
    first, *rest = case.replacement.layers
    pattern = first.pattern.whole()
    pattern[1] = 0
    changed = dataclasses.replace(first, pattern=Pattern.of(pattern))
    return dataclasses.replace(case.replacement, layers=[changed, *rest])


FAMILY_FAULTS = [
    ("cross_layer", dropped_later_writes),
    ("cross_layer_text", dropped_later_writes),
    ("qwen3_vl", dropped_injections),
    ("gemma4", dropped_value_norm),
    ("gemma4", dropped_layer_constant),
]


@pytest.mark.parametrize(("name", "fault"), FAMILY_FAULTS)
def test_a_fault_in_what_some_cases_have_breaks_both_identities(
    name: str, fault: Fault, cases: dict[str, Case]
) -> None:
    with exact_float64():
        case = case_of(name, cases)
        subject = traced_anew(case, fault(case))
        for identity in (parity, completeness):
            found = identity(subject)
            assert found.failed, found
            assert found.error is not None and found.error > 1e4 * TOLERANCE, found


@pytest.mark.parametrize("name", ["paligemma2", "gemma4"])
def test_a_forgotten_cap_of_the_logits_is_found(name: str, cases: dict[str, Case]) -> None:
    with exact_float64():
        case = case_of(name, cases)
        assert case.replacement.logit_softcap is not None
        uncapped = dataclasses.replace(
            case.subject, replacement=dataclasses.replace(case.replacement, logit_softcap=None)
        )
        assert parity(uncapped).failed and direct_mode(uncapped).failed


def traced_anew(case: Case, faulty: ReplacementModel) -> Subject:
    """The edges are those of the faulty model too."""
    edges = find_edges(faulty, case.subject.limits)
    return dataclasses.replace(case.subject, replacement=faulty, edges=edges)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_both_identities(one_case: Case, fault: Fault) -> None:
    subject = traced_anew(one_case, fault(one_case))
    for identity in (parity, completeness):
        found = identity(subject)
        assert found.failed, found
        assert found.error is not None and found.error > 1e4 * TOLERANCE, found


@pytest.mark.parametrize(
    ("identity", "fault"),
    [
        (direct_effects, wrong_rope_base),
        (direct_effects, dropped_skip),
        (total_effects, wrong_rope_base),
        (total_effects, dropped_skip),
        (direct_mode, wrong_rope_base),
        (direct_mode, dropped_skip),
        (direct_mode, k_ignored),
        *(
            (identity, fault)
            for identity in (heads, scores)
            for fault in (dropped_head, dropped_skip, dropped_decoder_bias, dropped_attention_bias)
        ),
    ],
)
def test_a_fault_breaks_effects(one_case: Case, identity: Callable[[Subject], Check], fault: Fault) -> None:
    """Edges, scores and model of the right forward against a replacement model of a wrong one."""
    few = dataclasses.replace(one_case.subject.limits, sources=6, positions=4)  # one that shows it is enough
    found = identity(dataclasses.replace(one_case.subject, replacement=fault(one_case), limits=few))
    assert found.failed, found
    assert found.error is not None and found.error > 1e4 * TOLERANCE, found


@pytest.mark.parametrize(
    "wrong", [lambda rows, which: rows[which.argsort()], lambda rows, which: rows * (1 + 1e-9 * len(which))]
)
def test_rows_that_depend_on_order_or_batch_are_found(one_case: Case, monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    right = Adjoint.feature_rows
    monkeypatch.setattr(Adjoint, "feature_rows", lambda self, layer, which: wrong(right(self, layer, which), which))
    assert batching(one_case.subject).failed


@pytest.mark.parametrize("what", ["weight", "target", "residual", "nan"])
def test_a_single_wrong_number_of_the_graph_is_found(one_case: Case, what: str) -> None:
    edges = one_case.subject.edges
    node = one_case.subject.rows[7]
    weights, target, residual = edges.weights.copy(), edges.nodes.target.copy(), edges.residual.copy()
    if what == "target":
        target[node] += 1e-6 * one_case.subject.scale[7]
    elif what == "residual":
        residual[node] = 1e-6
    else:
        weights[edges.indptr[node]] += float("nan") if what == "nan" else 1e-6 * one_case.subject.scale[7]
    nodes = dataclasses.replace(edges.nodes, target=target)
    wrong = dataclasses.replace(edges, nodes=nodes, weights=weights, residual=residual)
    assert completeness(dataclasses.replace(one_case.subject, edges=wrong)).failed


def test_a_model_that_ignores_its_pictures_is_found(one_case: Case) -> None:
    subject = copied(one_case)
    assert soft_tokens(subject).held
    with torch.no_grad():
        # Where patches enter is a convolution, or Gemma 4's matrix.
        for name, module in subject.scope.vlm.model.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) or name.endswith("patch_embedder.input_proj"):
                module.weight.zero_()
    assert soft_tokens(dataclasses.replace(subject)).failed  # anew, since a subject keeps its logits


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["model", "transcoders"])
def test_empty_and_infinite_weights_are_found(one_case: Case, value: float, where: str) -> None:
    subject = copied(one_case)
    matrix = subject.scope.adapter.output_weight(1) if where == "model" else subject.scope.transcoders[1].W_dec
    with torch.no_grad():
        matrix.fill_(value) if value == 0 else matrix[:1, :1].fill_(value)
    assert weights(subject).error == 1


def test_edits_that_act_on_generated_tokens_unasked_are_found(one_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    right = run.edit_changes

    def wrong(
        transcoder: Transcoder, x: torch.Tensor, edit: LayerEdit, offset: int, code: SparseCode | None = None
    ) -> list[torch.Tensor]:
        return right(transcoder, x, edit, offset, code) if offset == 0 else [torch.full_like(x, 1e-3)]

    plain = generation(one_case.subject)
    monkeypatch.setattr(run, "edit_changes", wrong)
    assert plain.held
    assert generation(one_case.subject).failed


def copied(case: Case) -> Subject:
    """The same with a model and transcoders of its own, to be damaged."""
    return dataclasses.replace(case.subject, scope=in_float64(case.subject.scope))


def test_every_weight_is_non_zero(one_case: Case) -> None:
    for name, parameter in one_case.vlm.model.named_parameters():
        assert (parameter != 0).all(), name
