"""Idefics3 and SmolVLM: a picture as a grid of tiles and once as a whole, each tile's patches pooled by pixel shuffle.

Row and column tokens between the tiles are text. A picture no larger than a tile is seen as a whole alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import tile_boxes
from vlmscope.models.decoders import DecoderAdapter
from vlmscope.models.patches import PicturePatches, batched_tiles, masked, pooled


class Idefics3Adapter(DecoderAdapter):
    """Both families; their processors cut pictures in the same way."""

    chat_template = (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{{ ':' if message['content'][0]['type'] == 'image' else ': ' }}"
        "{% for item in message['content'] %}{{ '<image>' if item['type'] == 'image' else item['text'] }}{% endfor %}"
        "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )

    def decoder(self) -> nn.Module:
        return self.model.model.text_model

    def vision_tower(self) -> Any:
        return self.model.model.vision_model

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        side = self._side // int(self.model.config.scale_factor)
        return [tile_boxes(*self._tiles(size, image_processor), side) for size in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        windows = [tile_boxes(*self._tiles(size, image_processor), 1) for size in sizes]
        tiles = batched_tiles(windows, self._side, self._side)
        pictures = [pooled(found, int(self.model.config.scale_factor)) for found in tiles]
        mask = tensors.get("pixel_attention_mask")
        if mask is None or bool(mask.all()):
            return pictures
        # The tower masks a patch only if it is padding alone.
        pixels, patch = mask[0].float(), int(self.model.config.vision_config.patch_size)
        seen = torch.nn.functional.max_pool2d(pixels, patch).bool().numpy(force=True)
        return masked(pictures, windows, seen)

    @property
    def _side(self) -> int:
        """Patches down and across a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def _tiles(self, size: tuple[int, int], image_processor: Any) -> tuple[int, int]:
        """Rows and columns of tiles beside the whole picture."""
        # Tiles are cut from the picture resized to whole tiles, so they cover all of it, whatever its aspect ratio.
        width, height = size
        return image_processor.get_number_of_image_patches(height, width)[1:]
