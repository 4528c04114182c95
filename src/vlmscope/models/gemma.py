"""Adapters of Gemma 3, Gemma 4 and PaliGemma.

Gemma 3, with pictures (`Gemma3ForConditionalGeneration`) and text only (`Gemma3ForCausalLM`).

Embeddings are scaled by sqrt(d); sliding and full layers have their own RoPE base; soft tokens of one picture see each
other. None of it matters to attribution, which takes the attention patterns and the embeddings as the model computed
them.

Gemma 4 where every layer is dense, with pictures (`Gemma4ForConditionalGeneration`) and text only.

Each layer multiplies what leaves it by a constant; values are normalised head by head; full layers may have wider
heads, fewer of them for keys and values, and values that are the keys before their norm. All of it is affine once the
norms' scales are frozen. Per-layer embeddings, shared keys and values, and mixtures of experts are refused by name.

PaliGemma (Gemma decoder) and PaliGemma 2 (Gemma 2): a SigLIP tower's patches as soft tokens before the prompt.

Everything up to the answer sees everything (`token_type_ids` is 0 there); generated tokens are causal. Gemma 2's cap on
attention scores is part of the frozen patterns; of logits that it caps, graphs explain those before the cap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Gemma3ForConditionalGeneration, Gemma4ForConditionalGeneration

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox
from vlmscope.models.boxes import WHOLE, PicturePatches, Tile, batched_tiles, grid_boxes, pooled
from vlmscope.models.decoders import Decoder, DecoderAdapter
from vlmscope.models.template import Dialogue, Span, Turn, spelt_placeholders


class Gemma3Adapter(DecoderAdapter):
    """Both Gemma 3 classes; the text model is `decoder()` in either."""

    placeholder = "<start_of_image>"
    # The published one, but that it takes what is said verbatim (theirs trims it).
    chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ item['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    )

    @property
    def has_vision(self) -> bool:
        return isinstance(self.model, Gemma3ForConditionalGeneration)

    @property
    def logit_softcap(self) -> float | None:
        # Hugging Face applies the cap in the text-only class alone.
        return None if self.has_vision else self.model.config.final_logit_softcapping

    def decoder(self) -> Any:
        return self.model.model.language_model if self.has_vision else self.model.model

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        self._check(prompt, n_images, tokenizer)
        return super().wrap_prompt(prompt, n_images, tokenizer, chat_template)

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        self._check("".join(text for exchange in exchanges for text in exchange), n_images, tokenizer)
        return super().wrap_exchanges(exchanges, n_images, tokenizer, chat_template)

    def _check(self, text: str, n_images: int, tokenizer: Any) -> None:
        if self.has_vision and tokenizer.image_token in text:
            raise UserError(
                f"the prompt spells {tokenizer.image_token}; write {self.placeholder} once for each picture"
            )
        if n_images and not self.has_vision:
            raise UserError(
                f"{type(self.model).__name__} takes no pictures but {n_images} were given; leave image= out"
            )

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        # The projector pools patches in row-major order and the processor resizes the whole picture without cropping.
        side = round(int(self.model.config.mm_tokens_per_image) ** 0.5) if self.has_vision else 0
        return [grid_boxes(side, side) for _ in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        vision = self.model.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        factor = side // round(int(self.model.config.mm_tokens_per_image) ** 0.5)
        return [pooled(tiles, factor) for tiles in batched_tiles([[WHOLE] for _ in sizes], side, side)]

    def soft_token_id(self) -> int | None:
        return super().soft_token_id() if self.has_vision else None


# Setting -> what it switches on. Each makes a layer depend on more than the stream that enters it.
_REFUSED = {
    "hidden_size_per_layer_input": "per-layer embeddings, as in E2B and E4B",
    "num_kv_shared_layers": "layers that reuse keys and values of earlier ones",
    "enable_moe_block": "mixture-of-experts MLPs, as in 26B-A4B",
}


class Gemma4Adapter(DecoderAdapter):
    """Pictures keep their shape: the grid of soft tokens follows it, and nothing is cut off.

    Raises:
        UserError: when the decoder has a part that the replacement model does not represent exactly.
    """

    placeholder = "<|image|>"
    decoders = {"gemma4_text": Decoder(norm_offset=0.0, post_norms=True)}
    chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
        "{% for item in message['content'] %}{{ '<|image|>' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %}{{ '<turn|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        text = model.config.get_text_config()
        for setting, part in _REFUSED.items():
            if getattr(text, setting, None):
                raise UserError(
                    f"{type(model).__name__} has {part} ({setting} = {getattr(text, setting)}), which attribution does "
                    "not cover; choose a dense Gemma 4, such as 31B"
                )

    @property
    def has_vision(self) -> bool:
        return isinstance(self.model, Gemma4ForConditionalGeneration) and self.model.config.vision_config is not None

    @property
    def logit_softcap(self) -> float | None:
        return self.model.config.get_text_config().final_logit_softcapping

    def decoder(self) -> Any:
        whole = isinstance(self.model, Gemma4ForConditionalGeneration)
        return self.model.model.language_model if whole else self.model.model

    def value_norm(self, layer: int) -> nn.Module | None:
        return self._layer(layer).self_attn.v_norm

    def _values(self, layer: int) -> nn.Module:
        attention = self._layer(layer).self_attn
        return attention.k_proj if attention.v_proj is None else attention.v_proj

    def stream_scale(self, layer: int) -> float:
        return float(self._layer(layer).layer_scalar)

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        if n_images and not self.has_vision:
            raise UserError(
                f"{type(self.model).__name__} takes no pictures but {n_images} were given; leave image= out"
            )
        return super().wrap_prompt(prompt, n_images, tokenizer, chat_template)

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        if not sizes:
            return []
        pooled = int(self.model.config.vision_config.pooling_kernel_size)
        # Column and row of every patch, -1 for padding; pooling goes row by row.
        grids = (tensors["image_position_ids"].amax(1) + 1) // pooled
        return [grid_boxes(rows, columns) for columns, rows in grids.tolist()]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        places = tensors["image_position_ids"]
        pooling = int(self.model.config.vision_config.pooling_kernel_size)
        pictures = []
        for number, (columns, rows) in enumerate((places.amax(1) + 1).tolist()):
            # Patches stand row by row, behind them padding that the tower masks.
            tokens = number * places.shape[1] + np.arange(rows * columns)
            pictures.append(pooled([Tile(rows, columns, grid_boxes(rows, columns), tokens)], pooling))
        return pictures

    def soft_token_id(self) -> int | None:
        return super().soft_token_id() if self.has_vision else None


class PaliGemmaAdapter(DecoderAdapter):
    """One soft token a patch of the whole picture, resized without cropping."""

    needs_pictures = True
    answer_type = 1

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        # There is no chat: the processor adds the first token after the pictures and a newline after the prompt.
        if not n_images:
            raise UserError("PaliGemma answers about pictures only; give at least one")
        lead = "" if spelt_placeholders(prompt, self.placeholder, n_images) else self.placeholder * n_images
        return Turn(lead, prompt, "")

    def completed_turn(self, turn: Turn, tokenizer: Any) -> Turn:
        bos = tokenizer.bos_token
        if not turn.before:  # the user placed the pictures
            end = turn.content.rfind(self.placeholder) + len(self.placeholder)
            return Turn("", turn.content[:end] + bos + turn.content[end:], "\n")
        return Turn(turn.before + bos, turn.content, "\n")

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        if any(self.placeholder in exchange.assistant for exchange in exchanges):
            raise UserError(f"an answer spells {self.placeholder}, which stands for a picture; take it out")
        prompts = [self.wrap_prompt(exchange.user, n_images, tokenizer) for exchange in exchanges]
        return [
            Dialogue((Span(prompt.text, False),), suffix=exchange.assistant)
            for prompt, exchange in zip(prompts, exchanges, strict=True)
        ]

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        return [grid_boxes(self._side, self._side) for _ in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        return [pooled(tiles) for tiles in batched_tiles([[WHOLE] for _ in sizes], self._side, self._side)]

    @property
    def _side(self) -> int:
        """Patches down and across a picture."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)
