"""A model of any size with random weights made on its device, its transcoders and a prompt: no files, no tokenizer."""

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.families import adapter_for, family_of
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_vlm
from vlmscope.scope import Scope
from vlmscope.tasks.plan import soft_tokens
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet


class Numbers:
    """Stands for a tokenizer: a token's text is its number."""

    def decode(self, ids: list[int]) -> str:
        """The numbers, with spaces between."""
        return " ".join(map(str, ids))


def random_model(config: dict[str, Any], device: str) -> Adapter:
    """The model of a `config.json` (a tiny Gemma 3's when empty) in bfloat16, as transformers starts it."""
    config = config or tiny_vlm("gemma3").model.config.to_dict()
    model_class: Any = getattr(transformers, family_of(config["model_type"], "config.json").model)
    torch.manual_seed(0)
    with torch.device(device):
        read = model_class.config_class.from_dict(config)
        return adapter_for(model_class._from_config(read, dtype=torch.bfloat16).eval().requires_grad_(False))


def random_scope(adapter: Adapter, expansion: int, k: int) -> Scope:
    """The model with TopK transcoders of `expansion` times its width, in its dtype and on its device."""
    layers, d = {}, adapter.d_model
    for layer in range(adapter.n_layers):
        config = TranscoderConfig(d, expansion * d, k, layer)
        layers[layer] = Transcoder(config, dtype=adapter.dtype, device=adapter.device).requires_grad_(False)
        for weights in (layers[layer].W_enc, layers[layer].W_dec):
            weights.normal_(0, d**-0.5)
    transcoders = TranscoderSet(layers, TranscoderSetConfig(adapter.n_layers, k, "topk", "random"))
    return Scope(VLM(adapter.model, Numbers(), adapter, "random weights"), transcoders)


def random_prompt(adapter: Adapter, text_tokens: int) -> ModelInputs:
    """One random picture's soft tokens after five of `text_tokens` random tokens, for Gemma 3."""
    soft, soft_id = soft_tokens(adapter) or 0, adapter.soft_token_id()
    assert soft_id is not None
    length, first = soft + text_tokens, min(5, text_tokens)
    is_image = np.zeros(length, bool)
    is_image[first : first + soft] = True
    words = np.random.default_rng(0).integers(0, min(soft_id, adapter.vocab_size), length)
    ids = np.where(is_image, soft_id, words)
    side = adapter.model.config.vision_config.image_size
    tensors: dict[str, Tensor] = {
        "input_ids": torch.from_numpy(ids)[None],
        "attention_mask": torch.ones(1, length, dtype=torch.long),
        "token_type_ids": torch.from_numpy(is_image.astype(np.int64))[None],
        "pixel_values": torch.randn(1, 3, side, side).to(adapter.dtype),
    }
    tensors = {name: tensor.to(adapter.device) for name, tensor in tensors.items()}
    roles = np.where(is_image, "image", "question").astype("<U8")
    roles[-1] = "last"
    tokens = [str(number) for number in ids]
    return ModelInputs(tensors, tokens, is_image, np.where(is_image, 0, -1), [None] * length, roles, "random")
