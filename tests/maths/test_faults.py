"""Deliberate faults: each must break the identities, or these would prove nothing."""

import dataclasses

import pytest
import torch
from tests.maths.maths_cases import PROMPT, TOLERANCE, Case, config

from vlmscope.activations.capture import capture_state
from vlmscope.attribution.trace import attribute
from vlmscope.models.tiny import tiny_image
from vlmscope.replacement.features import active_features, feature_table
from vlmscope.replacement.model import ReplacementModel
from vlmscope.transcoders.transcoder import Transcoder


def wrong_rope_base(case: Case) -> ReplacementModel:
    """Patterns of a model that turns queries and keys by other angles; in Gemma 3 full layers by the sliding base's."""
    rotary = case.vlm.adapter.decoder().get_submodule("rotary_emb")
    buffers = dict(rotary.named_buffers())
    angles = buffers.get("full_attention_inv_freq", buffers.get("inv_freq"))
    assert angles is not None
    right = angles.clone()
    try:
        angles.copy_(buffers.get("sliding_attention_inv_freq", right.flip(0)))
        patterns = capture_state(case.vlm, case.inputs).patterns
    finally:
        angles.copy_(right)
    assert (patterns - case.replacement.state.patterns).abs().max() > 1e-3
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


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_both_identities(one_case: Case, fault) -> None:
    faulty = fault(one_case)
    logits = one_case.replacement.state.logits
    assert (faulty.replay().logits - logits).abs().max() > 1e-3 * logits.abs().max()
    graph = attribute(faulty, config(), one_case.vlm.tokenizer)
    assert graph.residual.max() > 1e4 * TOLERANCE


def test_another_picture_moves_the_logits(one_case: Case) -> None:
    other = one_case.vlm.prepare(PROMPT, [tiny_image(99)])
    assert other.input_ids == one_case.inputs.input_ids
    with torch.no_grad():
        logits = one_case.vlm.model(**other.tensors).logits[0, -1]
    assert (logits - one_case.replacement.state.logits[-1]).abs().max() > 1e-2


def test_every_weight_is_non_zero(one_case: Case) -> None:
    for name, parameter in one_case.vlm.model.named_parameters():
        assert (parameter != 0).all(), name
