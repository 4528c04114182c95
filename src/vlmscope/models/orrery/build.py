"""Orrery's architecture and initial values.

Hugging Face's initial values hardly let the picture through (the projection starts at zero, post-norms at full
scale), so they are set here: projection std 1/sqrt(width), embeddings std 1/sqrt(d), post-norm weights -0.8 (scale
0.2, so that each block starts small).
"""

from __future__ import annotations

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from vlmscope.models.orrery import processor as tok
from vlmscope.models.orrery.config import OrreryConfig


def hf_config(config: OrreryConfig, vocab_size: int) -> Gemma3Config:
    """The Hugging Face configuration of an Orrery of these sizes."""
    text = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_mlp,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=config.head_dim,
        sliding_window=config.sliding_window,
        layer_types=[
            "full_attention" if i in config.global_layers else "sliding_attention" for i in range(config.n_layers)
        ],
        max_position_embeddings=512,
        pad_token_id=tok.SPECIAL.index(tok.PAD),
        eos_token_id=tok.SPECIAL.index(tok.EOS),
        bos_token_id=tok.SPECIAL.index(tok.BOS),
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=config.vision_mlp,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=config.vision_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=config.soft_tokens,
        boi_token_index=tok.SPECIAL.index(tok.BOI),
        eoi_token_index=tok.SPECIAL.index(tok.EOI),
        image_token_index=tok.SPECIAL.index(tok.SOFT),
        eos_token_id=[tok.SPECIAL.index(tok.EOS), tok.SPECIAL.index(tok.END_TURN)],  # pyright: ignore[reportCallIssue]
        tie_word_embeddings=True,
    )


def build_orrery(config: OrreryConfig, vocab_size: int, seed: int) -> Gemma3ForConditionalGeneration:
    """An untrained Orrery in float32 with the initial values that this module's docstring gives."""
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(hf_config(config, vocab_size))
    generation = model.generation_config
    assert generation is not None
    generation.eos_token_id = [tok.SPECIAL.index(tok.EOS), tok.SPECIAL.index(tok.END_TURN)]
    generation.pad_token_id = tok.SPECIAL.index(tok.PAD)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(0, config.vision_width**-0.5)
        model.model.language_model.embed_tokens.weight.normal_(0, config.d_model**-0.5)
        for name, parameter in model.model.language_model.named_parameters():
            if "post_attention_layernorm" in name or "post_feedforward_layernorm" in name:
                parameter.fill_(-0.8)
            elif name.endswith("_proj.weight"):
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    return model
