"""What is not exact, or not a model, is refused by name in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    PhiConfig,
)

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.core.errors import UserError
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import load_vlm
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.init import random_set


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mllama", "cross-attention"),
        ("gemma3n", "per-layer embeddings and AltUp"),
        ("qwen3_vl_moe", "mixture-of-experts"),
        ("llama4", "mixture-of-experts"),
        ("made_up", "not supported"),
    ],
)
def test_families_are_refused_by_name(tmp_path: Path, model_type: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=f"{model_type!r}.*{reason}.*choose one of: gemma3, ") as error:
        load_vlm(tmp_path)
    assert "\n" not in str(error.value)


def _llava(text: object) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)


def test_decoders_with_parallel_blocks_are_refused() -> None:
    phi = PhiConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_llava(phi))
    with pytest.raises(UserError, match="decoder of type 'phi', which is not known to be exact here"):
        adapter_for(model)


def test_a_model_without_a_head_is_refused() -> None:
    headless = tiny_vlm("llava").model.model
    assert isinstance(headless, LlavaModel)
    with pytest.raises(UserError, match="LlavaModel has no language-model head"):
        adapter_for(headless)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"hidden_size_per_layer_input": 4},
            r"per-layer embeddings, as in E2B and E4B \(hidden_size_per_layer_input = 4\)",
        ),
        ({"num_kv_shared_layers": 1}, "layers that reuse keys and values of earlier ones"),
        (
            {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 4},
            "mixture-of-experts MLPs, as in 26B-A4B",
        ),
    ],
)
def test_parts_of_gemma_4_are_refused_by_name(changes: dict[str, Any], part: str) -> None:
    config = copy.deepcopy(tiny_vlm("gemma4").model.config)
    text = {**config.text_config.to_dict(), **changes}
    config.text_config = type(config.text_config)(**text)
    with torch.device("meta"):
        model = Gemma4ForConditionalGeneration(config)
    with pytest.raises(UserError, match=f"{part}.*choose a dense Gemma 4"):
        adapter_for(model)


def test_a_decoder_that_needs_its_own_adapter_is_refused_elsewhere() -> None:
    text = tiny_vlm("gemma4").model.config.text_config
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(_llava(text))
    with pytest.raises(UserError, match="decoder of type 'gemma4_text'"):
        adapter_for(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_no_dtype_for_edges(dtype: str) -> None:
    vlm = tiny_vlm("gemma3_text", dtype=getattr(torch, dtype))
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 8, 2, dtype=vlm.adapter.dtype)
    inputs = vlm.prepare("what is this ?")
    with pytest.raises(UserError, match=f"in {dtype}, which has too few digits; set attribution.dtype=float32"):
        trace(Scope(vlm, transcoders), inputs, AttributionConfig(dtype="model"))
    traced = trace(Scope(vlm, transcoders), inputs, AttributionConfig())
    assert traced.replacement.errors.dtype == torch.float32
    # A graph in float32 of a forward that was rounded says so: its edges miss the model's own numbers by that much.
    assert 1e-4 < traced.graph.residual.max() < 0.05


def test_a_forward_that_overflows_is_told() -> None:
    vlm = tiny_vlm("gemma3_text", dtype=torch.float16)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 8, 2, dtype=vlm.adapter.dtype)
    inputs = vlm.prepare("what is this ?")
    vlm.adapter.norms(1).mlp_out_post.weight.fill_(60000.0)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(UserError, match="not finite in float16: .* try model.dtype=bfloat16 or float32"):
        trace(Scope(vlm, transcoders), inputs, AttributionConfig())


def test_a_bare_soft_token_in_a_prompt_is_refused() -> None:
    with pytest.raises(UserError, match=r"write <\|vision_start\|><\|image_pad\|><\|vision_end\|> once for each"):
        tiny_vlm("qwen2_5_vl").prepare("what is <|image_pad|> this ?", [tiny_image(0)])


def test_paligemma_wants_a_picture() -> None:
    with pytest.raises(UserError, match="give at least one"):
        tiny_vlm("paligemma").prepare("what is this ?")


def test_an_unknown_tiny_family_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="no tiny model of type 'gpt'; choose one of: gemma3, gemma3_text, "):
        tiny_vlm("gpt")
