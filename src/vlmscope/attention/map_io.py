"""`maps.safetensors`: maps over patches as uint8 grids, at most 64 KB for the 256 soft tokens of a picture.

A soft token has at most `CELLS` cells; finer grids of patches are spread over a coarser one with the same sum. Layout:
`docs/formats.md`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.heatmaps import Grids, coarse_shape, decode, encode, resample
from vlmscope.core.images import PatchBox
from vlmscope.core.patches import PictureMap, TileMap, TokenMaps, TokenTile

FORMAT, VERSION = "vlmscope.maps", "1"
CELLS = 225  # of a soft token's map: 15 x 15 for a square; with the numbers beside them 256 of them fill 62 KB
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
    """Read what `save_maps` wrote; values are good to half a step of their grid (`vlmscope.core.heatmaps`).

    Raises:
        UserError: when the file is missing or is of another kind or layout.
    """
    arrays, metadata = load_tensors(path)
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} holds no maps of this layout; write it anew with task=where")
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
