"""Gemma 3, with pictures (`Gemma3ForConditionalGeneration`) and text only (`Gemma3ForCausalLM`).

RMSNorm is `x * rsqrt(mean(x^2) + eps) * (1 + w)`; embeddings are scaled by sqrt(d); sliding and full layers have their
own RoPE base; soft tokens of one picture see each other. None of it matters to attribution, which takes the attention
patterns and the embeddings as the model computed them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration

from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.base import Adapter, LayerNorms


class Gemma3Adapter(Adapter):
    """Both Gemma 3 classes; the text model is `decoder()` in either."""

    def __init__(self, model: Any) -> None:
        self.model = model
        text = model.config.get_text_config()
        self.n_layers = int(text.num_hidden_layers)
        self.d_model = int(text.hidden_size)
        self.n_heads = int(text.num_attention_heads)
        self.n_kv_heads = int(text.num_key_value_heads)
        self.head_dim = int(text.head_dim)
        self.vocab_size = int(text.vocab_size)

    @property
    def has_vision(self) -> bool:
        return isinstance(self.model, Gemma3ForConditionalGeneration)

    @property
    def logit_softcap(self) -> float | None:
        # Hugging Face applies the cap in the text-only class alone.
        return None if self.has_vision else self.model.config.final_logit_softcapping

    def decoder(self) -> Any:
        return self.model.model.language_model if self.has_vision else self.model.model

    def _layer(self, layer: int) -> Any:
        return self.decoder().layers[layer]

    def attention(self, layer: int) -> nn.Module:
        return self._layer(layer).self_attn

    def mlp(self, layer: int) -> nn.Module:
        return self._layer(layer).mlp

    def norms(self, layer: int) -> LayerNorms:
        block = self._layer(layer)
        return LayerNorms(
            block.input_layernorm,
            block.post_attention_layernorm,
            block.pre_feedforward_layernorm,
            block.post_feedforward_layernorm,
        )

    def final_norm(self) -> nn.Module:
        return self.decoder().norm

    def lm_head(self) -> nn.Linear:
        return self.model.lm_head

    def norm_scale(self, norm: nn.Module, x: Tensor) -> Tensor:
        # Half precision is normalised in float32, as the model does.
        wide = x if x.dtype == torch.float64 else x.float()
        weight, eps = norm.get_parameter("weight").to(wide.dtype), float(norm.eps)  # pyright: ignore[reportArgumentType]
        return (torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + weight)).to(x.dtype)

    def value_weight(self, layer: int) -> Tensor:
        return self._layer(layer).self_attn.v_proj.weight

    def value_bias(self, layer: int) -> Tensor | None:
        return self._layer(layer).self_attn.v_proj.bias

    def output_weight(self, layer: int) -> Tensor:
        return self._layer(layer).self_attn.o_proj.weight

    def output_bias(self, layer: int) -> Tensor | None:
        return self._layer(layer).self_attn.o_proj.bias

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any) -> str:
        content = prompt
        if self.has_vision:
            placeholder = tokenizer.boi_token
            if tokenizer.image_token in prompt:
                raise UserError(f"the prompt spells {tokenizer.image_token}; write {placeholder} once for each picture")
            spelt = prompt.count(placeholder)
            if spelt == 0:
                content = placeholder * n_images + prompt
            elif spelt != n_images:
                raise UserError(
                    f"the prompt spells {placeholder} {spelt} times but {n_images} pictures were given; make them equal"
                )
        elif n_images:
            raise UserError(
                f"{type(self.model).__name__} takes no pictures but {n_images} were given; leave image= out"
            )
        bos = tokenizer.bos_token or ""
        return f"{bos}<start_of_turn>user\n{content}<end_of_turn>\n<start_of_turn>model\n"

    def soft_token_boxes(self) -> list[PatchBox]:
        if not self.has_vision:
            return []
        # The projector pools patches in row-major order and the processor resizes the whole picture without cropping.
        side = round(int(self.model.config.mm_tokens_per_image) ** 0.5)
        return [
            PatchBox(column / side, row / side, (column + 1) / side, (row + 1) / side)
            for row in range(side)
            for column in range(side)
        ]

    def soft_token_id(self) -> int | None:
        return int(self.model.config.image_token_id) if self.has_vision else None


def make_adapter(model: Any) -> Gemma3Adapter:
    """The adapter of a Gemma 3 model.

    Raises:
        UserError: when the class is neither the multimodal nor the text-only language model.
    """
    if not isinstance(model, Gemma3ForConditionalGeneration | Gemma3ForCausalLM):
        raise UserError(f"{type(model).__name__} has no language-model head; load the ForConditionalGeneration class")
    return Gemma3Adapter(model)
