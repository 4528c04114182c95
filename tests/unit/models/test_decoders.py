"""Every decoder in the table, under LLaVA's pictures: the replacement model gives Hugging Face's logits."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma4ForCausalLM

from vlmscope.core.errors import UserError
from vlmscope.models.base import DECODERS, exact_float64
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import randomise, tiny_image, tiny_vlm
from vlmscope.replacement.model import build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

OWN_FAMILY = {"qwen2_5_vl_text", "qwen3_vl_text"}  # need the positions that their own family makes


@pytest.mark.parametrize("kind", sorted(set(DECODERS) - OWN_FAMILY))
def test_a_decoder_of_the_table_is_exact(kind: str) -> None:
    llava = tiny_vlm("llava")
    config = llava.model.config
    text = {**config.text_config.to_dict(), "model_type": kind, "sliding_window": 6, "query_pre_attn_scalar": 8}
    for name in ("architectures", "layer_types", "rope_parameters"):
        text.pop(name, None)
    config.text_config = AutoConfig.for_model(text.pop("model_type"), **text)
    model = AutoModelForImageTextToText.from_config(config).to(torch.float64).eval().requires_grad_(False)
    randomise(model, 2)
    vlm = VLM(model, llava.processor, adapter_for(model), "swapped")
    adapter = vlm.adapter
    assert vlm.model.config.get_text_config().model_type == kind
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 5, skip=True, seed=4, dtype=torch.float64)
    with exact_float64(), torch.no_grad():
        inputs = vlm.prepare("what is this red planet ?", [tiny_image(0)])
        logits = model(**inputs.tensors).logits[0]
        replayed = build_replacement(Scope(vlm, transcoders), inputs).replay().logits
    assert (replayed - logits).abs().max() <= 1e-9 * logits.abs().max()


def test_gemma_4_for_text_alone_is_exact() -> None:
    pictured = tiny_vlm("gemma4")
    model = Gemma4ForCausalLM(pictured.model.config.text_config).to(torch.float64).eval().requires_grad_(False)
    randomise(model, 2)
    adapter = adapter_for(model)
    assert not adapter.has_vision and adapter.logit_softcap == 2.0
    vlm = VLM(model, pictured.tokenizer, adapter, "text")
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 5, skip=True, seed=4, dtype=torch.float64)
    with exact_float64(), torch.no_grad():
        inputs = vlm.prepare("what is this red planet ?")
        logits = model(**inputs.tensors).logits[0]
        replacement = build_replacement(Scope(vlm, transcoders), inputs)
        replayed = replacement.capped(replacement.replay().logits)
    assert (replayed - logits).abs().max() <= 1e-9 * logits.abs().max()
    with pytest.raises(UserError, match="takes no pictures but 1 were given"):
        vlm.prepare("what is this red planet ?", [tiny_image(0)])
