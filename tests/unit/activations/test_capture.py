"""Harvesting for training reads the same MLP inputs and outputs as the recorded forward that graphs are made of."""

from contextlib import nullcontext

import pytest
import torch

from vlmscope.activations import capture_mlp, capture_state, mlp_inputs
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import make_batch
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm

PROMPT = "what is this red planet ? describe it"
ALL = ("gemma3", "gemma3_text", *FAMILIES)


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
        fast, state = capture_mlp(vlm.adapter, inputs.tensors), capture_state(vlm.adapter, inputs)
        assert sorted(fast) == list(range(vlm.adapter.n_layers))
        for layer, (mlp_in, mlp_out) in fast.items():
            for found, recorded in ((mlp_in[0], state.mlp_in[layer]), (mlp_out[0], state.mlp_out[layer])):
                assert found.shape == recorded.shape and found.abs().max() > 0
                worst = max(worst, float((found - recorded).abs().max() / recorded.abs().max()))
    return worst


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-6), (torch.float64, 1e-9)])
@pytest.mark.parametrize("family", ALL)
def test_fast_capture_equals_the_recorded_forward(family: str, dtype: torch.dtype, most: float) -> None:
    with exact_float64() if dtype == torch.float64 else nullcontext():
        assert largest_gap(tiny_vlm(family, 3, dtype=dtype)) < most


@pytest.mark.parametrize("family", ALL)
def test_a_batch_is_captured_as_each_prompt_alone(family: str) -> None:
    vlm = tiny_vlm(family, 3)
    inputs = prepared(vlm)
    batch = make_batch(vlm.adapter, inputs)
    fast = capture_mlp(vlm.adapter, batch.tensors)
    layers = range(vlm.adapter.n_layers)
    read = mlp_inputs(vlm.adapter, batch, layers)
    for row, one in enumerate(inputs):
        state = capture_state(vlm.adapter, one)
        for layer in layers:
            assert torch.allclose(fast[layer][0][row], state.mlp_in[layer], rtol=0, atol=1e-5)
            assert torch.allclose(fast[layer][1][row], state.mlp_out[layer], rtol=0, atol=1e-5)
            assert torch.equal(read[layer], fast[layer][0])
