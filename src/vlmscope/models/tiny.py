"""Tiny random models of every family with their own processors, made in memory, for tests and self-checks.

A few thousand weights, every one of them drawn anew and non-zero: a check on a model whose weights libraries start at
zero (`mm_input_projection`, norm weights) would hold idly. Sizes are the smallest at which something could go wrong:
grouped key/value heads, biases where the family has them, sliding and full layers with different RoPE bases, a window
shorter than a prompt, a picture of several patches that is not square after the processor's cutting.

The tokenizers are byte-level (as the BPE of GPT-2, Radford et al. 2019) with a few hundred tokens, so that any text can
be asked. Given words are one token each, with and without a space before them, so that prompts made of them stay short.
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
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM, picture_processor

WORDS = ("what", "is", "this", "?", "red", "blue", "planet", "and", "the", "other", "one", "two", "in")


def byte_tokenizer(
    special: Sequence[str], words: Iterable[str], named: Mapping[str, str], *, adds_bos: bool = True
) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer with ids in the order: special tokens, the 256 bytes, words.

    Args:
        special: special tokens, among them `<pad>`, `<bos>` and `<eos>`.
        words: texts that become one token, or one for each of their parts: letters, digits and signs are parted.
        named: special tokens that the family's processor asks for by name, such as `image_token`.
        adds_bos: put `<bos>` before what is encoded with special tokens, as Llama's tokenizer does.
    """
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = dict.fromkeys((*special, *sorted(ByteLevel.alphabet())))
    for word in words:
        for text in (word, " " + word):
            vocabulary |= dict.fromkeys(piece for piece, _ in bytes_of.pre_tokenize_str(text))
    # There are no merges: a piece is a token where the vocabulary has the whole of it, and else its bytes.
    core = Tokenizer(BPE({token: number for number, token in enumerate(vocabulary)}, [], ignore_merges=True))
    core.pre_tokenizer = bytes_of  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        bos = [("<bos>", special.index("<bos>"))]
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=dict(named),
        model_input_names=["input_ids", "attention_mask"] + ["token_type_ids"] * (not adds_bos),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


# A base this small turns visibly within a short prompt, so that a wrong one cannot pass a check.
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
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
_QWEN_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 24, "patch_size": 3}
_SQUARE = {"height": 12, "width": 12}
_ANYRES = [[12, 12], [12, 24], [24, 12], [24, 24]]
_TILES = {"size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 12}}
_CHAT = ("<|im_start|>", "<|im_end|>")
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")


class Recipe(NamedTuple):
    """What a tiny model is made of.

    Attributes:
        images: name of the image processor in `transformers`, without "ImageProcessorPil", and its settings.
        text: settings of the decoder that are not those of `_TEXT`.
        vision: settings of the vision tower.
        config: other settings of the model; a token's id is written as the token.
        processor: settings of the processor.
        special: special tokens after those of `_SPECIAL`.
        words: more words that are one token each.
        named: special tokens by the names that the processor has for them.
    """

    images: tuple[str, dict[str, Any]]
    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any] = {}
    processor: dict[str, Any] = {}
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    named: dict[str, str] = {}


def _tiled(images: str) -> Recipe:
    """Idefics3 or SmolVLM."""
    cells = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    return Recipe(
        images=(images, _TILES),
        text={"model_type": "llama", "attention_bias": True},
        vision={**_VISION, "patch_size": 3},
        config={"image_token_id": "<image>", "scale_factor": 2},
        processor={"image_seq_len": 4},
        special=("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *cells),
        words=("User:", "Assistant:"),
    )


def _paligemma(**text: Any) -> Recipe:
    return Recipe(
        images=("Siglip", {"size": _SQUARE}),
        text={"attention_bias": True, **text},
        vision={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        config={"image_token_index": "<image>", "projection_dim": 24, "hidden_size": 24},
    )


def _qwen(text: dict[str, Any], vision: dict[str, Any]) -> Recipe:
    return Recipe(
        images=("Qwen2VL", {"patch_size": 3, "size": {"shortest_edge": 144, "longest_edge": 600}}),
        text=text,
        vision={**_QWEN_VISION, **vision},
        config={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        special=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", *_CHAT),
        words=("system", "user", "assistant", "You", "are", "a", "helpful", "assistant."),
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
        vision={"model_type": "siglip_vision_model", **_VISION, "patch_size": 6, "vision_use_head": False},
        config={"image_token_index": "<image>", "video_token_index": "<video>", "image_grid_pinpoints": _ANYRES},
        processor={"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
        special=("<video>", *_CHAT),
        words=("user", "assistant"),
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
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
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
        special=(*_GEMMA4_TOKENS.values(), "<|turn>", "<turn|>"),
        words=("user", "model"),
        named=_GEMMA4_TOKENS,
    ),
    "idefics3": _tiled("Idefics3"),
    "internvl": Recipe(
        images=("GotOcr2", {"size": _SQUARE, "max_patches": 4}),
        text={"model_type": "qwen3", "attention_bias": True},
        vision={**_VISION, "patch_size": 3},
        config={"image_token_id": "<IMG_CONTEXT>", "image_seq_length": 4},
        processor={"image_seq_length": 4},
        special=("<img>", "</img>", "<IMG_CONTEXT>", "<video>", *_CHAT),
        words=("user", "assistant"),
        named={
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
    "smolvlm": _tiled("SmolVLM"),
}
FAMILIES = tuple(_RECIPES)  # beside Gemma 3


def _build(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of one of `FAMILIES` with Hugging Face's initial weights, and its processor."""
    recipe = _RECIPES[family]
    model_type = "paligemma" if family == "paligemma2" else family
    tokenizer = byte_tokenizer(
        (*_SPECIAL, *recipe.special),
        ("USER:", "ASSISTANT:", *WORDS, *recipe.words),
        {"image_token": "<image>", **recipe.named},
    )
    name, settings = recipe.images
    images = getattr(transformers, f"{name}ImageProcessorPil")(**settings)
    if model_type == "paligemma":
        images.image_seq_length = 9  # as checkpoints say it in their JSON
    # The processor may add tokens to the tokenizer (PaliGemma: for places), so that it comes before the embedding.
    processor = picture_processor(KNOWN[model_type].processor)(images, tokenizer, **recipe.processor)
    text = {
        **_TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **recipe.text,
    }
    ids = tokenizer.get_vocab()
    config = transformers.AutoConfig.for_model(
        model_type,
        text_config={key: value for key, value in text.items() if value is not None},
        vision_config=recipe.vision,
        **{key: ids[value] if isinstance(value, str) else value for key, value in recipe.config.items()},
    )
    return getattr(transformers, KNOWN[model_type].model)._from_config(config).to(dtype), processor


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


def _finished(model: Any, processor: Any, family: str, seed: int) -> VLM:
    randomise(model, seed)
    model.eval().requires_grad_(False)
    return VLM(model, processor, adapter_for(model), name=f"tiny_{family}")


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
    """A random Gemma 3 of any shape with its processor, in evaluation mode.

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
    tokenizer = byte_tokenizer(
        orrery.SPECIAL,  # so that ids are the same; <unk> is never made
        ("user", "model", *WORDS),
        {"boi_token": orrery.BOI, "eoi_token": orrery.EOI, "image_token": orrery.SOFT},
        adds_bos=False,  # Gemma's template spells it
    )
    ids = tokenizer.get_vocab()
    text = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer),
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
        pad_token_id=ids[orrery.PAD],
        eos_token_id=ids[orrery.EOS],
        bos_token_id=ids[orrery.BOS],
        # Bases this small turn visibly within a short prompt, so that confusing them cannot pass a check.
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    )
    config: Any = text
    if not text_only:
        config = transformers.Gemma3Config(
            text_config=text,
            vision_config={**_VISION, "image_size": 16, "vision_use_head": False},
            mm_tokens_per_image=4,
            boi_token_index=ids[orrery.BOI],
            eoi_token_index=ids[orrery.EOI],
            image_token_index=ids[orrery.SOFT],
        )
    family = "gemma3_text" if text_only else "gemma3"
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "tiny"))
        model_class: Any = getattr(transformers, KNOWN[family].model)
        model = model_class._from_config(config, attn_implementation=attention).to(dtype)
    processor = tokenizer if text_only else orrery.gemma3_processor(tokenizer, 16, 4)
    return _finished(model, processor, family, seed)


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
        return tiny_gemma3(seed, text_only=family == "gemma3_text", dtype=dtype)
    if family not in FAMILIES:
        known = ", ".join(sorted(("gemma3", "gemma3_text", *FAMILIES)))
        raise UserError(f"there is no tiny model of type {family!r}; choose one of: {known}")
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "tiny"))
        model, processor = _build(family, dtype)
    return _finished(model, processor, family, seed)


def tiny_image(seed: int) -> Image.Image:
    """A random picture for a tiny model."""
    return Image.fromarray(generator(seed, "picture").integers(0, 256, (16, 16, 3), dtype=np.uint8))
