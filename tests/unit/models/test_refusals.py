"""What is not exact, or not a model, is refused by name in one line."""

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vlmscope.activations import mlp_inputs_and_logits
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.trace import trace
from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document, Exchange
from vlmscope.features.readouts import token_lens
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import base_run, generate_batch, generate_edited, run_edited
from vlmscope.models.batching import encode, greedy_answer
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import load_vlm
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mllama", "cross-attention"),
        ("gemma3n", "per-layer embeddings and AltUp"),
        ("qwen3_vl_moe", "mixture-of-experts"),
        ("made_up", "not supported"),
    ],
)
def test_families_are_refused_by_name(tmp_path: Path, model_type: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UserError, match=f"{model_type!r}.*{reason}.*choose one of: gemma3, "):
        load_vlm(tmp_path)
    with pytest.raises(UserError, match="no tiny model of type 'mllama'; choose one of: gemma3, gemma3_text, "):
        tiny_vlm("mllama")


@pytest.mark.parametrize("kind", ["phi", "gemma4_text"])
def test_decoders_that_are_not_exact_elsewhere_are_refused(kind: str) -> None:
    llava = tiny_vlm("llava").model
    text = tiny_vlm("gemma4").model.config.text_config
    if kind == "phi":  # parallel blocks
        text = transformers.PhiConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    config = transformers.LlavaConfig(text_config=text, vision_config=llava.config.vision_config, image_token_index=3)
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(UserError, match=f"decoder of type '{kind}', which is not known to be exact here"):
        adapter_for(model)
    with pytest.raises(UserError, match="LlavaModel has no language-model head"):
        adapter_for(llava.model)


EXPERTS = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 4}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hidden_size_per_layer_input": 4}, r"per-layer embeddings, .* \(hidden_size_per_layer_input = 4\)"),
        ({"num_kv_shared_layers": 1}, "layers that reuse keys and values of earlier ones"),
        (EXPERTS, "mixture-of-experts MLPs, as in 26B-A4B"),
    ],
)
def test_parts_of_gemma_4_are_refused_by_name(changes: dict[str, Any], part: str) -> None:
    config = copy.deepcopy(tiny_vlm("gemma4").model.config)
    config.text_config = type(config.text_config)(**{**config.text_config.to_dict(), **changes})
    with torch.device("meta"):
        model = transformers.Gemma4ForConditionalGeneration(config)
    with pytest.raises(UserError, match=f"{part}.*choose a dense Gemma 4"):
        adapter_for(model)


def half_precision(dtype: torch.dtype) -> Scope:
    vlm = tiny_vlm("gemma3_text", dtype=dtype)
    return Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 8, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_dtype_for_edges(dtype: torch.dtype) -> None:
    scope = half_precision(dtype)
    inputs = scope.inputs("what is this ?")
    with pytest.raises(UserError, match="float16, which has too few digits; set attribution.dtype=float32"):
        trace(scope, inputs, AttributionConfig(dtype="model"))
    traced = trace(scope, inputs, AttributionConfig())
    assert traced.replacement.errors.dtype == torch.float32
    # A graph in float32 of a forward that was rounded says so: its edges miss the model's own numbers by that much.
    assert 1e-4 < traced.graph.residual.max() < 0.05


def test_a_forward_that_overflows_is_told() -> None:
    scope = half_precision(torch.float16)
    adapter, inputs = scope.adapter, scope.inputs("what is this ?")
    adapter._layer(1).post_feedforward_layernorm.weight.fill_(60000.0)
    batch = scope.batch([inputs])
    where = torch.ones(len(inputs), dtype=torch.bool)
    plan = {1: LayerEdit(torch.tensor([3]), torch.zeros(1), torch.ones(1), where, torch.zeros(1))}
    for read in (
        lambda: trace(scope, inputs, AttributionConfig()),
        lambda: greedy_answer(adapter, inputs, 2),
        lambda: generate_edited(scope, inputs),
        lambda: generate_batch(adapter, [inputs, inputs], 2),
        lambda: token_lens(adapter, batch, np.array([1]), [5]),
        lambda: base_run(scope, batch),
        lambda: run_edited(scope, batch, plan),
        lambda: mlp_inputs_and_logits(adapter, batch, [0]),
    ):
        with pytest.raises(UserError, match="not finite in float16: .* try model.dtype=bfloat16 or float32"):
            read()


# What transformers' processors and tokenizers raise a ValueError or TypeError of, and what is refused here:
# family, said, picture's size, reason.
RAISED = [
    ("llava_onevision", "what is <video> this", (16, 16), "Found 1 <video> tokens"),
    ("internvl", "what is <video> this", (16, 16), "Found 1 <video> tokens"),
    ("qwen2_5_vl", "what is <|video_pad|> this", (16, 16), "Found 1 <|video_pad|> tokens"),
    ("gemma4", "what is <|audio|> this", (16, 16), "Found 1 <|audio|> tokens"),
    ("qwen3_vl", "what is this", (2, 3000), "picture of 2 x 3000 pixels.*aspect ratio must be smaller than 200"),
    ("qwen2_5_vl", "what is <|image_pad|> this", (16, 16), "write .*image_pad.* once for each picture"),
    ("gemma3", "what is <image_soft_token> this", (16, 16), "write <start_of_image> once for each picture"),
    ("gemma3", "what \ud800 is this", (16, 16), r"'\\ud800' at character 6"),
    ("gemma3_text", "caf\udce9", None, r"'\\udce9' at character 4"),
    ("paligemma", "caf\udce9", (16, 16), r"'\\udce9' at character 4"),
]


@pytest.mark.parametrize(("family", "said", "size", "reason"), RAISED)
def test_what_a_processor_raises_is_one_line_that_names_its_input(
    family: str, said: str, size: tuple[int, int] | None, reason: str
) -> None:
    vlm = tiny_vlm(family, 5)
    pictures = () if size is None else (Image.new("RGB", size),)
    ours = "character" in reason or "write" in reason
    with pytest.raises(UserError, match=reason if ours else f"'{said[:7]}.*{reason}"):
        vlm.prepare(said, pictures)
    anywhere = reason.partition(" at character")[0]  # of the whole conversation
    for exchange in (Exchange(said, "red"), Exchange("what is this", said)):
        with pytest.raises(UserError, match=f"^line 4: .*{anywhere}"):
            encode(vlm, Conversation(pictures, (exchange,), "line 4"))
    if "character" in reason and not vlm.adapter.needs_pictures:
        with pytest.raises(UserError, match=f"^line 5: .*{reason}"):
            encode(vlm, Document(said, "line 5"))


def test_memory_is_not_blamed_on_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = tiny_vlm("llava", 5)
    monkeypatch.setattr(type(vlm.processor), "__call__", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        vlm.prepare("what is this", [tiny_image(0)])
