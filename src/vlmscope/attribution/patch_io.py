"""`patches.safetensors`: maps over patches as small float16 grids, and the record that says what they are.

A grid is kept relative to its own largest absolute value (its `scale` in the record), so that float16
has all its digits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.core.patches import PictureMap, TileMap

FORMAT, VERSION = "vlmscope.patches", "1"


def save_maps(path: str | Path, maps: Sequence[PictureMap]) -> list[dict[str, Any]]:
    """Write the grids, atomically.

    Returns:
        For each map its target, picture, edge, remainder, residual, and of each tile the name of its grid in the file,
        its scale and the boxes of its patches.

    Raises:
        UserError: when the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    records = []
    for number, found in enumerate(maps):
        tiles = []
        for at, tile in enumerate(found.tiles):
            name, scale = f"map_{number}_{at}", float(np.abs(tile.values).max(initial=0.0))
            arrays[name] = (tile.values / (scale or 1.0)).astype(np.float16)
            tiles.append({"grid": name, "scale": scale, "boxes": [list(box) for box in tile.boxes]})
        records.append(
            {
                "target": found.target,
                "picture": found.picture,
                "edge": found.edge,
                "from_patches": found.from_patches,
                "remainder": found.remainder,
                "residual": found.residual,
                "tiles": tiles,
            }
        )
    save_tensors(path, arrays, {"format": FORMAT, "version": VERSION})
    return records


def load_maps(path: str | Path, records: Sequence[Mapping[str, Any]]) -> list[PictureMap]:
    """Read what `save_maps` wrote, to float16's accuracy.

    Args:
        path: the file.
        records: what `save_maps` returned, as `graph.json` has it under `vlmscope.patches.maps`.

    Raises:
        UserError: when the file is missing or is of another kind or layout.
    """
    arrays, metadata = load_tensors(path)
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} holds no maps over patches of this layout; trace anew with attribution.patches=true")
    with built_from(path, "file of maps", "trace again with attribution.patches=true"):
        found = []
        for record in records:
            tiles = []
            for tile in record["tiles"]:
                boxes = [PatchBox(*box) for box in tile["boxes"]]
                tiles.append(TileMap(boxes, arrays[tile["grid"]].astype(float) * tile["scale"]))
            found.append(PictureMap(record["target"], record["picture"], tiles, record["edge"], record["remainder"]))
        return found
