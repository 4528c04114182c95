"""Qwen3-VL (`Qwen3VLForConditionalGeneration`): Qwen2.5-VL's pictures, and DeepStack (arXiv 2406.04334).

DeepStack adds features of earlier tower layers to the soft tokens again after the first decoder layers. For the decoder
these are constants, so the replacement model stays affine: `injections` of a soft token belong to its source.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmscope.models.base import INJECTIONS
from vlmscope.models.patches import PicturePatches, merged_tiles, pooled
from vlmscope.models.qwen2_5_vl import Qwen2_5_VLAdapter


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
