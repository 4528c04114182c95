"""Harvesting for training reads the same MLP inputs and outputs as the recorded forward that graphs are made of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmscope.activations.capture import capture_mlp, capture_state, mlp_inputs
from vlmscope.models.attention import IMPLEMENTATION, recording_patterns
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import make_batch
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_gemma3, tiny_image, tiny_vlm

PROMPT = "what is this red planet ? describe it"
ALL = ("gemma3", "gemma3_text", *FAMILIES)
OWN = {"paligemma2": "eager"}  # Hugging Face's choice: it has no fused kernel for Gemma 2's cap on scores


def prepared(vlm: VLM) -> list:
    """Two prompts of equal length, with pictures where the model takes them."""
    pictures = [[tiny_image(n)] if vlm.adapter.has_vision else [] for n in range(2)]
    return [
        vlm.prepare(PROMPT.replace("red", color), found) for color, found in zip(("red", "one"), pictures, strict=True)
    ]


def largest_gap(vlm: VLM) -> float:
    """Fast against recorded, of inputs and outputs of every layer, relative to the layer's largest number."""
    worst = 0.0
    for inputs in prepared(vlm):
        fast, state = capture_mlp(vlm, inputs.tensors), capture_state(vlm, inputs)
        assert sorted(fast) == list(range(vlm.adapter.n_layers))
        for layer, (mlp_in, mlp_out) in fast.items():
            for found, recorded in ((mlp_in[0], state.mlp_in[layer]), (mlp_out[0], state.mlp_out[layer])):
                assert found.shape == recorded.shape and found.abs().max() > 0
                worst = max(worst, float((found - recorded).abs().max() / recorded.abs().max()))
    return worst


@pytest.mark.parametrize("family", ALL)
def test_fast_capture_equals_the_recorded_forward(family: str) -> None:
    vlm = tiny_vlm(family, 3)
    assert largest_gap(vlm) < 5e-6


@pytest.mark.parametrize("family", ALL)
def test_fast_capture_equals_the_recorded_forward_in_float64(family: str) -> None:
    with exact_float64():
        assert largest_gap(tiny_vlm(family, 3, dtype=torch.float64)) < 1e-9


def test_a_capture_of_another_prompt_or_attention_would_be_found() -> None:
    vlm = tiny_gemma3(3)
    one, other = prepared(vlm)
    fast, state = capture_mlp(vlm, one.tensors), capture_state(vlm, other)
    assert (fast[3][0][0] - state.mlp_in[3]).abs().max() > 1e-2
    ids = dict(one.tensors, token_type_ids=torch.zeros_like(one.tensors["token_type_ids"]))  # soft tokens causal too
    assert (capture_mlp(vlm, ids)[3][0] - fast[3][0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ALL)
def test_a_batch_is_captured_as_each_prompt_alone(family: str) -> None:
    vlm = tiny_vlm(family, 3)
    inputs = prepared(vlm)
    batch = make_batch(vlm.adapter, inputs)
    fast = capture_mlp(vlm, batch.tensors)
    layers = range(vlm.adapter.n_layers)
    read = mlp_inputs(vlm.adapter, batch, layers)
    for row, one in enumerate(inputs):
        state = capture_state(vlm, one)
        for layer in layers:
            assert torch.allclose(fast[layer][0][row], state.mlp_in[layer], rtol=0, atol=1e-5)
            assert torch.allclose(fast[layer][1][row], state.mlp_out[layer], rtol=0, atol=1e-5)
            assert torch.equal(read[layer], fast[layer][0])


@contextmanager
def seen_in_attention(vlm: VLM) -> Iterator[list[tuple[str, Any]]]:
    """The implementation that each attention module's config names while it runs, and the pattern that it returns."""
    adapter = vlm.adapter
    seen: list[tuple[str, Any]] = []

    def hook(module: Any, _args: Sequence[Any], output: Any) -> None:
        seen.append((module.config._attn_implementation, output[1]))

    handles = [adapter.attention(layer).register_forward_hook(hook) for layer in range(adapter.n_layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", ALL)
def test_fast_capture_leaves_the_models_own_attention_in_place(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_vlm(family, 3)
    n_layers, inputs = vlm.adapter.n_layers, prepared(vlm)[0]
    calls: list[Tensor] = []
    right = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0])
        return right(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with seen_in_attention(vlm) as seen:
        capture_mlp(vlm, inputs.tensors)
    own, fused = OWN.get(family, "sdpa"), family not in OWN
    assert [name for name, _ in seen] == [own] * n_layers
    assert all((pattern is None) == fused for _, pattern in seen)  # a fused kernel makes no pattern
    # Heads may be wider in some layers than in others.
    widths = [vlm.adapter.output_weight(layer).shape[1] // vlm.adapter.n_heads for layer in range(n_layers)]
    decoder_heads = {(1, vlm.adapter.n_heads, len(inputs), width) for width in widths}
    assert sum(tuple(query.shape) in decoder_heads for query in calls) >= n_layers * fused

    calls.clear()
    with seen_in_attention(vlm) as seen:
        capture_state(vlm, inputs)
    assert [name for name, _ in seen] == [IMPLEMENTATION] * n_layers
    assert all(pattern.shape[-2:] == (len(inputs), len(inputs)) for _, pattern in seen)
    assert not any(tuple(query.shape) in decoder_heads for query in calls)
    assert vlm.adapter.model.config.get_text_config()._attn_implementation == own


def test_fast_capture_uses_what_the_model_was_loaded_with() -> None:
    vlm = tiny_gemma3(3, attention="eager")
    with seen_in_attention(vlm) as seen:
        capture_mlp(vlm, prepared(vlm)[0].tensors)
    assert {name for name, _ in seen} == {"eager"}


def test_capture_takes_its_hooks_away() -> None:
    vlm = tiny_gemma3(3)
    inputs = prepared(vlm)[0]
    capture_mlp(vlm, inputs.tensors)
    capture_state(vlm, inputs)
    with recording_patterns(vlm.adapter) as patterns:
        pass
    assert not patterns
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vlm.model.modules())
