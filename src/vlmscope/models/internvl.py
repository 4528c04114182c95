"""InternVL (`InternVLForConditionalGeneration`): tiles of a picture, then the whole of it, pooled by pixel shuffle."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import tile_boxes
from vlmscope.models.decoders import DecoderAdapter
from vlmscope.models.patches import PicturePatches, batched_tiles, pooled
from vlmscope.models.towers import tower_kind


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
        side = round(self._side * self.model.config.downsample_ratio)
        return [tile_boxes(*self._tiles(size, image_processor), side) for size in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        windows = [tile_boxes(*self._tiles(size, image_processor), 1) for size in sizes]
        n_class = tower_kind(self.vision_tower()).n_class
        tiles = batched_tiles(windows, self._side, self._side, n_class)
        return [pooled(found, round(1 / self.model.config.downsample_ratio)) for found in tiles]

    @property
    def _side(self) -> int:
        """Patches down and across a tile."""
        vision = self.model.config.vision_config
        return vision.image_size[0] // vision.patch_size[0]

    def _tiles(self, size: tuple[int, int], image_processor: Any) -> tuple[int, int]:
        """Rows and columns of tiles beside the whole picture."""
        width, height = size
        tile = (image_processor.size["height"], image_processor.size["width"])
        columns, rows = get_optimal_tiled_canvas(
            (height, width), tile, image_processor.min_patches, image_processor.max_patches
        )
        return (rows, columns) if rows * columns > 1 else (0, 0)
