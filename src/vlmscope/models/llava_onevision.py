"""LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): one picture in several resolutions, several in one.

A single picture is seen whole, then as tiles that keep its aspect ratio, their tokens laid out in rows that end with a
learned token; of several pictures each is padded to a square and ends with one such token.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import grid_boxes, square_window
from vlmscope.models.decoders import DecoderAdapter


class LlavaOnevisionAdapter(DecoderAdapter):
    """Boxes depend on the picture's size; tokens that end a row have a box without area at the row's end."""

    chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{% for item in message['content'] %}{{ '<image>' if item['type'] == 'image' else '\\n' + item['text'] }}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        vision = self.model.config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        if len(sizes) == 1:
            return [grid_boxes(side, side) + self._tiles(sizes[0], side)]
        end = PatchBox(1.0, 1.0, 1.0, 1.0)
        return [[*grid_boxes(side, side, square_window(size)), end] for size in sizes]

    def _tiles(self, size: tuple[int, int], side: int) -> list[PatchBox]:
        """The boxes of the tiles' tokens, with tiles of `side * side` tokens, each row's end included."""
        config, (width, height) = self.model.config, size
        best = select_best_resolution((height, width), config.image_grid_pinpoints)
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        down, across = get_patch_output_size(blank, best, ChannelDimension.FIRST)
        # The resized picture lies in the middle of the tiles, and the model drops rows or columns of padding alone.
        top, left = (best[0] - down) // 2, (best[1] - across) // 2
        cell = int(config.vision_config.image_size) / side
        rows, columns = (round(length / cell) for length in best)
        numbers = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"))
        kept = unpad_image(numbers, (height, width))
        first, last = kept[:, 0, 0].tolist(), kept[:, -1, -1].tolist()
        window = PatchBox(
            (first[1] * cell - left) / across,
            (first[0] * cell - top) / down,
            ((last[1] + 1) * cell - left) / across,
            ((last[0] + 1) * cell - top) / down,
        )
        rows, columns = kept.shape[1:]
        ratio = math.sqrt(rows * columns / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        boxes = grid_boxes(rows, columns, window)
        found: list[PatchBox] = []
        for row in range(rows):
            line = boxes[row * columns : (row + 1) * columns]
            found += [*line, PatchBox(line[-1].right, line[-1].top, line[-1].right, line[-1].bottom)]
        return found


make_adapter = LlavaOnevisionAdapter
