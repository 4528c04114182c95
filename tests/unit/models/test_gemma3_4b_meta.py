"""Gemma-3-4B-it in parts: the full model's shapes on `meta`, and its config at two small layers with real numbers."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.gemma3 import modeling_gemma3

from vlmscope.activations.capture import capture_state
from vlmscope.conformance import Limits, run_cases
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.sizes import attention_widths, empty_model, find_config, state_elements
from vlmscope.models.tiny import randomise, tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.tasks.check import failures
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet, random_set

LAYERS, D, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 34, 2560, 8, 4, 256, 262_208
SOFT, T = 256, 320


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return adapter_for(empty_model(find_config("google/gemma-3-4b-it"), torch.bfloat16))


def meta_inputs() -> ModelInputs:
    """One picture and 64 text tokens, as shapes."""
    ids = torch.full((1, T), 5)
    ids[0, 5 : 5 + SOFT] = 262_144
    is_image = (ids[0] == 262_144).numpy()
    tensors: dict[str, Tensor] = {
        "input_ids": ids.to("meta"),
        "attention_mask": torch.ones(1, T, dtype=torch.long, device="meta"),
        "token_type_ids": torch.ones(1, T, dtype=torch.long, device="meta"),
        "pixel_values": torch.empty(1, 3, 896, 896, dtype=torch.bfloat16, device="meta"),
    }
    return ModelInputs(
        tensors, ["x"] * T, is_image, np.where(is_image, 0, -1), [None] * T, np.array(["special"] * T), ""
    )


def test_the_adapter_reads_the_published_numbers(adapter: Adapter) -> None:
    assert sum(parameter.numel() for parameter in adapter.model.parameters()) == 4_300_079_472
    found = (adapter.n_layers, adapter.d_model, adapter.n_heads, adapter.vocab_size)
    assert found == (LAYERS, D, HEADS, VOCAB)
    assert attention_widths(adapter) == (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
    assert (adapter.dtype, adapter.device, adapter.has_vision) == (torch.bfloat16, torch.device("meta"), True)
    assert (adapter.logit_softcap, adapter.soft_token_id()) == (None, 262_144)
    text = adapter.model.config.text_config
    full = [layer for layer, kind in enumerate(text.layer_types) if kind == "full_attention"]
    assert (full, text.sliding_window) == ([5, 11, 17, 23, 29], 1024)
    rope = text.rope_parameters
    assert (rope["sliding_attention"]["rope_theta"], rope["sliding_attention"]["rope_type"]) == (10_000.0, "default")
    assert (rope["full_attention"]["rope_theta"], rope["full_attention"]["factor"]) == (1_000_000.0, 8.0)


def test_every_sites_shape(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    # The one look at data in the forward: does the number of soft tokens fit the pictures? `meta` has no data.
    monkeypatch.setattr(modeling_gemma3, "torch_compilable_check", lambda *_, **__: None)
    state = capture_state(adapter, meta_inputs())
    tensors = {name: tensor for name, tensor in vars(state).items() if isinstance(tensor, Tensor)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
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
    assert all(tensor.dtype == torch.bfloat16 and tensor.is_meta for tensor in tensors.values())
    elements = {name: tensor.numel() for name, tensor in tensors.items()}
    assert state_elements(adapter, T) == {**elements, "value_scales": 0}


def test_every_weight_that_attribution_reads(adapter: Adapter) -> None:
    for layer in range(LAYERS):
        assert adapter.value_weight(layer).shape == (KV_HEADS * HEAD_DIM, D)
        assert adapter.output_weight(layer).shape == (D, HEADS * HEAD_DIM)
        assert adapter.value_bias(layer) is None and adapter.output_bias(layer) is None
        norms = list(adapter.norms(layer))
        assert len(norms) == 4 and all(
            norm is not None and norm.get_parameter("weight").shape == (D,) for norm in norms
        )
    assert adapter.lm_head().weight.shape == (VOCAB, D) and adapter.lm_head().bias is None
    assert adapter.norm_scale(adapter.final_norm(), torch.empty(T, D, device="meta")).shape == (T, D)
    boxes = adapter.soft_token_boxes({}, [(640, 480)], None)
    assert [len(each) for each in boxes] == [SOFT]


def paper(features: int) -> dict[str, tuple[int, ...]]:
    """`layer_{i}.safetensors` of the paper's per-layer transcoders (arXiv 2602.20330) and of circuit-tracer."""
    return {"W_enc": (features, D), "W_dec": (features, D), "b_enc": (features,), "b_dec": (D,), "W_skip": (D, D)}


def gemma_scope_2(features: int) -> dict[str, tuple[int, ...]]:
    """`transcoder_all/layer_{L}_width_*_l0_*_affine/params.safetensors`; encoder and skip are stored (in, out)."""
    return {
        "w_enc": (D, features),
        "w_dec": (features, D),
        "b_enc": (features,),
        "b_dec": (D,),
        "threshold": (features,),
        "affine_skip_connection": (D, D),
    }


def meta_set(features: int, *, skip: bool, output_hook: str = "mlp_out") -> TranscoderSet:
    def one(layer: int) -> Transcoder:
        config = TranscoderConfig(D, features, 48, layer, skip=skip, output_hook=output_hook)
        return Transcoder(config, dtype=torch.bfloat16, device="meta")

    return TranscoderSet({layer: one(layer) for layer in range(LAYERS)}, TranscoderSetConfig(LAYERS, 48))


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_have_the_papers_layout(adapter: Adapter, skip: bool) -> None:
    features = 16 * D
    transcoders = meta_set(features, skip=skip)
    expected = {name: shape for name, shape in paper(features).items() if skip or name != "W_skip"}
    for layer in range(adapter.n_layers):
        found = {name: tuple(parameter.shape) for name, parameter in transcoders[layer].named_parameters()}
        assert found == expected
    x = torch.empty(T, adapter.d_model, dtype=torch.bfloat16, device="meta")
    output = transcoders[0](x)
    assert output.pre.shape == (T, features) and output.reconstruction.shape == (T, D)
    assert output.code.indices.shape == output.code.values.shape == (T, 48)


@pytest.mark.parametrize("features", [16_384, 262_144])
def test_transcoders_have_room_for_gemma_scope_2(features: int) -> None:
    transcoder = meta_set(features, skip=True, output_hook="mlp_out_post")[33]
    published = gemma_scope_2(features)
    assert tuple(transcoder.W_enc.T.shape) == published["w_enc"]
    assert tuple(transcoder.W_dec.shape) == published["w_dec"]
    assert tuple(transcoder.b_enc.shape) == published["b_enc"] == published["threshold"]
    assert tuple(transcoder.b_dec.shape) == published["b_dec"]
    assert transcoder.W_skip is not None and tuple(transcoder.W_skip.T.shape) == published["affine_skip_connection"]


# What is made smaller, and the ids that go with a small vocabulary; everything else stays as published.
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def shrunk() -> tuple[dict[str, Any], VLM]:
    """The published config with two layers, the first sliding and the second full, and a tiny model's processor."""
    tiny = tiny_gemma3(1)
    ours, theirs = copy.deepcopy(find_config("google/gemma-3-4b-it")), tiny.model.config
    layer_types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
    ids = {
        key: getattr(theirs.text_config, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    ours["text_config"] |= {**_TEXT, **layer_types, **ids}
    ours["vision_config"] |= {
        **_VISION,
        **{key: getattr(theirs.vision_config, key) for key in ("image_size", "patch_size")},
    }
    for key in ("mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index"):
        ours[key] = getattr(theirs, key)
    return ours, tiny


def test_its_config_at_two_layers_keeps_every_identity() -> None:
    config, tiny = shrunk()
    model = Gemma3ForConditionalGeneration._from_config(Gemma3Config.from_dict(config)).double()
    randomise(model, 4)
    model.eval().requires_grad_(False)
    vlm = VLM(model, tiny.processor, adapter_for(model), name="gemma-3-4b-it, two layers")
    text = model.config.text_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (HEADS, KV_HEADS)
    assert text.rope_parameters["full_attention"]["factor"] == 8.0
    transcoders = random_set(2, vlm.adapter.d_model, 64, 4, skip=True, dtype=torch.float64)
    limits = Limits(targets=5000, sources=6, positions=4, new_tokens=3)
    reports = list(run_cases(Scope(vlm, transcoders), "what is this planet ?", [tiny_image(1), tiny_image(2)], limits))
    assert [report.case for report in reports] == ["text", "one_picture", "two_pictures"]
    assert not failures(reports)
    held = [check for report in reports for check in report.exact]
    assert len(held) == 27 and sum(check.error is not None for check in held) >= 20
