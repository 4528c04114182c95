"""LLaVA-1.5 (`LlavaForConditionalGeneration`): a ViT's patches, each through a two-layer projector, as soft tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from scipy import sparse
from torch import Tensor

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import grid_boxes, seen_window
from vlmscope.models.decoders import DecoderAdapter
from vlmscope.models.patches import PicturePatches, batched_tiles
from vlmscope.models.towers import tower_kind


class LlavaAdapter(DecoderAdapter):
    """One soft token a patch, in row-major order; the class token, where the model keeps it, stands for the whole."""

    _reads_norm = False

    chat_template = (
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% for item in message['content'] %}{{ '<image>\\n' if item['type'] == 'image' else item['text'] }}"
        "{% endfor %} {% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        rows, columns = self._grid(tensors) if sizes else (0, 0)
        windows = [seen_window(size, image_processor) for size in sizes]
        tokens = int((tensors["input_ids"] == self.soft_token_id()).sum()) // max(len(sizes), 1)
        extra = tokens - rows * columns  # the class token, unless `vision_feature_select_strategy` drops it
        return [grid_boxes(1, 1, window) * extra + grid_boxes(rows, columns, window) for window in windows]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        n_class = tower_kind(self.vision_tower()).n_class
        windows = [[seen_window(size, image_processor)] for size in sizes]
        drops = self.model.config.vision_feature_select_strategy == "default"  # the first token, whatever the tower
        pictures = []
        for tiles in batched_tiles(windows, *self._grid(tensors), n_class):
            every = sparse.csr_array(sparse.eye_array(len(tiles[0])))
            pictures.append(PicturePatches(tiles, every[1:] if drops else every))
        return pictures

    def _grid(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of patches."""
        patch = int(self.model.config.vision_config.patch_size)
        height, width = tensors["pixel_values"].shape[-2:]
        return height // patch, width // patch
