"""What the patches of a picture attend to in the vision tower.

Legend: H heads, P tokens of a tile (class tokens, then patches row by row), S soft tokens of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.models.attention import recording_vision_patterns
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import make_batch
from vlmscope.models.loading import VLM
from vlmscope.models.patches import Tile


@dataclass(frozen=True)
class TileAttention:
    """One tile in the tower.

    Attributes:
        tile: its grid of patches, where they lie on the picture, and how many class tokens stand before them.
        patterns: layer -> `[H, P, P]`, attention probabilities, last two axes query and key, rows summing to 1. What
            lies outside the window of a layer that attends within windows is 0.
    """

    tile: Tile
    patterns: dict[int, Tensor]


@dataclass(frozen=True)
class PictureAttention:
    """One picture: its tiles, and `pooling [S, sum of P]` from their tokens to soft tokens (see `PicturePatches`)."""

    tiles: list[TileAttention]
    pooling: sparse.csr_array


@dataclass(frozen=True)
class VisionAttention:
    """The pictures of one prompt in the vision tower.

    Attributes:
        n_layers: layers of the tower that the decoder is given anything of; the last of them is `n_layers - 1`.
        layers: those that were captured, ascending.
        pictures: in the order of the prompt.
    """

    n_layers: int
    layers: list[int]
    pictures: list[PictureAttention]


@torch.no_grad()
def capture_vision_attention(vlm: VLM, inputs: ModelInputs, layers: Sequence[int] | None = None) -> VisionAttention:
    """The attention patterns of the vision tower at one prompt's pictures, from one forward of the tower.

    The model must be in evaluation mode. Patterns of layers that are not asked for are not kept; each that is takes
    `H * P * P` numbers a tile, 1 GiB in float32 for 4096 patches and 16 heads.

    Args:
        vlm: the model with its processor.
        inputs: what `vlm.prepare` made of the prompt.
        layers: layers of the tower, counted from the end when negative (`range(-4, 0)`: the last four); all when None.

    Raises:
        UserError: the model or the prompt has no pictures, the tower has no such layer, or its attention cannot be
            recorded.
    """
    adapter = vlm.adapter
    assert not adapter.model.training, "capture needs the model in evaluation mode"
    if not adapter.has_vision:
        raise UserError(
            f"the model {vlm.name} takes no pictures, so there is no vision attention; choose another model"
        )
    if not inputs.sizes:
        raise UserError("the prompt has no picture, so there is no vision attention; give one with image=")
    n_layers = len(adapter.vision_attention())
    chosen = _chosen(layers, n_layers)
    pictures = adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    with recording_vision_patterns(adapter, chosen) as recorded:
        make_batch(adapter, [inputs])  # runs the tower and nothing behind it
    found = []
    for picture in pictures:
        tiles = [
            TileAttention(tile, {layer: tile_pattern(recorded[layer], tile) for layer in chosen})
            for tile in picture.tiles
        ]
        found.append(PictureAttention(tiles, picture.pooling))
    return VisionAttention(n_layers, chosen, found)


def _chosen(layers: Sequence[int] | None, n_layers: int) -> list[int]:
    wanted = range(n_layers) if layers is None else layers
    bad = [layer for layer in wanted if not -n_layers <= layer < n_layers]
    if bad:
        raise UserError(f"the vision tower has no layer {bad[0]}; choose from 0 to {n_layers - 1}")
    return sorted({layer % n_layers for layer in wanted})


def tile_pattern(calls: Sequence[Tensor], tile: Tile) -> Tensor:
    """The pattern `[H, P, P]` of a tile from those of the tower's calls, `[B, H, S, S]` each.

    The tokens of all calls and their batches, in order, are the tower's tokens; those that were not in one call
    together do not see each other.
    """
    found, start = None, 0
    for block in (block for call in calls for block in call):
        n_tokens = block.shape[-1]
        where = np.flatnonzero((tile.tokens >= start) & (tile.tokens < start + n_tokens))
        inside = tile.tokens[where] - start
        start += n_tokens
        if np.array_equal(inside, np.arange(n_tokens)) and len(where) == len(tile):
            return block
        if len(where):
            at, of = (torch.from_numpy(index).to(block.device) for index in (where, inside))
            if found is None:
                found = block.new_zeros((block.shape[0], len(tile), len(tile)))
            found[:, at[:, None], at] = block[:, of[:, None], of]
    assert found is not None and tile.tokens.max() < start, "the tower was given other tokens than the adapter says"
    return found
