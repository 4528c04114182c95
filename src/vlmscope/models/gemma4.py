"""Gemma 4 where every layer is dense, with pictures (`Gemma4ForConditionalGeneration`) and text only.

Each layer multiplies what leaves it by a constant; values are normalised head by head; full layers may have wider
heads, fewer of them for keys and values, and values that are the keys before their norm. All of it is affine once the
norms' scales are frozen. Per-layer embeddings, shared keys and values, and mixtures of experts are refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Gemma4ForConditionalGeneration

from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import grid_boxes
from vlmscope.models.decoders import Decoder, DecoderAdapter
from vlmscope.models.patches import PicturePatches, Tile, pooled
from vlmscope.models.template import Turn

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
