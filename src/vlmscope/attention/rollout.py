"""Maps of where a tower looks: rollout, maps by soft token, deletion curves, and their files.

Attention rollout of a vision tower (Abnar and Zuidema 2020), as Yang et al. (arXiv 2602.20330) use it.

Of each layer the patterns of the most focused heads (lowest entropy) are averaged to A; with the residual stream as
`B = rownorm(A + I)` the rollout over layers 1..n is `R = B_n ... B_1`, where R[i, j] says how much of token j's state
before the first of them is in token i's after the last. Its rows are pooled to soft tokens. The paper's "similarity"
variant takes no attention at all: it pools the rows of the cosine similarity between the tower's last states.

The paper's text has the last 4 layers and 30 % of the heads, its code pools by the maximum over a soft token's patches.
Legend: H heads, P tokens of a tile (class tokens, then patches row by row), S soft tokens, d_v width.

Maps over patches for every soft token of a prompt's pictures, and for a feature by its activations on them.

Legend: P tokens of a tile, S soft tokens of a picture.

Deletion and insertion (Petsiuk et al. 2018): pictures with the cells that a map ranks first painted over, or alone.

A picture is cut into `side * side` cells whatever the grid of patches, so that maps of all families and kinds can be
compared on the same pictures. Painted cells have the picture's mean colour.

`maps.safetensors`: maps over patches as uint8 grids, at most 64 KB for the 256 soft tokens of a picture.

A soft token has at most `CELLS` cells; finer grids of patches are spread over a coarser one with the same sum. Layout:
`docs/formats.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.vision import TileAttention, VisionAttention, capture_vision_attention
from vlmscope.attention.config import WhereConfig
from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.maps import Grids, PictureMap, TileMap, TokenMaps, TokenTile, coarse_shape, decode, encode, resample
from vlmscope.core.records import PatchBox, generator
from vlmscope.models.base import ModelInputs
from vlmscope.models.boxes import PicturePatches, grid_boxes
from vlmscope.models.loading import VLM


def head_entropy(pattern: Tensor) -> Tensor:
    """The entropy of each head's rows in nats, averaged over queries: `[H, P, P]` -> `[H]`."""
    return torch.special.entr(pattern).sum(-1).mean(-1)


def focused_heads(pattern: Tensor, share: float) -> Tensor:
    """The heads of lowest entropy, most focused first; of equal heads the first.

    Args:
        pattern: `[H, P, P]`, rows summing to 1.
        share: of the heads, in (0, 1]; at least one is kept, and halves are rounded to the even number.

    Returns:
        int64 indices.
    """
    count = max(1, round(share * len(pattern)))
    return torch.argsort(head_entropy(pattern), stable=True)[:count]


def mixed_layer(pattern: Tensor, share: float, identity: bool = True) -> Tensor:
    """One layer's mixing of tokens: `[H, P, P]` -> `[P, P]`, rows summing to 1.

    Args:
        pattern: attention probabilities.
        share: of the heads, by `focused_heads`.
        identity: whether the residual stream counts as much as the attention.
    """
    mean = pattern[focused_heads(pattern, share)].mean(0)
    if identity:
        mean = mean + torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return mean / mean.sum(-1, keepdim=True)


def rollout(layers: Sequence[Tensor], start: Tensor | None = None) -> Tensor:
    """The product of layers' mixings, first layer first: `[P, P]` each -> `[P, P]`.

    Args:
        layers: at least one.
        start: rows `[n, P]` to be taken through the layers, last layer first, instead of every token's.
    """
    product = start
    for mixing in reversed(layers):
        product = mixing if product is None else product @ mixing
    assert product is not None, "a rollout of no layers"
    return product


def pool_rows(matrix: Tensor, pooling: Tensor, reduce: str) -> Tensor:
    """Rows of a matrix over tokens pooled to soft tokens: `[P, P]` -> `[S, P]`.

    Args:
        matrix: a row for every token.
        pooling: `[S, P]`, how much of each token goes into each soft token, in the matrix's dtype.
        reduce: "mean" (weighted as the model pools) or "max" (over the tokens that go in at all).
    """
    if reduce == "mean":
        return pooling @ matrix
    out = torch.zeros_like(pooling)
    for row, weights in enumerate(pooling):
        inside = torch.nonzero(weights)[:, 0]
        if len(inside):
            out[row] = matrix[inside].amax(0)
    return out


def soft_token_rollout(layers: Sequence[Tensor], pooling: Tensor, reduce: str) -> Tensor:
    """`pool_rows(rollout(layers), pooling, reduce)`; for the mean by way of S rows instead of P.

    Args:
        layers: mixings `[P, P]`, first layer first.
        pooling: `[S, P]`.
        reduce: "mean" or "max".

    Returns:
        `[S, P]`; with "mean" the row of a soft token of patches sums to 1.
    """
    if reduce == "mean":
        return rollout(layers, pooling)
    return pool_rows(rollout(layers), pooling, reduce)


def similarity(states: Tensor) -> Tensor:
    """Cosine similarity between tokens' states: `[P, d_v]` -> `[P, P]`, in -1..1."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    return unit @ unit.T


def token_maps(vlm: VLM, inputs: ModelInputs, config: WhereConfig) -> dict[str, list[TokenMaps]]:
    """Rollout and similarity of every soft token, from one forward of the tower.

    Of the attention only the last layers' is kept, and of each only one matrix `[P, P]` a tile.

    Args:
        vlm: the model with its processor, in evaluation mode.
        inputs: what `vlm.prepare` made of the prompt.
        config: settings of the rollout.

    Returns:
        "rollout" and "similarity": one record a picture.

    Raises:
        UserError: the model or the prompt has no pictures, or the tower's attention cannot be recorded.
    """
    config.check()
    n_layers = len(vlm.adapter.vision_attention()) if vlm.adapter.has_vision else 0
    layers = range(max(n_layers - config.last_layers, 0), n_layers)
    reduce = partial(mixed_layer, share=config.head_share, identity=config.identity)
    captured = capture_vision_attention(vlm, inputs, layers, reduce, states=True)
    return {
        "rollout": _maps(captured, "rollout", config.pool),
        "similarity": _maps(captured, "similarity", config.pool),
    }


def _maps(captured: VisionAttention, kind: str, pool: str) -> list[TokenMaps]:
    found = []
    for number, picture in enumerate(captured.pictures):
        every = torch.from_numpy(picture.pooling.toarray())
        tiles, on_class, first = [], np.zeros(len(every)), 0
        for tile in picture.tiles:
            pooling = every[:, first : first + len(tile.tile)]
            first += len(tile.tile)
            rows = _rows(tile, pooling, kind, pool).double().numpy(force=True)
            tokens = torch.nonzero(pooling.any(1))[:, 0].numpy()
            n_class, shape = tile.tile.n_class, (tile.tile.rows, tile.tile.columns)
            on_class += rows[:, :n_class].sum(1)
            tiles.append(TokenTile(tile.tile.boxes, tokens, rows[tokens, n_class:].reshape(-1, *shape)))
        found.append(TokenMaps(kind, number, tiles, on_class))
    return found


def _rows(tile: TileAttention, pooling: Tensor, kind: str, pool: str) -> Tensor:
    """`[S, P]`, what soft tokens take from one tile."""
    if kind == "rollout":
        layers = [tile.patterns[layer] for layer in sorted(tile.patterns)]
        return soft_token_rollout(layers, pooling.to(layers[0]), pool)
    assert tile.states is not None, "the states were not captured"
    return pool_rows(similarity(tile.states), pooling.to(tile.states), pool)


def own_map(activations: np.ndarray, patches: PicturePatches, picture: int, target: str) -> PictureMap:
    """A feature's own activation on the soft tokens, shared out among the patches that go into each.

    Args:
        activations: `[S]`, on the picture's soft tokens.
        patches: the picture in the tower.
        picture: its number in the prompt.
        target: name of the feature.

    Returns:
        A map that sums to the activations, those of soft tokens of no patch apart.
    """
    shared = patches.pooling.T @ activations.astype(np.float64)
    tiles, on_class, first = [], 0.0, 0
    for tile in patches.tiles:
        part = shared[first : first + len(tile)]
        first += len(tile)
        on_class += float(part[: tile.n_class].sum())
        tiles.append(TileMap(tile.boxes, part[tile.n_class :].reshape(tile.rows, tile.columns)))
    empty = patches.pooling.sum(axis=1) == 0
    remainder = {"class_token": on_class, "no_patch": float(activations[empty].sum())}
    remainder = {name: value for name, value in remainder.items() if value}
    return PictureMap(target, picture, tiles, float(activations.sum()), remainder)


def on_pictures(values: np.ndarray, inputs: ModelInputs) -> list[np.ndarray]:
    """The part of each picture's soft tokens of `values [T]` at all positions."""
    return [values[inputs.image_index == picture] for picture in range(len(inputs.sizes))]


_FINE = 8  # pixels of a raster down and across a cell


@dataclass(frozen=True)
class Painted:
    """The pictures of one order, from nothing changed to all: `counts[i]` cells are deleted, or are all that is left.

    Each is painted when it is asked for, since together they take hundreds of times the picture's memory.

    Attributes:
        counts: ascending, from 0 to all cells.
        image: uint8 `[H, W, 3]`.
        order: cells, the one to go, or to come, first.
        side: cells down and across.
    """

    counts: tuple[int, ...]
    image: np.ndarray
    order: np.ndarray
    side: int

    def deleted(self) -> Iterator[np.ndarray]:
        """The picture without the first `counts[i]` cells, uint8 `[H, W, 3]` each."""
        return self._over(self.image, self._empty)

    def inserted(self) -> Iterator[np.ndarray]:
        """The first `counts[i]` cells alone, likewise."""
        return self._over(self._empty, self.image)

    @property
    def _empty(self) -> np.ndarray:
        return np.broadcast_to(self.image.mean((0, 1)).round().astype(np.uint8), self.image.shape)

    def _over(self, base: np.ndarray, source: np.ndarray) -> Iterator[np.ndarray]:
        spots = [box.pixels(self.image.shape[1], self.image.shape[0]) for box in grid_boxes(self.side, self.side)]
        for count in self.counts:
            out = base.copy()
            for cell in self.order[:count]:
                left, top, right, bottom = spots[int(cell)]
                out[top:bottom, left:right] = source[top:bottom, left:right]
            yield out


def cell_values(found: PictureMap, side: int) -> np.ndarray:
    """`[side, side]`: the share of a map in each cell of the picture."""
    fine = found.raster(side * _FINE, side * _FINE)
    return fine.reshape(side, _FINE, side, _FINE).sum((1, 3))


def ranking(values: np.ndarray, seed: int) -> np.ndarray:
    """Cells by value, largest first; cells of the same value (but for rounding) in random order."""
    flat = np.asarray(values, float).ravel()
    scale = np.abs(flat).max(initial=0.0) or 1.0
    shuffled = generator(seed, "ties").permutation(flat.size)
    return shuffled[np.argsort(-np.round(flat[shuffled] / scale, 9), kind="stable")]


def painted(image: np.ndarray, order: np.ndarray, side: int, counts: Sequence[int]) -> Painted:
    """The pictures of one order.

    Args:
        image: uint8 `[H, W, 3]`.
        order: cells, the one to go, or to come, first.
        side: cells down and across.
        counts: how many cells; 0 and all are added.
    """
    every = tuple(sorted({0, side * side, *(count for count in counts if count < side * side)}))
    return Painted(every, image, order, side)


FORMAT, VERSION = "vlmscope.maps", "1"
CELLS = 225  # of a soft token's map: 15 x 15 for a square; with their numbers 256 of them fill 62 KB
_GRID = ("codes", "low", "step", "x", "y")


class Maps(NamedTuple):
    """What one file holds: of targets, and of soft tokens."""

    targets: list[PictureMap]
    tokens: list[TokenMaps]


def save_maps(path: str | Path, targets: Sequence[PictureMap] = (), tokens: Sequence[TokenMaps] = ()) -> int:
    """Write maps atomically.

    Args:
        path: the file.
        targets: maps of features or logits, kept on the grid of patches.
        tokens: maps of soft tokens, of one picture or of many.

    Returns:
        The file's size in bytes.

    Raises:
        UserError: when the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    records: dict[str, list[dict[str, Any]]] = {"targets": [], "tokens": []}
    for number, found in enumerate(targets):
        record = {"target": found.target, "picture": found.picture, "edge": found.edge, "remainder": found.remainder}
        records["targets"].append({**record, "tiles": len(found.tiles)})
        for at, tile in enumerate(found.tiles):
            arrays |= _arrays(f"map.{number}.{at}", tile.boxes, tile.values[None], tile.values.size)
    for number, maps in enumerate(tokens):
        records["tokens"].append({"kind": maps.kind, "picture": maps.picture, "tiles": len(maps.tiles)})
        arrays[f"token.{number}.class"] = maps.class_token.astype(np.float32)
        for at, tile in enumerate(maps.tiles):
            name = f"token.{number}.{at}"
            arrays |= _arrays(name, tile.boxes, tile.values, CELLS)
            arrays[f"{name}.tokens"] = tile.tokens.astype(np.int32)
    save_tensors(path, arrays, {"format": FORMAT, "version": VERSION, "maps": json.dumps(records)})
    return Path(path).stat().st_size


def load_maps(path: str | Path) -> Maps:
    """Read what `save_maps` wrote; values are good to half a step of their grid (`vlmscope.core.maps`).

    Raises:
        UserError: when the file is missing or is of another kind or layout.
    """
    arrays, metadata = load_tensors(path)
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} holds no maps of this layout; write it again with task=where")
    with built_from(path, "file of maps", "write it again with task=where"):
        records = json.loads(metadata["maps"])
        targets = []
        for number, record in enumerate(records["targets"]):
            parts = [_tile(arrays, f"map.{number}.{at}") for at in range(record["tiles"])]
            tiles = [TileMap(boxes, values[0]) for boxes, values in parts]
            targets.append(PictureMap(record["target"], record["picture"], tiles, record["edge"], record["remainder"]))
        tokens = []
        for number, record in enumerate(records["tokens"]):
            tiles = []
            for at in range(record["tiles"]):
                name = f"token.{number}.{at}"
                boxes, values = _tile(arrays, name)
                tiles.append(TokenTile(boxes, arrays[f"{name}.tokens"].astype(np.int64), values))
            on_class = arrays[f"token.{number}.class"].astype(np.float64)
            tokens.append(TokenMaps(record["kind"], record["picture"], tiles, on_class))
        return Maps(targets, tokens)


def _arrays(name: str, boxes: Sequence[PatchBox], values: np.ndarray, most: int) -> dict[str, np.ndarray]:
    rows, columns = values.shape[1:]
    shape = coarse_shape(rows, columns, most)
    grids = encode(values if shape == (rows, columns) else resample(values, *shape))
    x = np.array([box.left for box in boxes[:columns]] + [boxes[columns - 1].right])
    y = np.array([box.top for box in boxes[::columns]] + [boxes[-1].bottom])
    edges = (_thinned(x, shape[1]), _thinned(y, shape[0]))
    found = (grids.codes, grids.low, grids.step, *(edge.astype(np.float32) for edge in edges))
    return {f"{name}.{part}": array for part, array in zip(_GRID, found, strict=True)}


def _thinned(edges: np.ndarray, cells: int) -> np.ndarray:
    """The edges of `cells` cells over the same length."""
    return np.interp(np.linspace(0, len(edges) - 1, cells + 1), np.arange(len(edges)), edges)


def _tile(arrays: dict[str, np.ndarray], name: str) -> tuple[list[PatchBox], np.ndarray]:
    codes, low, step, x, y = (arrays[f"{name}.{part}"] for part in _GRID)
    across, down = x.astype(float).tolist(), y.astype(float).tolist()
    boxes = [
        PatchBox(across[column], down[row], across[column + 1], down[row + 1])
        for row in range(codes.shape[1])
        for column in range(codes.shape[2])
    ]
    return boxes, decode(Grids(codes, low, step))
