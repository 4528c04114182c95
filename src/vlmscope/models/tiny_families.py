"""Tiny random models of the families beside Gemma 3, each with its own processor, made in memory.

Sizes are the smallest at which something could go wrong: grouped key/value heads, biases where the family has them, a
picture of several patches that is not square after the processor's cutting.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
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

from vlmscope.models.processors import picture_processor
from vlmscope.models.tiny_tokenizer import WORDS, byte_tokenizer

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
