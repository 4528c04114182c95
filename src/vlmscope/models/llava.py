"""Adapters of LLaVA, LLaVA-OneVision, Idefics3 (SmolVLM) and InternVL.

LLaVA-1.5 (`LlavaForConditionalGeneration`): a ViT's patches, each through a two-layer projector, as soft tokens.

LLaVA-OneVision (`LlavaOnevisionForConditionalGeneration`): one picture in several resolutions, several in one.

A single picture is seen whole, then as tiles that keep its aspect ratio, their tokens laid out in rows that end with a
learned token; of several pictures each is padded to a square and ends with one such token.

Idefics3 and SmolVLM: a picture as a grid of tiles and once as a whole, each tile's patches pooled by pixel shuffle.

Row and column tokens between the tiles are text. A picture no larger than a tile is seen as a whole alone.

InternVL (`InternVLForConditionalGeneration`): tiles of a picture, then the whole of it, pooled by pixel shuffle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

from vlmscope.core.records import PatchBox
from vlmscope.models.boxes import (
    WHOLE,
    PicturePatches,
    batched_tiles,
    grid_boxes,
    grid_windows,
    masked,
    pool_tile,
    pooled,
    seen_window,
    square_window,
    tile_boxes,
    tower_kind,
)
from vlmscope.models.decoders import DecoderAdapter


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


@dataclass(frozen=True)
class _Canvas:
    """A picture laid out on tiles, as the model makes rows of tokens of it.

    Attributes:
        tiles: tiles down and across.
        window: the part of the picture that all tiles together show; it reaches beyond the picture.
        kept_rows: patches down, those of padding alone left out, int64; none of a strip thinner than a patch
            where their number in a tile is even.
        kept_columns: patches across, likewise.
        shape: rows and columns of soft tokens, fewer than patches where there are too many; each row has an end beside.
    """

    tiles: tuple[int, int]
    window: PatchBox
    kept_rows: np.ndarray
    kept_columns: np.ndarray
    shape: tuple[int, int]

    def boxes(self, side: int) -> list[PatchBox]:
        """The boxes of the tokens, each row's end included, with tiles of `side * side` patches."""
        rows, columns = self.shape
        if not rows:
            return []
        width, height = self.window.right - self.window.left, self.window.bottom - self.window.top
        down, across = (number * side for number in self.tiles)
        left, right = (self.kept_columns[0], self.kept_columns[-1] + 1) if columns else (0, across)
        window = PatchBox(
            self.window.left + width * left / across,
            self.window.top + height * self.kept_rows[0] / down,
            self.window.left + width * right / across,
            self.window.top + height * (self.kept_rows[-1] + 1) / down,
        )
        boxes, whole = grid_boxes(rows, columns, window), grid_boxes(rows, 1, window)
        found: list[PatchBox] = []
        for row in range(rows):
            line = boxes[row * columns : (row + 1) * columns]
            end = line[-1] if line else whole[row]
            found += [*line, PatchBox(end.right, end.top, end.right, end.bottom)]
        return found

    def pooling(self, side: int, n_class: int) -> sparse.csr_array:
        """`[rows * (columns + 1), sum of P]`: what each token takes from the tiles' tokens, ends nothing."""
        down, across = (number * side for number in self.tiles)
        rows, columns = self.shape
        n_tokens = self.tiles[0] * self.tiles[1] * (n_class + side * side)
        if not rows * columns:
            return sparse.csr_array((rows * (columns + 1), n_tokens))
        grid = sparse.coo_array(
            sparse.kron(_resized(self.kept_rows, down, rows), _resized(self.kept_columns, across, columns))
        )
        row, column = np.divmod(grid.col, across)
        tile = row // side * self.tiles[1] + column // side
        source = tile * (n_class + side * side) + n_class + row % side * side + column % side
        target = grid.row // columns * (columns + 1) + grid.row % columns
        return sparse.csr_array((grid.data, (target, source)), shape=(rows * (columns + 1), n_tokens))


def _resized(kept: np.ndarray, length: int, wanted: int) -> np.ndarray:
    """`[wanted, length]`: linear interpolation of the kept cells, the identity when as many are wanted."""
    cells = torch.eye(len(kept), dtype=torch.float64)
    found = np.zeros((wanted, length))
    found[:, kept] = torch.nn.functional.interpolate(cells[None], size=wanted, mode="linear")[0].T.numpy()
    return found


class LlavaOnevisionAdapter(DecoderAdapter):
    """Boxes depend on the picture's size; tokens that end a row have a box without area at the row's end."""

    _reads_norm = False

    chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
        "{% for item in message['content'] %}{{ '<image>' if item['type'] == 'image' else '\\n' + item['text'] }}"
        "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )

    def soft_token_boxes(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[list[PatchBox]]:
        side = self._side
        if len(sizes) == 1:
            return [grid_boxes(side, side) + self._canvas(sizes[0]).boxes(side)]
        end = PatchBox(1.0, 1.0, 1.0, 1.0)
        return [[*grid_boxes(side, side, square_window(size)), end] for size in sizes]

    def picture_patches(
        self, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]], image_processor: Any
    ) -> list[PicturePatches]:
        side, n_class = self._side, tower_kind(self.vision_tower()).n_class
        if len(sizes) > 1:
            tiles = batched_tiles([[square_window(size)] for size in sizes], side, side, n_class)
            end = sparse.csr_array((1, side * side + n_class))
            return [PicturePatches(t, sparse.csr_array(sparse.vstack([pool_tile(t[0]), end]))) for t in tiles]
        canvas = self._canvas(sizes[0])
        windows = [[WHOLE, *grid_windows(*canvas.tiles, canvas.window)]]
        (tiles,) = batched_tiles(windows, side, side, n_class)
        pooling = sparse.block_diag([pool_tile(tiles[0]), canvas.pooling(side, n_class)])
        return [PicturePatches(tiles, sparse.csr_array(pooling))]

    @property
    def _side(self) -> int:
        """Patches down and across a tile."""
        vision = self.model.config.vision_config
        return int(vision.image_size) // int(vision.patch_size)

    def _canvas(self, size: tuple[int, int]) -> _Canvas:
        config, (width, height), side = self.model.config, size, self._side
        best = select_best_resolution((height, width), config.image_grid_pinpoints)
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        down, across = get_patch_output_size(blank, best, ChannelDimension.FIRST)
        # The resized picture lies in the middle of the tiles, and the model drops rows or columns of padding alone.
        top, left = (best[0] - down) // 2, (best[1] - across) // 2
        window = PatchBox(-left / across, -top / down, (best[1] - left) / across, (best[0] - top) / down)
        tiles = (best[0] // int(config.vision_config.image_size), best[1] // int(config.vision_config.image_size))
        rows, columns = (number * side for number in tiles)
        kept = unpad_image(torch.empty(1, rows, columns), (height, width)).shape[1:]
        # As many are dropped on both sides, of a strip thinner than a patch perhaps all: the ends of rows are left.
        kept_rows, kept_columns = (
            np.arange((n - k) // 2, (n + k) // 2) for n, k in zip((rows, columns), kept, strict=True)
        )
        rows, columns = kept
        ratio = math.sqrt(rows * columns / (int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2))
        shape = (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
        return _Canvas(tiles, window, kept_rows, kept_columns, shape)


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
