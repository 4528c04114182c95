"""Tiny random models of every family, with their tokenizer, for tests and self-checks.

Byte-level tokenizers of a few hundred tokens for tiny models: any text can be asked, and nothing is unknown.

The alphabet is the 256 bytes, so a word that is not in the vocabulary becomes as many tokens as it has bytes, as in the
byte-level BPE of GPT-2 and its heirs (Radford et al. 2019). Given words are one token each, with and without a space
before them, so that prompts made of them stay short.

Tiny random models of the families beside Gemma 3, each with its own processor, made in memory.

Sizes are the smallest at which something could go wrong: grouped key/value heads, biases where the family has them, a
picture of several patches that is not square after the processor's cutting.

Tiny random models for tests and self-checks: a few thousand weights, every one of them non-zero.

A check on a model whose weights libraries start at zero (`mm_input_projection`, norm weights) would hold idly, so all
weights are drawn anew. Sliding and full layers are mixed, with different RoPE bases, heads share key/value heads, and
the window is shorter than a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlmscope.core.errors import UserError
from vlmscope.core.records import derive, generator
from vlmscope.models.families import adapter_for
from vlmscope.models.loading import VLM, picture_processor
from vlmscope.models.orrery.processor import BOI, BOS, EOI, EOS, PAD, SOFT, SPECIAL, gemma3_processor

WORDS = ("what", "is", "this", "?", "red", "blue", "planet", "and", "the", "other", "one", "two", "in")


def byte_tokenizer(
    special: Sequence[str],
    words: Iterable[str],
    *,
    named: dict[str, str],
    adds_bos: bool,
    inputs: Sequence[str] = ("input_ids", "attention_mask"),
) -> PreTrainedTokenizerFast:
    """A tokenizer with ids in the order: special tokens, the 256 bytes, words.

    Args:
        special: special tokens, among them `<pad>`, `<bos>` and `<eos>`.
        words: texts that become one token, or one for each of their parts: letters, digits and signs are parted.
        named: special tokens that the family's processor asks for by name, such as `image_token`.
        adds_bos: put `<bos>` before what is encoded with special tokens, as Llama's tokenizer does.
        inputs: names of the model's inputs that the tokenizer makes.
    """
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=True)
    vocabulary = dict.fromkeys((*special, *sorted(ByteLevel.alphabet())))
    for word in words:
        for text in (word, " " + word):
            vocabulary |= dict.fromkeys(piece for piece, _ in bytes_of.pre_tokenize_str(text))
    # There are no merges: a piece is a token where the vocabulary has the whole of it, and else its bytes.
    model = BPE({token: number for number, token in enumerate(vocabulary)}, [], ignore_merges=True)
    core = Tokenizer(model)
    core.pre_tokenizer = bytes_of  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        bos = [("<bos>", special.index("<bos>"))]
        core.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=bos)  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=named,
        model_input_names=list(inputs),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


Built = tuple[Any, Any]  # configuration and processor
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
_IMAGE_ID = _SPECIAL.index("<image>")
_SIDE, _PATCH = 12, 4


def _tokenizer(special: Sequence[str] = (), words: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose first ids are those of `_SPECIAL`, then `special`, and that knows `words`."""
    return byte_tokenizer(
        (*_SPECIAL, *special),
        ("USER:", "ASSISTANT:", *WORDS, *words),
        named={"image_token": "<image>", **named},
        # As in Llama: the tokenizer puts the first token there, not the template.
        adds_bos=True,
    )


def _text(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    """Settings of a decoder of three layers."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # A base this small turns visibly within a short prompt, so that a wrong one cannot pass a check.
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0},
        **changes,
    }


def _vision(**changes: Any) -> dict[str, Any]:
    """Settings of a vision tower of two layers."""
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": _SIDE,
        "patch_size": _PATCH,
        **changes,
    }


def _llava() -> Built:
    tokenizer = _tokenizer()
    config = LlavaConfig(
        text_config=LlamaConfig(**_text(tokenizer, attention_bias=True)),
        vision_config=CLIPVisionConfig(**_vision(projection_dim=16)),
        image_token_index=_IMAGE_ID,
        image_seq_length=(_SIDE // _PATCH) ** 2,
    )
    images = LlavaImageProcessorPil(size={"shortest_edge": _SIDE}, crop_size={"height": _SIDE, "width": _SIDE})
    processor = picture_processor("LlavaProcessor")(
        images, tokenizer, patch_size=_PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return config, processor


def _llava_onevision() -> Built:
    tokenizer = _tokenizer(("<video>", "<|im_start|>", "<|im_end|>"), ("user", "assistant"))
    tile, patch = _SIDE, 6
    sizes = [[tile, tile], [tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile]]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**_text(tokenizer)),
        vision_config=SiglipVisionConfig(**_vision(image_size=tile, patch_size=patch, vision_use_head=False)),
        image_token_index=_IMAGE_ID,
        video_token_index=len(_SPECIAL),
        image_grid_pinpoints=sizes,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": tile, "width": tile}, image_grid_pinpoints=sizes)
    processor = picture_processor("LlavaOnevisionProcessor")(
        images, tokenizer, num_image_tokens=(tile // patch) ** 2, vision_feature_select_strategy="full"
    )
    return config, processor


def _paligemma(text_class: type[Any] = GemmaConfig, **changes: Any) -> Built:
    tokenizer = _tokenizer()
    images = SiglipImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    setattr(images, "image_seq_length", (_SIDE // _PATCH) ** 2)  # noqa: B010, as checkpoints say it in their JSON
    processor = picture_processor("PaliGemmaProcessor")(images, tokenizer)  # adds tokens for places to the tokenizer
    config = PaliGemmaConfig(
        text_config=text_class(**_text(tokenizer, attention_bias=True, **changes)),
        vision_config=SiglipVisionConfig(**_vision(vision_use_head=False)),
        image_token_index=_IMAGE_ID,
        projection_dim=24,
        hidden_size=24,
    )
    return config, processor


def _paligemma2() -> Built:
    # Caps on scores and logits low enough to bend them.
    return _paligemma(
        Gemma2Config,
        query_pre_attn_scalar=8,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0,
    )


def _gemma4() -> Built:
    sounds = {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"}
    pictures = {
        "boi_token": "<|image>",
        "image_token": "<|image|>",
        "eoi_token": "<image|>",
        "video_token": "<|video|>",
    }
    special = (*pictures.values(), *sounds.values(), "<|turn>", "<turn|>")
    tokenizer = _tokenizer(special, ("user", "model"), **pictures, **sounds)
    first = len(_SPECIAL)
    text = _text(tokenizer, attention_bias=True, final_logit_softcapping=2.0, sliding_window=7)
    full = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 500.0}
    text["rope_parameters"] = {"sliding_attention": text["rope_parameters"], "full_attention": full}
    config = Gemma4Config(
        # Full layers have wider heads, one of them for keys, which are the values too.
        text_config={
            **text,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision",
        },
        vision_config={
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
        audio_config=None,
        boi_token_id=first,
        image_token_id=first + 1,
        eoi_token_id=first + 2,
        video_token_id=first + 3,
        boa_token_id=first + 4,
        audio_token_id=first + 5,
        eoa_token_index=first + 6,
    )
    images = Gemma4ImageProcessorPil(patch_size=2, pooling_kernel_size=2, max_soft_tokens=70)
    return config, picture_processor("Gemma4Processor")(images, tokenizer)


def _idefics3() -> Built:
    tokenizer, config = _idefics3_parts(Idefics3Config)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    return config, picture_processor("Idefics3Processor")(images, tokenizer, image_seq_len=4)


def _smolvlm() -> Built:
    tokenizer, config = _idefics3_parts(SmolVLMConfig)
    images = SmolVLMImageProcessorPil(size={"longest_edge": 2 * _SIDE}, max_image_size={"longest_edge": _SIDE})
    return config, picture_processor("SmolVLMProcessor")(images, tokenizer, image_seq_len=4)


def _idefics3_parts(config_class: type[Any]) -> tuple[PreTrainedTokenizerFast, Any]:
    cells = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    special = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<|im_start|>", *cells)
    tokenizer = _tokenizer(special, ("User:", "Assistant:"))
    config = config_class(
        text_config=LlamaConfig(**_text(tokenizer, attention_bias=True)),
        vision_config=_vision(patch_size=3),
        image_token_id=_IMAGE_ID,
        scale_factor=2,
    )
    return tokenizer, config


def _internvl() -> Built:
    special = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|im_start|>", "<|im_end|>")
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = _tokenizer(special, ("user", "assistant"), video_token="<video>", **named)
    config = InternVLConfig(
        text_config=Qwen3Config(**_text(tokenizer, attention_bias=True)).to_dict(),
        vision_config=_vision(patch_size=3),
        image_token_id=len(_SPECIAL) + special.index("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(size={"height": _SIDE, "width": _SIDE}, max_patches=4)
    return config, picture_processor("InternVLProcessor")(images, tokenizer, image_seq_length=4)


def _qwen_parts() -> tuple[PreTrainedTokenizerFast, dict[str, Any], Qwen2VLImageProcessorPil]:
    """Tokenizer, the ids that a configuration names, and image processor of both Qwen families."""
    special = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    words = ("system", "user", "assistant", "You", "are", "a", "helpful", "assistant.")
    tokenizer = _tokenizer(special, words, image_token="<|image_pad|>", video_token="<|video_pad|>")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids: dict[str, Any] = {name: len(_SPECIAL) + number for number, name in enumerate(names)}
    images = Qwen2VLImageProcessorPil(patch_size=3, size={"shortest_edge": 144, "longest_edge": 600})
    return tokenizer, ids, images


def _qwen2_5_vl() -> Built:
    tokenizer, ids, images = _qwen_parts()
    # Two of the three axes of M-RoPE tell rows from columns, each by one pair of the head's six dimensions.
    rope = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [1, 1, 1]}
    text = _text(tokenizer, rope_parameters=rope)
    del text["head_dim"]
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 24}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**vision, "patch_size": 3, "window_size": 12, "fullatt_block_indexes": [1]},
        **ids,
    )
    return config, picture_processor("Qwen2_5_VLProcessor")(images, tokenizer)


def _qwen3_vl() -> Built:
    tokenizer, ids, images = _qwen_parts()
    # Of a head's four frequencies two tell rows from columns.
    rope = {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 24}
    deepstack = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, rope_parameters=rope, attention_bias=True),
        vision_config={**vision, **deepstack, "patch_size": 3},
        **ids,
    )
    return config, picture_processor("Qwen3VLProcessor")(images, tokenizer)


_BUILDERS: dict[str, tuple[type[Any], Callable[[], Built]]] = {
    "llava": (LlavaForConditionalGeneration, _llava),
    "llava_onevision": (LlavaOnevisionForConditionalGeneration, _llava_onevision),
    "gemma4": (Gemma4ForConditionalGeneration, _gemma4),
    "idefics3": (Idefics3ForConditionalGeneration, _idefics3),
    "internvl": (InternVLForConditionalGeneration, _internvl),
    "paligemma": (PaliGemmaForConditionalGeneration, _paligemma),
    "paligemma2": (PaliGemmaForConditionalGeneration, _paligemma2),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, _qwen3_vl),
    "smolvlm": (SmolVLMForConditionalGeneration, _smolvlm),
}
FAMILIES = tuple(_BUILDERS)


def build_family(family: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model of one of `FAMILIES` with Hugging Face's initial weights, and its processor."""
    model_class, build = _BUILDERS[family]
    config, processor = build()
    return model_class._from_config(config).to(dtype), processor


LAYER_TYPES = ("sliding_attention", "full_attention", "sliding_attention", "full_attention")
_IMAGE_SIZE, _PATCH_SIZE, _SOFT_TOKENS = 16, 4, 4


def _gemma3_tokenizer() -> PreTrainedTokenizerFast:
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
    tokenizer = _gemma3_tokenizer()
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
