"""Tiny random models for tests and self-checks: a few thousand weights, every one of them non-zero.

A check on a model whose weights libraries start at zero (`mm_input_projection`, norm weights) would hold idly, so all
weights are drawn anew. Sliding and full layers are mixed, with different RoPE bases, heads share key/value heads, and
the window is shorter than a prompt.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import derive, generator
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM
from vlmscope.models.orrery.processor import BOI, BOS, EOI, EOS, PAD, SOFT, SPECIAL, gemma3_processor
from vlmscope.models.tiny_families import FAMILIES, build_family
from vlmscope.models.tiny_tokenizer import WORDS, byte_tokenizer

LAYER_TYPES = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
_IMAGE_SIZE, _PATCH_SIZE, _SOFT_TOKENS = 16, 4, 4


def _tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(
        SPECIAL,  # of Orrery, so that ids are the same; <unk> is never made
        ("user", "model", *WORDS),
        named={"boi_token": BOI, "eoi_token": EOI, "image_token": SOFT},
        adds_bos=False,  # Gemma's template spells it
        inputs=("input_ids", "attention_mask", "token_type_ids"),
    )


def _text_config(
    vocab_size: int,
    d_model: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    layer_types: Sequence[str],
    window: int,
    attention_bias: bool,
) -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=len(layer_types),
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv_heads,
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        sliding_window=window,
        layer_types=list(layer_types),
        attention_bias=attention_bias,
        max_position_embeddings=4096,
        pad_token_id=SPECIAL.index(PAD),
        eos_token_id=SPECIAL.index(EOS),
        bos_token_id=SPECIAL.index(BOS),
        # Bases this small turn visibly within a short prompt, so that confusing them cannot pass a check.
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    )


def _multimodal_config(text: Gemma3TextConfig) -> Gemma3Config:
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_IMAGE_SIZE,
        patch_size=_PATCH_SIZE,
        vision_use_head=False,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=_SOFT_TOKENS,
        boi_token_index=SPECIAL.index(BOI),
        eoi_token_index=SPECIAL.index(EOI),
        image_token_index=SPECIAL.index(SOFT),
    )


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every learned number anew, none of them zero: matrices at unit gain, vectors with deviation 0.3."""
    for name, parameter in model.named_parameters():
        numbers = torch.from_numpy(generator(seed, name).standard_normal(tuple(parameter.shape)))
        # The unembedding shares the embedding, which is scaled by sqrt(d) on the way in.
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(numbers * scale)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's learned constants, which libraries start at one
            buffer.fill_(float(generator(seed, name).uniform(0.6, 1.4)))


def tiny_gemma3(
    seed: int = 0,
    *,
    text_only: bool = False,
    d_model: int = 24,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 8,
    layer_types: Sequence[str] = LAYER_TYPES,
    window: int = 5,
    attention_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> VLM:
    """A random Gemma 3 with its processor, in evaluation mode.

    Args:
        seed: names the weights; the same seed gives the same weights in every dtype.
        text_only: make a `Gemma3ForCausalLM` without a vision tower.
        d_model: decoder width.
        n_heads: query heads.
        n_kv_heads: key/value heads.
        head_dim: width of a head.
        layer_types: "sliding_attention" or "full_attention" for each layer.
        window: sliding window in tokens.
        attention_bias: give the attention projections biases.
        dtype: dtype of the weights.
        attention: Hugging Face attention implementation.
    """
    tokenizer = _tokenizer()
    text = _text_config(len(tokenizer), d_model, n_heads, n_kv_heads, head_dim, layer_types, window, attention_bias)
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "tiny"))
        model = (
            Gemma3ForCausalLM._from_config(text, attn_implementation=attention)
            if text_only
            else Gemma3ForConditionalGeneration._from_config(_multimodal_config(text), attn_implementation=attention)
        )
    model = model.to(dtype)  # pyright: ignore[reportArgumentType]
    randomise(model, seed)
    model.eval().requires_grad_(False)
    processor = tokenizer if text_only else gemma3_processor(tokenizer, _IMAGE_SIZE, _SOFT_TOKENS)
    return VLM(model, processor, adapter_for(model), name="tiny")


def tiny_vlm(family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> VLM:
    """A random model of a family with its processor, in evaluation mode.

    Args:
        family: Hugging Face's `model_type`, such as "gemma3", "gemma3_text" or "llava".
        seed: names the weights; the same seed gives the same weights in every dtype.
        dtype: dtype of the weights.

    Raises:
        UserError: when the family has no tiny model.
    """
    if family in ("gemma3", "gemma3_text"):
        return replace(tiny_gemma3(seed, text_only=family == "gemma3_text", dtype=dtype), name=f"tiny_{family}")
    if family not in FAMILIES:
        known = ", ".join(sorted(("gemma3", "gemma3_text", *FAMILIES)))
        raise UserError(f"there is no tiny model of type {family!r}; choose one of: {known}")
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "tiny"))
        model, processor = build_family(family, dtype)
    randomise(model, seed)
    model.eval().requires_grad_(False)
    return VLM(model, processor, adapter_for(model), name=f"tiny_{family}")


def tiny_image(seed: int) -> Image.Image:
    """A random picture for a tiny model."""
    pixels = generator(seed, "picture").integers(0, 256, (_IMAGE_SIZE, _IMAGE_SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
