"""Adapters of Qwen2.5-VL and Qwen3-VL.

Qwen2.5-VL (`Qwen2_5_VLForConditionalGeneration`): pictures at nearly their own resolution, 4 patches a soft token.

Soft tokens have positions in rows and columns (M-RoPE), which matter to attention patterns alone, and these are frozen.

Qwen3-VL (`Qwen3VLForConditionalGeneration`): Qwen2.5-VL's pictures, and DeepStack (arXiv 2406.04334).

DeepStack adds features of earlier tower layers to the soft tokens again after the first decoder layers. For the decoder
these are constants, so the replacement model stays affine: `injections` of a soft token belong to its source.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox
from vlmscope.models.base import INJECTIONS
from vlmscope.models.boxes import PicturePatches, grid_boxes, merged_tiles, pooled
from vlmscope.models.decoders import DecoderAdapter
from vlmscope.models.template import Dialogue, Turn


class Qwen2_5_VLAdapter(DecoderAdapter):
    """The grid of soft tokens follows the picture's shape; nothing is cut off or padded."""

    m_rope = True
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    chat_template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for item in message['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def vision_tower(self) -> Any:
        return self.model.model.visual

    def positions_used(self, tensors: Mapping[str, Tensor]) -> int:
        if "image_grid_thw" not in tensors:
            return super().positions_used(tensors)
        # A picture takes as many positions as its longer side has soft tokens.
        grids = tensors["image_grid_thw"].clone()
        grids[:, 1:] //= int(self.model.config.vision_config.spatial_merge_size)
        saved = int((grids.prod(1) - grids.amax(1)).sum()) // len(tensors["input_ids"])
        return super().positions_used(tensors) - saved

    def wrap_prompt(self, prompt: str, n_images: int, tokenizer: Any, chat_template: str | None = None) -> Turn:
        self._refuse_pads(prompt)
        return super().wrap_prompt(prompt, n_images, tokenizer, chat_template)

    def wrap_exchanges(
        self, exchanges: Sequence[Exchange], n_images: int, tokenizer: Any, chat_template: str | None = None
    ) -> list[Dialogue]:
        for exchange in exchanges:
            self._refuse_pads(exchange.user)
            self._refuse_pads(exchange.assistant)
        return super().wrap_exchanges(exchanges, n_images, tokenizer, chat_template)

    def _refuse_pads(self, text: str) -> None:
        if text.count("<|image_pad|>") != text.count(self.placeholder):
            raise UserError(f"the prompt spells <|image_pad|>; write {self.placeholder} once for each picture")

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        merge = int(self.model.config.vision_config.spatial_merge_size)
        grids = tensors["image_grid_thw"].tolist() if sizes else []
        return [grid_boxes(rows // merge, columns // merge) for _, rows, columns in grids]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        vision = self.model.config.vision_config
        merge = int(vision.spatial_merge_size)
        grids = [(rows, columns) for _, rows, columns in tensors["image_grid_thw"].tolist()]
        tiles = merged_tiles(grids, merge, vision.window_size // merge // vision.patch_size)
        return [pooled([tile], merge) for tile in tiles]


class Qwen3VLAdapter(Qwen2_5_VLAdapter):
    """Positions in rows and columns as in Qwen2.5-VL; the usual template has no system turn."""

    chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for item in message['content'] %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def forward(self, tensors: Mapping[str, Tensor], **settings: Any) -> Any:
        own = {name: tensor for name, tensor in tensors.items() if name != INJECTIONS}
        injections = tensors.get(INJECTIONS)
        if injections is None:
            return self.model(**own, **settings)

        def hook(_module: object, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            size, n_layers, length, width = injections.shape
            everywhere = torch.ones(size, length, dtype=torch.bool, device=injections.device)
            rows = [injections[:, layer].reshape(-1, width) for layer in range(n_layers)]
            return args, {**kwargs, "visual_pos_masks": everywhere, "deepstack_visual_embeds": rows}

        # The model's forward takes DeepStack's features from pixels only; its decoder takes them as they are.
        handle = self.decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return self.model(**own, **settings)
        finally:
            handle.remove()

    def injections(self, decoder_arguments: Mapping[str, Any]) -> Tensor | None:
        features = decoder_arguments.get("deepstack_visual_embeds")
        if not features:
            return None
        where, embeddings = decoder_arguments["visual_pos_masks"], decoder_arguments["inputs_embeds"]
        size, length, width = embeddings.shape
        dense = embeddings.new_zeros(size, len(features), length, width)
        for layer, rows in enumerate(features):
            dense[:, layer][where] = rows.to(dense)
        return dense

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        merge = int(self.model.config.vision_config.spatial_merge_size)
        grids = [(rows, columns) for _, rows, columns in tensors["image_grid_thw"].tolist()]
        return [pooled([tile], merge) for tile in merged_tiles(grids, merge)]
