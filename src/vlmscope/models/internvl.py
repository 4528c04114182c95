"""InternVL (`InternVLForConditionalGeneration`): tiles of a picture, then the whole of it, pooled by pixel shuffle."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import tile_boxes
from vlmscope.models.decoders import DecoderAdapter


class InternVLAdapter(DecoderAdapter):
    """A picture that fits one tile best is seen as a whole alone."""

    placeholder = "<IMG_CONTEXT>"
    chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% for item in message['content'] %}{{ '<IMG_CONTEXT>\\n' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        vision = self.model.config.vision_config
        side = round(vision.image_size[0] // vision.patch_size[0] * self.model.config.downsample_ratio)
        found = []
        for width, height in sizes:
            tile = (image_processor.size["height"], image_processor.size["width"])
            columns, rows = get_optimal_tiled_canvas(
                (height, width), tile, image_processor.min_patches, image_processor.max_patches
            )
            found.append(tile_boxes(rows, columns, side) if rows * columns > 1 else tile_boxes(0, 0, side))
        return found


make_adapter = InternVLAdapter
