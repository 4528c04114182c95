"""Decoders whose layers are `attention, gated MLP` with RMSNorm in front of each: the Llama line and the Gemma line.

Hugging Face names their parts alike, so one class serves all of them; what differs is in `DECODERS`. RMSNorm is
`x * rsqrt(mean(x^2) + eps) * (offset + w)`. Scaled embeddings, kinds of RoPE, query/key norms, sliding windows, caps on
attention scores and masks need nothing: attribution takes embeddings and attention patterns as the model computed them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange
from vlmscope.models.base import Adapter, LayerNorms, ScoreParts
from vlmscope.models.boxes import PicturePatches, tower_attention, tower_states
from vlmscope.models.placement import computing_device, materialised
from vlmscope.models.template import Dialogue, Turn, dialogue, user_turn


class Decoder(NamedTuple):
    """What differs between decoders: the constant added to a norm's weight, and whether there are post norms."""

    norm_offset: float
    post_norms: bool


_LLAMA, _GEMMA, _GEMMA2 = Decoder(0.0, False), Decoder(1.0, False), Decoder(1.0, True)
DECODERS = {
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_5_vl_text": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_vl_text": _LLAMA,
}


class DecoderAdapter(Adapter):
    """The decoder's half of an adapter; families add their pictures and their template.

    Attributes:
        placeholder: what stands for a picture in a prompt.
        decoders: by `model_type`, those that the family may have.

    Raises:
        UserError: when the model has no language-model head, or a decoder that the replacement model does not represent
            exactly.
    """

    placeholder = "<image>"
    decoders: Mapping[str, Decoder] = DECODERS
    # Whether the family reads the vision tower's last state through the tower's own norm, where it has one.
    _reads_norm = True

    def __init__(self, model: Any) -> None:
        if not isinstance(getattr(model, "lm_head", None), nn.Linear):
            raise UserError(
                f"{type(model).__name__} has no language-model head; load the ForConditionalGeneration class"
            )
        self.model = model
        text = model.config.get_text_config()
        kind = str(text.model_type)
        if kind not in self.decoders:
            known = ", ".join(sorted(self.decoders))
            raise UserError(
                f"{type(model).__name__} has a decoder of type {kind!r}, which is not known to be exact here (mixtures "
                f"of experts, parallel blocks, cross-attention are not); choose one of: {known}"
            )
        self._kind = self.decoders[kind]
        self.n_layers = int(text.num_hidden_layers)
        self.d_model = int(text.hidden_size)
        self.n_heads = int(text.num_attention_heads)
        self.vocab_size = int(text.vocab_size)

    @property
    def dtype(self) -> torch.dtype:
        return self._layer(0).self_attn.o_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return computing_device(self._layer(0).self_attn.o_proj)

    @property
    def has_vision(self) -> bool:
        return True

    @property
    def logit_softcap(self) -> float | None:
        return None

    def decoder(self) -> Any:
        return self.model.model.language_model

    def _layer(self, layer: int) -> Any:
        return self.decoder().layers[layer]

    def attention(self, layer: int) -> nn.Module:
        return self._layer(layer).self_attn

    def mlp(self, layer: int) -> nn.Module:
        return self._layer(layer).mlp

    def norms(self, layer: int) -> LayerNorms:
        block = self._layer(layer)
        if not self._kind.post_norms:  # Llama's name for the norm before the MLP, after the attention
            return LayerNorms(block.input_layernorm, None, block.post_attention_layernorm, None)
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
        return self.norm_factor(norm, self.inverse_rms(norm, x), x.dtype).expand_as(x)

    def inverse_rms(self, norm: nn.Module, x: Tensor) -> Tensor:
        # Half precision is normalised in float32, as the model does.
        wide = x if x.dtype == torch.float64 else x.float()
        eps = float(getattr(norm, "eps", None) or norm.variance_epsilon)  # pyright: ignore[reportArgumentType]
        return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)

    def norm_factor(self, norm: nn.Module, inverse_rms: Tensor, dtype: torch.dtype) -> Tensor:
        if getattr(norm, "weight", None) is None:  # a norm of values has none
            return inverse_rms.to(dtype)
        return (inverse_rms * (self._kind.norm_offset + materialised(norm).to(inverse_rms.dtype))).to(dtype)

    def _values(self, layer: int) -> nn.Module:
        """The projection that makes the values."""
        return self._layer(layer).self_attn.v_proj

    def value_weight(self, layer: int) -> Tensor:
        return materialised(self._values(layer))

    def value_bias(self, layer: int) -> Tensor | None:
        projection = self._values(layer)
        return None if projection.bias is None else materialised(projection, "bias")

    def output_weight(self, layer: int) -> Tensor:
        return materialised(self._layer(layer).self_attn.o_proj)

    def output_bias(self, layer: int) -> Tensor | None:
        projection = self._layer(layer).self_attn.o_proj
        return None if projection.bias is None else materialised(projection, "bias")

    def score_parts(self, layer: int) -> ScoreParts:
        module = self._layer(layer).self_attn
        norms = (getattr(module, name, None) for name in ("q_norm", "k_norm"))
        return ScoreParts(module.q_proj, module.k_proj, *norms)

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        return user_turn(tokenizer, chat_template or self.chat_template, prompt, self.placeholder, n_images)

    def vision_tower(self) -> Any:
        return self.model.model.vision_tower

    def vision_attention(self) -> list[nn.Module]:
        return tower_attention(self.vision_tower(), self._read_states) if self.has_vision else []

    def vision_states(self) -> nn.Module:
        return tower_states(self.vision_tower(), self._read_states, self._reads_norm)

    @property
    def _read_states(self) -> int | list[int]:
        return getattr(self.model.config, "vision_feature_layer", -1)

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        kind = self.model.config.model_type
        raise UserError(f"it is not known where the vision tower of models of type {kind!r} holds its patches")

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        return [dialogue(tokenizer, chat_template or self.chat_template, exchanges, self.placeholder, n_images)]

    def soft_token_id(self) -> int | None:
        return int(self.model.config.image_token_id)
