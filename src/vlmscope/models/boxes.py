"""Soft tokens, the patches that they pool, and the places of both in the picture, for every family.

A picture is one tile or several. The vision tower sees each as a grid of patches, in an order of its own: `Tile.tokens`
maps it back to rows. Boxes are fractions of the picture as it was given; x points right, y down.
Legend: P tokens of a tile, C class tokens among them, S soft tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from scipy import sparse

from vlmscope.core.errors import UserError
from vlmscope.core.records import PatchBox

WHOLE = PatchBox(0.0, 0.0, 1.0, 1.0)


def grid_boxes(rows: int, columns: int, window: PatchBox = WHOLE) -> list[PatchBox]:
    """The cells of a grid over a part of a picture, row by row, cut at the picture's edges.

    The window may reach beyond the picture, where the processor padded: a cell that is all padding has no area.
    """
    return [PatchBox(*(min(max(edge, 0.0), 1.0) for edge in cell)) for cell in grid_windows(rows, columns, window)]


def grid_windows(rows: int, columns: int, window: PatchBox) -> list[PatchBox]:
    """The cells of `grid_boxes`, not cut at the picture's edges, so that they can be divided further."""
    if not rows * columns:
        return []
    xs = [window.left + (window.right - window.left) * column / columns for column in range(columns + 1)]
    ys = [window.top + (window.bottom - window.top) * row / rows for row in range(rows + 1)]
    return [PatchBox(xs[c], ys[r], xs[c + 1], ys[r + 1]) for r in range(rows) for c in range(columns)]


def square_window(size: tuple[int, int]) -> PatchBox:
    """The square to which a processor pads a picture of this width and height, with the picture in its middle."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return PatchBox(left / width, top / height, (left + side) / width, (top + side) / height)


def seen_window(size: tuple[int, int], processor: Any) -> PatchBox:
    """The part of a picture of this width and height that a pad-resize-crop image processor shows to the tower."""
    width, height = size
    window = square_window(size) if getattr(processor, "do_pad", None) else WHOLE
    left, top = window.left * width, window.top * height
    across, down = (window.right - window.left) * width, (window.bottom - window.top) * height
    if processor.do_resize and processor.do_center_crop:
        resized_width, resized_height = _resized(across, down, processor.size)
        crop = processor.crop_size
        # Hugging Face crops whole pixels of the resized picture.
        left += (int(resized_width - crop["width"]) // 2) * across / resized_width
        top += (int(resized_height - crop["height"]) // 2) * down / resized_height
        across, down = crop["width"] * across / resized_width, crop["height"] * down / resized_height
    return PatchBox(left / width, top / height, (left + across) / width, (top + down) / height)


def _resized(width: float, height: float, size: Mapping[str, int]) -> tuple[int, int]:
    shortest = size.get("shortest_edge")
    if shortest is None:
        return size["width"], size["height"]
    longer = int(shortest * max(width, height) / min(width, height))
    return (shortest, longer) if width <= height else (longer, shortest)


class Tower(NamedTuple):
    """Names of a vision tower's parts ("" where it has none), and its number of class tokens.

    `patches` is the linear map or convolution from pixels to patch embeddings, `positions` the parameter of learned
    position embeddings, `class_token` that of class tokens, `norm` the norm of all tokens after the last layer.
    """

    layers: str
    attention: str
    patches: str
    positions: str = ""
    n_class: int = 0
    class_token: str = ""
    norm: str = ""


_SIGLIP = Tower(
    "encoder.layers", "self_attn", "embeddings.patch_embedding", "embeddings.position_embedding.weight",
    norm="post_layernorm",
)  # fmt: skip
# Towers whose attention can be recorded, because the modules call transformers' attention interface.
TOWERS = {
    # CLIP's norm is of the class token alone.
    "clip_vision_model": _SIGLIP._replace(n_class=1, class_token="embeddings.class_embedding", norm=""),
    "gemma4_vision": Tower(
        "encoder.layers", "self_attn", "patch_embedder.input_proj", "patch_embedder.position_embedding_table"
    ),
    "idefics3_vision": _SIGLIP,
    "internvl_vision": Tower(
        "encoder.layer",
        "attention",
        "embeddings.patch_embeddings.projection",
        "embeddings.position_embeddings",
        n_class=1,
        class_token="embeddings.cls_token",
        norm="layernorm",
    ),  # fmt: skip
    "qwen2_5_vl_vision": Tower("blocks", "attn", "patch_embed.proj"),
    "qwen3_vl_vision": Tower("blocks", "attn", "patch_embed.proj", "pos_embed.weight"),
    "siglip_vision_model": _SIGLIP,
    "smolvlm_vision": _SIGLIP,
}


def tower_kind(tower: Any) -> Tower:
    """The entry of a vision tower in `TOWERS`, or a `UserError` that names the known ones."""
    kind = str(tower.config.model_type)
    if kind not in TOWERS:
        raise UserError(
            f"the attention of a vision tower of type {kind!r} cannot be recorded; choose a model with one of: "
            f"{', '.join(sorted(TOWERS))}"
        )
    return TOWERS[kind]


@dataclass(frozen=True)
class Tile:
    """Patches that the tower sees together: class tokens first, then the grid row by row."""

    rows: int  # patches down
    columns: int  # patches across
    # `rows * columns` parts of the picture. A box without area is padding that the tower attends to; patches that the
    # tower masks are left out.
    boxes: list[PatchBox]
    # `[P]` int64, P = C + rows * columns: index of each among all tokens that one forward gives the tower.
    tokens: np.ndarray
    # `[rows * columns]` int64: index of each patch among the patch embeddings of that forward, where it differs from
    # `tokens` (class tokens, windows).
    embedded: np.ndarray | None = None

    @property
    def patches(self) -> np.ndarray:
        """`[rows * columns]` int64: index of each patch among the tower's patch embeddings."""
        return self.tokens if self.embedded is None else self.embedded

    @property
    def n_class(self) -> int:
        """C."""
        return len(self) - self.rows * self.columns

    def __len__(self) -> int:
        return len(self.tokens)


class PicturePatches(NamedTuple):
    """One picture in the tower: its tiles in the tower's order, and how their tokens are pooled to soft tokens.

    `pooling` is `[S, sum of P]` float64, columns tile by tile. Rows sum to 1; the row of a soft token without patches,
    such as the end of a line, is empty.
    """

    tiles: list[Tile]
    pooling: sparse.csr_array


def batched_tiles(windows: Sequence[Sequence[PatchBox]], rows: int, columns: int, n_class: int = 0) -> list[list[Tile]]:
    """The tiles of pictures whose tower takes them as a batch of equal sequences: class tokens, then patches.

    `windows` are the parts of each picture that its tiles show.
    """
    n_patches, numbers = rows * columns, count()

    def tile(window: PatchBox) -> Tile:
        number = next(numbers)
        tokens = np.arange(n_class + n_patches) + number * (n_class + n_patches)
        return Tile(rows, columns, grid_boxes(rows, columns, window), tokens, np.arange(n_patches) + number * n_patches)

    return [[tile(window) for window in picture] for picture in windows]


def merged_tiles(grids: Sequence[Sequence[int]], merge: int, window: int | None = None) -> list[Tile]:
    """One tile per picture, for towers that order patches in blocks of `merge * merge` (the Qwen line).

    `grids` are rows and columns of patches of each picture; `window` is the side of a window in blocks, where the tower
    orders its blocks window by window.
    """
    tiles, first = [], 0
    for rows, columns in grids:
        row, column = np.divmod(np.arange(rows * columns), columns)
        down, across = row // merge, column // merge
        keys = [column % merge, row % merge, across, down]  # lexsort: the last key is the primary one
        embedded = tokens = first + np.argsort(np.lexsort(keys))  # windows are formed after the embedding
        if window is not None:
            tokens = first + np.argsort(np.lexsort([*keys, across // window, down // window]))
        tiles.append(Tile(rows, columns, grid_boxes(rows, columns), tokens, embedded))
        first += rows * columns
    return tiles


def pool_tile(tile: Tile, factor: int = 1) -> sparse.csr_array:
    """`[S, P]`: means over the blocks of `factor * factor` patches of a tile, row by row.

    Patches that fill no block, and class tokens, are dropped.
    """

    def blocks(length: int) -> sparse.csr_array:
        """`[length // factor, length]`, the mean of each block."""
        cells = np.arange(length // factor * factor)
        means = (np.full(len(cells), 1 / factor), (cells // factor, cells))
        return sparse.csr_array(means, shape=(length // factor, length))

    class_tokens = sparse.csr_array(((tile.rows // factor) * (tile.columns // factor), tile.n_class))
    return sparse.csr_array(sparse.hstack([class_tokens, sparse.kron(blocks(tile.rows), blocks(tile.columns))]))


def pooled(tiles: Sequence[Tile], factor: int = 1) -> PicturePatches:
    """A picture whose soft tokens are the pooled patches of its tiles, in their order."""
    pooling = sparse.block_diag([pool_tile(tile, factor) for tile in tiles])
    return PicturePatches(list(tiles), sparse.csr_array(pooling))


def masked(
    pictures: Sequence[PicturePatches], windows: Sequence[Sequence[PatchBox]], seen: np.ndarray
) -> list[PicturePatches]:
    """The same pictures without the patches that the tower masks, which are below and to the right of the others.

    Tiles have no class tokens; `windows` are the parts of the picture that each shows in its remaining patches; `seen`
    is `[tiles of all pictures, rows, columns]` bool.
    """
    masks, remaining = iter(seen), []
    for picture, parts in zip(pictures, windows, strict=True):
        tiles, inside = [], []
        for tile, window in zip(picture.tiles, parts, strict=True):
            mask = next(masks)
            rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
            inside.append(mask.ravel())
            boxes = grid_boxes(rows, columns, window)
            tiles.append(Tile(rows, columns, boxes, tile.tokens[inside[-1]], tile.patches[inside[-1]]))
        pooling = picture.pooling[:, np.concatenate(inside)]
        total = pooling.sum(axis=1)  # rows are to sum to 1 again
        scale = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        remaining.append(PicturePatches(tiles, sparse.csr_array(sparse.diags_array(scale) @ pooling)))
    return remaining
