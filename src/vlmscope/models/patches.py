"""The patches that a vision tower sees of a picture, and what each soft token takes from them.

A picture is one tile or several. Of each the tower sees a grid of patches, which it may hold in an order of its own:
`Tile.tokens` is the way back to rows. Legend: P tokens of a tile, C class tokens among them, S soft tokens of a
picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from scipy import sparse

from vlmscope.core.images import PatchBox
from vlmscope.models.boxes import WHOLE, grid_boxes


@dataclass(frozen=True)
class Tile:
    """Patches that the tower sees together: class tokens first, then the grid row by row.

    Attributes:
        rows: patches down.
        columns: patches across.
        boxes: `rows * columns` parts of the picture. One without area shows padding that the tower attends to like
            anything else; patches that the tower masks are no patches.
        tokens: `[P]` int64, P = C + rows * columns: which of the tower's tokens each is, counted through all that one
            forward gives the tower, in its order.
        embedded: `[rows * columns]` int64: which of the tower's patch embeddings each patch is, counted likewise, where
            that is not what `tokens` says (class tokens, windows).
    """

    rows: int
    columns: int
    boxes: list[PatchBox]
    tokens: np.ndarray
    embedded: np.ndarray | None = None

    @property
    def patches(self) -> np.ndarray:
        """`[rows * columns]` int64: which of the tower's patch embeddings each patch is."""
        return self.tokens if self.embedded is None else self.embedded

    @property
    def n_class(self) -> int:
        """C."""
        return len(self) - self.rows * self.columns

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class PicturePatches:
    """One picture in the tower.

    Attributes:
        tiles: in the order of the tower.
        pooling: `[S, sum of P]` float64, columns tile by tile: how much of each tower token goes into a soft token.
            Rows sum to 1; that of a soft token of no patch, such as the end of a row, is empty.
    """

    tiles: list[Tile]
    pooling: sparse.csr_array


def batched_tiles(windows: Sequence[Sequence[PatchBox]], rows: int, columns: int, n_class: int = 0) -> list[list[Tile]]:
    """The tiles of pictures whose tower takes them as a batch of equal sequences.

    Args:
        windows: for each picture the part that each tile shows.
        rows: patches down a tile.
        columns: patches across a tile.
        n_class: class tokens before the patches.
    """
    n_patches, numbers = rows * columns, count()

    def tile(window: PatchBox, number: int) -> Tile:
        tokens = np.arange(n_class + n_patches) + number * (n_class + n_patches)
        return Tile(rows, columns, grid_boxes(rows, columns, window), tokens, np.arange(n_patches) + number * n_patches)

    return [[tile(window, number) for window, number in zip(found, numbers, strict=False)] for found in windows]


def merged_tiles(grids: Sequence[Sequence[int]], merge: int, window: int | None = None) -> list[Tile]:
    """One tile a picture, for towers that hold patches in blocks of `merge * merge` (the Qwen line).

    Args:
        grids: rows and columns of patches of each picture.
        merge: patches down and across a block.
        window: blocks down and across a window, for a tower that holds its blocks window by window.
    """
    tiles, first = [], 0
    for rows, columns in grids:
        row, column = np.divmod(np.arange(rows * columns), columns)
        down, across = row // merge, column // merge
        keys = [column % merge, row % merge, across, down]  # the last decides first
        embedded = tokens = first + np.argsort(np.lexsort(keys))  # windows are made of what is embedded
        if window is not None:
            tokens = first + np.argsort(np.lexsort([*keys, across // window, down // window]))
        tiles.append(Tile(rows, columns, grid_boxes(rows, columns, WHOLE), tokens, embedded))
        first += rows * columns
    return tiles


def pool_tile(tile: Tile, factor: int = 1) -> sparse.csr_array:
    """`[S, P]`: soft tokens that are the blocks of `factor * factor` patches of a tile, row by row.

    Patches that fill no block, and class tokens, go nowhere.
    """
    grid = sparse.kron(_blocks(tile.rows, factor), _blocks(tile.columns, factor))
    n_soft = (tile.rows // factor) * (tile.columns // factor)
    return sparse.csr_array(sparse.hstack([sparse.csr_array((n_soft, tile.n_class)), grid]))


def _blocks(length: int, factor: int) -> sparse.csr_array:
    """`[length // factor, length]`, the mean of each block."""
    used = length // factor * factor
    cells = np.arange(used)
    shape = (length // factor, length)
    return sparse.csr_array((np.full(used, 1 / factor), (cells // factor, cells)), shape=shape)


def pooled(tiles: Sequence[Tile], factor: int = 1) -> PicturePatches:
    """A picture whose soft tokens are the pooled patches of each tile, tile after tile."""
    pooling = sparse.block_diag([pool_tile(tile, factor) for tile in tiles])
    return PicturePatches(list(tiles), sparse.csr_array(pooling))


def masked(
    pictures: Sequence[PicturePatches], windows: Sequence[Sequence[PatchBox]], seen: np.ndarray
) -> list[PicturePatches]:
    """The same pictures without the patches that the tower masks, which lie below and to the right of the others.

    Args:
        pictures: made of tiles without class tokens.
        windows: for each picture the part that each tile shows in the patches that are left.
        seen: `[tiles of all pictures, rows, columns]` bool.
    """
    kept, left = iter(seen), []
    for picture, found in zip(pictures, windows, strict=True):
        masks = [next(kept) for _ in picture.tiles]
        tiles = []
        for tile, window, mask in zip(picture.tiles, found, masks, strict=True):
            rows, columns = int(mask.any(1).sum()), int(mask.any(0).sum())
            boxes, inside = grid_boxes(rows, columns, window), mask.ravel()
            tiles.append(Tile(rows, columns, boxes, tile.tokens[inside], tile.patches[inside]))
        pooling = picture.pooling[:, np.concatenate(masks, axis=None)]
        total = pooling.sum(axis=1)
        scale = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
        left.append(PicturePatches(tiles, sparse.csr_array(sparse.diags_array(scale) @ pooling)))
    return left
