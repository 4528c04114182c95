"""Decoders beside the families' own, and Gemma-3-4B-it: every shape on `meta`, every identity at two layers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4ForCausalLM,
)
from transformers.models.gemma3 import modeling_gemma3

from vlmscope.activations import capture_state
from vlmscope.conformance import Limits, run_cases
from vlmscope.models.base import DECODERS, Adapter, ModelInputs, exact_float64
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import randomise, tiny_gemma3, tiny_image, tiny_vlm
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.tasks.check import failures
from vlmscope.tasks.plan import attention_widths, empty_model, find_config, state_elements
from vlmscope.transcoders.transcoder import random_set

OWN_FAMILY = {"qwen2_5_vl_text", "qwen3_vl_text"}  # need the positions that their own family makes
PROMPT = "what is this red planet ?"


def finished(model: Any, processor: Any) -> VLM:
    model = model.to(torch.float64).eval().requires_grad_(False)
    randomise(model, 2)
    return VLM(model, processor, adapter_for(model), "changed")


def assert_exact(vlm: VLM, images: list) -> None:
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 5, skip=True, seed=4, dtype=torch.float64)
    with exact_float64(), torch.no_grad():
        inputs = vlm.prepare(PROMPT, images)
        logits = vlm.model(**inputs.tensors).logits[0]
        replacement = build_replacement(Scope(vlm, transcoders), inputs)
        replayed = replacement.capped(replacement.replay().logits)
    assert (replayed - logits).abs().max() <= 1e-9 * logits.abs().max()


@pytest.mark.parametrize("kind", sorted(set(DECODERS) - OWN_FAMILY))
def test_a_decoder_of_the_table_is_exact_under_llavas_pictures(kind: str) -> None:
    llava = tiny_vlm("llava")
    config = llava.model.config
    text = {**config.text_config.to_dict(), "sliding_window": 6, "query_pre_attn_scalar": 8}
    for name in ("architectures", "layer_types", "rope_parameters", "model_type"):
        text.pop(name, None)
    config.text_config = AutoConfig.for_model(kind, **text)
    vlm = finished(AutoModelForImageTextToText.from_config(config), llava.processor)
    assert vlm.model.config.get_text_config().model_type == kind
    assert_exact(vlm, [tiny_image(0)])


def test_gemma_4_for_text_alone_is_exact() -> None:
    pictured = tiny_vlm("gemma4")
    vlm = finished(Gemma4ForCausalLM(pictured.model.config.text_config), pictured.tokenizer)
    assert not vlm.adapter.has_vision and vlm.adapter.logit_softcap == 2.0
    assert_exact(vlm, [])


LAYERS, D, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 34, 2560, 8, 4, 256, 262_208
SOFT, T = 256, 320


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return adapter_for(empty_model(find_config("google/gemma-3-4b-it"), torch.bfloat16))


def test_the_adapter_reads_the_published_numbers(adapter: Adapter) -> None:
    assert sum(parameter.numel() for parameter in adapter.model.parameters()) == 4_300_079_472
    assert (adapter.n_layers, adapter.d_model, adapter.n_heads, adapter.vocab_size) == (LAYERS, D, HEADS, VOCAB)
    assert attention_widths(adapter) == (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    assert (adapter.dtype, adapter.device, adapter.has_vision) == (torch.bfloat16, torch.device("meta"), True)
    assert (adapter.logit_softcap, adapter.soft_token_id()) == (None, 262_144)
    text = adapter.model.config.text_config
    full = [layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention"]
    assert (full, text.sliding_window) == ([5, 11, 17, 23, 29], 1024)
    local, whole = (text.rope_parameters[f"{kind}_attention"] for kind in ("sliding", "full"))
    assert (local["rope_theta"], whole["rope_theta"], whole["factor"]) == (10_000.0, 1_000_000.0, 8.0)
    for layer in range(LAYERS):
        assert adapter.value_weight(layer).shape == (KV_HEADS * HEAD_DIM, D)
        assert adapter.output_weight(layer).shape == (D, HEADS * HEAD_DIM)
        assert adapter.value_bias(layer) is None and adapter.output_bias(layer) is None
        assert [norm is not None and norm.get_parameter("weight").shape for norm in adapter.norms(layer)] == [(D,)] * 4
    assert adapter.lm_head().weight.shape == (VOCAB, D) and adapter.lm_head().bias is None
    assert [len(each) for each in adapter.soft_token_boxes({}, [(640, 480)], None)] == [SOFT]


def test_every_sites_shape(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one look at data in the forward: does the number of soft tokens fit the pictures? `meta` has no data.
    monkeypatch.setattr(modeling_gemma3, "torch_compilable_check", lambda *_, **__: None)
    ids = torch.full((1, T), 5)
    ids[0, 5 : 5 + SOFT] = 262_144  # one picture and 64 text tokens
    is_image = (ids[0] == 262_144).numpy()
    tensors = {name: torch.ones(1, T, dtype=torch.long, device="meta") for name in ("attention_mask", "token_type_ids")}
    tensors |= {
        "input_ids": ids.to("meta"),
        "pixel_values": torch.empty(1, 3, 896, 896, dtype=torch.bfloat16).to("meta"),
    }
    image_index, roles = np.where(is_image, 0, -1), np.array(["special"] * T)
    state = capture_state(adapter, ModelInputs(tensors, ["x"] * T, is_image, image_index, [None] * T, roles, ""))
    sites = {name: tensor for name, tensor in vars(state).items() if isinstance(tensor, Tensor)}
    sites["patterns"] = torch.stack([pattern.whole() for pattern in state.patterns])
    assert {name: tuple(tensor.shape) for name, tensor in sites.items()} == {
        "embeddings": (T, D),
        "patterns": (LAYERS, HEADS, T, T),
        "mlp_in": (LAYERS, T, D),
        "mlp_out": (LAYERS, T, D),
        "norm_scales": (LAYERS, 4, T, D),
        "final_norm_scale": (T, D),
        "logits": (T, VOCAB),
        "injections": (0, T, D),
    }
    assert state.value_scales == [None] * LAYERS
    assert all(tensor.dtype == torch.bfloat16 and tensor.is_meta for tensor in sites.values())
    assert state_elements(adapter, T) == {**{n: t.numel() for n, t in sites.items()}, "value_scales": 0}


def test_its_config_at_two_layers_keeps_every_identity() -> None:
    """The published config with two layers, the first sliding and the second full, and a tiny model's processor."""
    tiny = tiny_gemma3(1)
    theirs, config = tiny.model.config, copy.deepcopy(find_config("google/gemma-3-4b-it"))
    ids = {
        key: getattr(theirs.text_config, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6, "query_pre_attn_scalar": 8}
    config["text_config"] |= {**small, **layers, **ids}
    config["vision_config"] |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config["vision_config"] |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    for key in ("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"):
        config[key] = getattr(theirs, key)
    vlm = finished(Gemma3ForConditionalGeneration._from_config(Gemma3Config.from_dict(config)), tiny.processor)
    text = vlm.model.config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (HEADS, KV_HEADS)
    assert text.rope_parameters["full_attention"]["factor"] == 8.0
    transcoders = random_set(2, vlm.adapter.d_model, 64, 4, skip=True, dtype=torch.float64)
    limits = Limits(targets=5000, sources=6, positions=4, new_tokens=3)
    reports = list(run_cases(Scope(vlm, transcoders), PROMPT, [tiny_image(1), tiny_image(2)], limits))
    assert [report.case for report in reports] == ["text", "one_picture", "two_pictures"]
    assert not failures(reports)
    held = [check for report in reports for check in report.exact]
    assert len(held) == 33 and sum(check.error is not None for check in held) >= 20
