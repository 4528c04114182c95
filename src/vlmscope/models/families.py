"""The supported families by `model_type`, and the adapter of a model."""

import importlib
from typing import Any

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter

_FAMILIES = {  # module and class of the adapter; imported when asked for, since transformers is slow to import
    "gemma3": "gemma.Gemma3Adapter",
    "gemma3_text": "gemma.Gemma3Adapter",
    "gemma4": "gemma.Gemma4Adapter",
    "gemma4_text": "gemma.Gemma4Adapter",
    "idefics3": "llava.Idefics3Adapter",
    "internvl": "llava.InternVLAdapter",
    "llava": "llava.LlavaAdapter",
    "llava_onevision": "llava.LlavaOnevisionAdapter",
    "paligemma": "gemma.PaliGemmaAdapter",
    "qwen2_5_vl": "qwen.Qwen2_5_VLAdapter",
    "qwen3_vl": "qwen.Qwen3VLAdapter",
    "smolvlm": "llava.Idefics3Adapter",
}

# Families that people ask for, and what in them the replacement model does not represent.
_REFUSED = {
    "gemma3n": "per-layer embeddings and AltUp streams",
    "idefics": "cross-attention layers",
    "llama4": "mixture-of-experts MLPs",
    "mllama": "cross-attention layers",
    "qwen3_vl_moe": "mixture-of-experts MLPs",
}


def check_supported(model_type: str, where: str) -> None:
    """Raise a `UserError` that names the supported types when `model_type` is not one of them."""
    if model_type in _REFUSED:
        raise UserError(
            f"models of type {model_type!r} have {_REFUSED[model_type]}, which attribution does not cover ({where}); "
            f"choose one of: {', '.join(sorted(_FAMILIES))}"
        )
    if model_type not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise UserError(f"models of type {model_type!r} are not supported ({where}); choose one of: {known}")


def adapter_for(model: Any) -> Adapter:
    """The adapter of a Hugging Face model, chosen by `model.config.model_type`.

    Raises:
        UserError: when the type is not supported.
    """
    model_type = str(model.config.model_type)
    check_supported(model_type, type(model).__name__)
    module, _, name = _FAMILIES[model_type].partition(".")
    return getattr(importlib.import_module(f"vlmscope.models.{module}"), name)(model)
