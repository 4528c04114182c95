"""Idefics3 and SmolVLM: a picture as a grid of tiles and once as a whole, each tile's patches pooled by pixel shuffle.

Row and column tokens between the tiles are text. A picture no larger than a tile is seen as a whole alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import tile_boxes
from vlmscope.models.decoders import DecoderAdapter


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

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        vision = self.model.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size) // int(self.model.config.scale_factor)
        # Tiles are cut from the picture resized to whole tiles, so they cover all of it, whatever its aspect ratio.
        grids = [image_processor.get_number_of_image_patches(height, width)[1:] for width, height in sizes]
        return [tile_boxes(rows, columns, side) for rows, columns in grids]


make_adapter = Idefics3Adapter
