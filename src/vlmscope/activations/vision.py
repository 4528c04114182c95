"""What the patches of a picture attend to in the vision tower.

Legend: H heads, P tokens of a tile (class tokens, then patches row by row), S soft tokens of a picture, d_v width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.models.attention import recording_vision_patterns
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.batching import make_batch
from vlmscope.models.boxes import Tile
from vlmscope.models.loading import VLM


@dataclass(frozen=True)
class TileAttention:
    """One tile in the tower.

    `patterns`: layer -> `[H, P, P]`, attention probabilities, last two axes query and key, rows summing to 1 (0 outside
    the window of a layer that attends within windows), or what was made of them. `states` `[P, d_v]`: the tower's last
    states as the decoder's side is given them, where they were asked for.
    """

    tile: Tile
    patterns: dict[int, Tensor]
    states: Tensor | None = None


@dataclass(frozen=True)
class PictureAttention:
    """One picture: its tiles, and `pooling [S, sum of P]` from their tokens to soft tokens (see `PicturePatches`)."""

    tiles: list[TileAttention]
    pooling: sparse.csr_array


@dataclass(frozen=True)
class VisionAttention:
    """The pictures of one prompt in the vision tower, in their order.

    `n_layers` counts the layers of the tower that the decoder is given anything of; `layers` were captured, ascending.
    """

    n_layers: int
    layers: list[int]
    pictures: list[PictureAttention]


Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def capture_vision_attention(
    vlm: VLM,
    inputs: ModelInputs,
    layers: Sequence[int] | None = None,
    reduce: Reduce | None = None,
    states: bool = False,
) -> VisionAttention:
    """The attention patterns of the vision tower at one prompt's pictures, from one forward of the tower.

    The model must be in evaluation mode. Patterns of layers that are not asked for are not kept; each that is takes
    `H * P * P` numbers a tile, 1 GiB in float32 for 4096 patches and 16 heads, unless `reduce` makes less of it.

    `layers` are those of the tower, counted from the end when negative (`range(-4, 0)`: the last four); all when None.
    What `reduce` makes takes the place of a tile's pattern `[H, P, P]` as soon as its layer has run, so that no two
    layers' patterns are in memory at once. `states`: whether to keep the tower's last states too.
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
    wanted = range(n_layers) if layers is None else layers
    bad = [layer for layer in wanted if not -n_layers <= layer < n_layers]
    if bad:
        raise UserError(f"the vision tower has no layer {bad[0]}; choose from 0 to {n_layers - 1}")
    chosen = sorted({layer % n_layers for layer in wanted})
    pictures = adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    tiles = [tile for picture in pictures for tile in picture.tiles]
    with ExitStack() as stack:
        recorded = stack.enter_context(recording_vision_patterns(adapter, chosen))
        reduced = stack.enter_context(_reducing(adapter, recorded, tiles, reduce))
        kept = stack.enter_context(_keeping_states(adapter)) if states else []
        make_batch(adapter, [inputs])  # runs the tower and nothing behind it
    last = torch.cat(kept) if kept else None
    found = []
    for number, tile in enumerate(tiles):
        patterns = {layer: reduced[layer][number] for layer in chosen}
        found.append(TileAttention(tile, patterns, None if last is None else last[torch.from_numpy(tile.tokens)]))
    rest = iter(found)
    return VisionAttention(
        n_layers, chosen, [PictureAttention([next(rest) for _ in p.tiles], p.pooling) for p in pictures]
    )


@contextmanager
def _reducing(
    adapter: Adapter, recorded: Mapping[int, list[Tensor]], tiles: Sequence[Tile], reduce: Reduce | None
) -> Iterator[dict[int, list[Tensor]]]:
    """A dict that the forward fills: layer -> what is made of each tile's pattern; patterns are dropped at once."""
    found: dict[int, list[Tensor]] = {}
    needed = 1 + max(int(tile.tokens.max()) for tile in tiles)

    def taken(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls = recorded[layer]
            if sum(call.shape[0] * call.shape[-1] for call in calls) < needed:
                return  # the tower comes again, with more pictures
            patterns = (tile_pattern(calls, tile) for tile in tiles)
            found[layer] = [pattern if reduce is None else reduce(pattern) for pattern in patterns]
            calls.clear()

        return hook

    modules = adapter.vision_attention()
    with ExitStack() as stack:
        for layer in recorded:
            stack.callback(modules[layer].register_forward_hook(taken(layer)).remove)
        yield found
    assert set(found) == set(recorded), "the tower was given other tokens than the adapter says"


@contextmanager
def _keeping_states(adapter: Adapter) -> Iterator[list[Tensor]]:
    """A list to which the forward adds the tower's last states, `[N, d_v]` a call."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found.append(states.detach().flatten(0, -2))

    handle = adapter.vision_states().register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def tile_pattern(calls: Sequence[Tensor], tile: Tile) -> Tensor:
    """The pattern `[H, P, P]` of a tile from those of the tower's calls, `[B, H, S, S]` each.

    The tokens of all calls and their batches, in order, are the tower's tokens; those that were not in one call
    together do not see each other.
    """
    pattern, start = None, 0
    for block in (block for call in calls for block in call):
        n_tokens = block.shape[-1]
        where = np.flatnonzero((tile.tokens >= start) & (tile.tokens < start + n_tokens))
        inside = tile.tokens[where] - start
        start += n_tokens
        if np.array_equal(inside, np.arange(n_tokens)) and len(where) == len(tile):
            return block
        if len(where):
            rows, source = (torch.from_numpy(index).to(block.device) for index in (where, inside))
            if pattern is None:
                pattern = block.new_zeros((block.shape[0], len(tile), len(tile)))
            pattern[:, rows[:, None], rows] = block[:, source[:, None], source]
    assert pattern is not None and tile.tokens.max() < start, "the tower was given other tokens than the adapter says"
    return pattern
