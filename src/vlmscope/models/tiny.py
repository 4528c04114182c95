"""Tiny random models of every family with their own processors, made in memory, for tests and self-checks.

All of their few thousand weights are redrawn and non-zero: checks on weights that libraries start at zero
(`mm_input_projection`, norm weights) would prove nothing. Sizes are the smallest at which something could go wrong:
grouped key/value heads, biases where the family has them, sliding and full layers with different RoPE bases, a window
shorter than a prompt, a picture of several patches that is not square after the processor's cutting.

The tokenizers are byte-level (as the BPE of GPT-2, Radford et al. 2019) with a few hundred tokens, so that they can
encode any text. Listed words are one token each, with and without a leading space, so that their prompts stay short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from vlmscope.core.errors import UserError
from vlmscope.core.records import derive, generator
from vlmscope.models import orrery
from vlmscope.models.families import FAMILIES as KNOWN
from vlmscope.models.families import Gemma3Adapter, adapter_for
from vlmscope.models.loading import VLM, picture_processor

WORDS = ("what", "is", "this", "?", "red", "blue", "planet", "and", "the", "other", "one", "two", "in")


def byte_tokenizer(
    special: Sequence[str], words: Iterable[str], named: Mapping[str, str], *, adds_bos: bool = True
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with ids in the order: special tokens, the 256 bytes, words.

    Each of `words` becomes one token, or one for each run of letters, digits or signs in it. `named` are special tokens
    that the family's processor looks up by name. Llama's tokenizer `adds_bos` by itself.
    """
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = dict.fromkeys((*special, *sorted(ByteLevel.alphabet())))
    for word in words:
        for text in (word, " " + word):
            vocabulary |= dict.fromkeys(piece for piece, _ in bytes_of.pre_tokenize_str(text))
    # Without merges, a piece is one token if the vocabulary has it, and else its bytes.
    core = Tokenizer(BPE({token: number for number, token in enumerate(vocabulary)}, [], ignore_merges=True))
    core.pre_tokenizer = bytes_of  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        bos = [("<bos>", special.index("<bos>"))]
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)  # type: ignore[assignment]
    inputs = ["input_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=dict(named),
        model_input_names=inputs if adds_bos else [*inputs, "token_type_ids"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


_SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
_WORDS = ("USER:", "ASSISTANT:", *WORDS)
_NAMED = {"image_token": "<image>"}


class Recipe(NamedTuple):
    """Settings of a tiny model; `config` names tokens where the model's configuration has their ids."""

    # Image processor in `transformers`, without "ImageProcessorPil", and its settings; None for a model of text alone.
    images: tuple[str, dict[str, Any]] | None
    text: dict[str, Any]  # settings of the decoder that are not those of `_TEXT`
    vision: dict[str, Any]  # settings of the vision tower
    config: dict[str, Any]  # other settings of the model
    processor: dict[str, Any] = {}
    special: tuple[str, ...] = _SPECIAL
    words: tuple[str, ...] = _WORDS  # one token each
    named: dict[str, str] = _NAMED  # special tokens by the names that the processor has for them


# With a base this small, angles differ enough within a short prompt that a wrong base fails a check.
_ROPE = {"rope_type": "default", "rope_theta": 20.0}
_TEXT = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "rope_parameters": _ROPE,
}
_WIDTHS = {"hidden_size": 16, "intermediate_size": 32}
_VISION = {**_WIDTHS, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12, "patch_size": 4}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False}
_SQUARE = {"height": 12, "width": 12}
_ANYRES = [[12, 12], [12, 24], [24, 12], [24, 24]]
_CHAT = ("<|im_start|>", "<|im_end|>")


def _idefics3(images: str) -> Recipe:
    cells = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    return Recipe(
        images=(images, {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 12}}),
        text={"model_type": "llama", "attention_bias": True},
        vision={**_VISION, "patch_size": 3},
        config={"image_token_id": "<image>", "scale_factor": 2},
        processor={"image_seq_len": 4},
        special=(*_SPECIAL, "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *cells),
        words=(*_WORDS, "User:", "Assistant:"),
    )


def _paligemma(**text: Any) -> Recipe:
    return Recipe(
        images=("Siglip", {"size": _SQUARE}),
        text={"attention_bias": True, **text},
        vision=_SIGLIP,
        config={"model_type": "paligemma", "image_token_index": "<image>", "projection_dim": 24, "hidden_size": 24},
    )


def _qwen(text: dict[str, Any], vision: dict[str, Any]) -> Recipe:
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return Recipe(
        images=("Qwen2VL", {"patch_size": 3, "size": {"shortest_edge": 144, "longest_edge": 600}}),
        text=text,
        vision={**_WIDTHS, "num_heads": 2, "out_hidden_size": 24, "patch_size": 3, **vision},
        config=dict(zip(names, special, strict=True)),
        special=(*_SPECIAL, *special, *_CHAT),
        words=(*_WORDS, "system", "user", "assistant", "You", "are", "a", "helpful", "assistant."),
        named={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )


_GEMMA4_TOKENS = {
    "boi_token": "<|image>",
    "image_token": "<|image|>",
    "eoi_token": "<image|>",
    "video_token": "<|video|>",
    "boa_token": "<|audio>",
    "audio_token": "<|audio|>",
    "eoa_token": "<audio|>",
}
_RECIPES = {
    "llava": Recipe(
        images=("Llava", {"size": {"shortest_edge": 12}, "crop_size": _SQUARE}),
        text={"model_type": "llama", "attention_bias": True},
        vision={"model_type": "clip_vision_model", **_VISION, "projection_dim": 16},
        config={"image_token_index": "<image>", "image_seq_length": 9},
        processor={"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": Recipe(
        images=("LlavaOnevision", {"size": _SQUARE, "image_grid_pinpoints": _ANYRES}),
        text={"model_type": "qwen2"},
        vision={**_SIGLIP, "patch_size": 6},
        config={"image_token_index": "<image>", "video_token_index": "<video>", "image_grid_pinpoints": _ANYRES},
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        special=(*_SPECIAL, "<video>", *_CHAT),
        words=(*_WORDS, "user", "assistant"),
    ),
    "gemma4": Recipe(
        images=("Gemma4", {"patch_size": 2, "pooling_kernel_size": 2, "max_soft_tokens": 70}),
        # Full layers have wider heads, one of them for keys, which are the values too.
        text={
            "attention_bias": True,
            "final_logit_softcapping": 2.0,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": _ROPE,
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 500.0},
            },
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        vision={
            **{key: value for key, value in _VISION.items() if key != "image_size"},
            "num_key_value_heads": 2,
            "head_dim": 8,
            "patch_size": 2,
            "pooling_kernel_size": 2,
            "position_embedding_size": 128,
        },
        config={
            "audio_config": None,
            **{f"{name}_id": token for name, token in _GEMMA4_TOKENS.items() if name != "eoa_token"},
            "eoa_token_index": _GEMMA4_TOKENS["eoa_token"],
        },
        special=(*_SPECIAL, *_GEMMA4_TOKENS.values(), "<|turn>", "<turn|>"),
        words=(*_WORDS, "user", "model"),
        named=_GEMMA4_TOKENS,
    ),
    "idefics3": _idefics3("Idefics3"),
    "internvl": Recipe(
        images=("GotOcr2", {"size": _SQUARE, "max_patches": 4}),
        text={"model_type": "qwen3", "attention_bias": True},
        vision={**_VISION, "patch_size": 3},
        config={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        processor={"image_seq_length": 4},
        special=(*_SPECIAL, "<img>", "</img>", "<IMG_CONTEXT>", "<video>", *_CHAT),
        words=(*_WORDS, "user", "assistant"),
        named={
            **_NAMED,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "paligemma": _paligemma(model_type="gemma"),
    "paligemma2": _paligemma(
        model_type="gemma2",
        query_pre_attn_scalar=8,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attn_logit_softcapping=1.0,  # caps low enough to bend scores and logits
        final_logit_softcapping=2.0,
    ),
    # Two of M-RoPE's three axes tell rows from columns, each by one pair of the head's six dimensions.
    "qwen2_5_vl": _qwen(
        {"head_dim": None, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1]}},
        {"depth": 2, "window_size": 12, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": _qwen(
        {"attention_bias": True, "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}},
        {"depth": 3, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    ),
    "smolvlm": _idefics3("SmolVLM"),
}
FAMILIES = tuple(_RECIPES)  # all but Gemma 3


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Redraw every learned number, none of them zero: matrices at unit gain, vectors with deviation 0.3."""
    for name, parameter in model.named_parameters():
        numbers = torch.from_numpy(generator(seed, name).standard_normal(tuple(parameter.shape)))
        # The unembedding shares the embedding, which is scaled by sqrt(d) on the way in.
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.copy_(numbers * scale)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):  # Gemma 4's learned constants, which libraries start at one
            buffer.fill_(float(generator(seed, name).uniform(0.6, 1.4)))


def _made(family: str, recipe: Recipe, seed: int, dtype: torch.dtype, attention: str | None = None) -> VLM:
    known = KNOWN[recipe.config.get("model_type", family)]
    is_gemma3 = family.startswith("gemma3")
    tokenizer = byte_tokenizer(recipe.special, recipe.words, recipe.named, adds_bos=not is_gemma3)
    processor: Any = tokenizer
    if recipe.images:
        name, picture_settings = recipe.images
        images = getattr(transformers, f"{name}ImageProcessorPil")(**picture_settings)
        if name == "Siglip":
            images.image_seq_length = 9  # checkpoints have it in their JSON
        # The processor may add tokens to the tokenizer (PaliGemma: locations), so it is made before the embedding.
        processor = picture_processor(known.processor)(images, tokenizer, **recipe.processor)
    ids = tokenizer.get_vocab()
    text = {
        **_TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": ids["<pad>"],
        "bos_token_id": ids["<bos>"],
        "eos_token_id": ids["<eos>"],
        **recipe.text,
    }
    text = {key: value for key, value in text.items() if value is not None}
    settings = {key: ids.get(value, value) if isinstance(value, str) else value for key, value in recipe.config.items()}
    if recipe.images:
        text = {"text_config": text, "vision_config": recipe.vision}
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "tiny"))
        config = transformers.AutoConfig.for_model(**{"model_type": family, **settings, **text})
        model = getattr(transformers, known.model)._from_config(config, attn_implementation=attention).to(dtype)
    randomise(model, seed)
    model.eval().requires_grad_(False)
    return VLM(model, processor, adapter_for(model), name=f"tiny_{family}")


def tiny_vlm(family: str, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> VLM:
    """A random model of a family (such as "gemma3_text" or "llava") with its processor, in evaluation mode.

    The same seed gives the same weights in every dtype.
    """
    if family in ("gemma3", "gemma3_text"):
        return tiny_gemma3(seed, text_only=family == "gemma3_text", dtype=dtype)
    if family not in FAMILIES:
        known = ", ".join(sorted(("gemma3", "gemma3_text", *FAMILIES)))
        raise UserError(f"there is no tiny model of type {family!r}; choose one of: {known}")
    return _made(family, _RECIPES[family], seed, dtype)


def tiny_gemma3(
    seed: int = 0,
    *,
    text_only: bool = False,
    d_model: int = 24,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int = 8,
    layer_types: Sequence[str] = ("sliding_attention", "full_attention") * 2,
    window: int = 5,
    attention_bias: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> VLM:
    """`tiny_vlm` for a Gemma 3 of any shape.

    `layer_types` are "sliding_attention" or "full_attention", `window` is that of the former in tokens, `attention` the
    Hugging Face attention implementation.
    """
    text = {
        "hidden_size": d_model,
        "intermediate_size": 2 * d_model,
        "num_hidden_layers": len(layer_types),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "sliding_window": window,
        "layer_types": list(layer_types),
        "attention_bias": attention_bias,
        "rope_parameters": {
            "sliding_attention": {**_ROPE, "rope_theta": 10.0},
            "full_attention": {**_ROPE, "rope_theta": 1000.0},
        },
    }
    half = [0.5, 0.5, 0.5]
    images = {"size": {"height": 16, "width": 16}, "image_mean": half, "image_std": half, "do_pan_and_scan": False}
    tokens = {"boi_token": orrery.BOI, "eoi_token": orrery.EOI, "image_token": orrery.SOFT}
    recipe = Recipe(
        images=("Gemma3", images),
        text=text,
        vision={**_SIGLIP, "image_size": 16},
        config={"mm_tokens_per_image": 4, **{f"{name}_index": token for name, token in tokens.items()}},
        processor={"image_seq_length": 4, "chat_template": Gemma3Adapter.chat_template},
        special=orrery.SPECIAL,  # so that ids are the same; <unk> is never made
        words=("user", "model", *WORDS),
        named=tokens,
    )
    if text_only:
        return _made("gemma3_text", recipe._replace(images=None, config={}), seed, dtype, attention)
    return _made("gemma3", recipe, seed, dtype, attention)


def tiny_image(seed: int) -> Image.Image:
    """A random picture for a tiny model."""
    return Image.fromarray(generator(seed, "picture").integers(0, 256, (16, 16, 3), dtype=np.uint8))
