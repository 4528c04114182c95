"""Pictures under the maps of what their patches contribute to targets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from vlmscope.core.patches import PictureMap
from vlmscope.report.style import NEGATIVE, POSITIVE, drawing

_SIDE = 256  # pixels of the longer edge
_SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])


def patch_maps(maps: Sequence[PictureMap], pictures: Sequence[np.ndarray], path: str | Path, effect: str) -> Path:
    """One row a map: the picture, the map over it, and what the picture's edge is made of.

    Colours are relative to the largest contribution for an area of the map.

    Args:
        maps: at least one.
        pictures: uint8 `[H, W, 3]`, by number.
        path: the PNG to write.
        effect: "total" or "direct", for the title.
    """
    if not maps:
        raise ValueError("no maps to draw")
    with drawing(path, 8.6, 0.5 + 2.5 * len(maps)) as figure:
        grid = figure.subplots(len(maps), 3, squeeze=False, width_ratios=[1, 1, 1.25])
        for row, found in zip(grid, maps, strict=True):
            shown = shrunk(pictures[found.picture])
            row[0].imshow(shown)
            row[0].set_title(f"picture {found.picture + 1}", loc="left")
            overlay(row[1], shown, found.raster(shown.shape[0], shown.shape[1]))
            row[1].set_title(f"{effect} effect on {found.target!r}", loc="left")
            for axes in row[:2]:
                axes.set_axis_off()
            parts = {"patches": found.from_patches, **found.remainder}
            names = [name for name, value in parts.items() if value or name == "patches"]
            values = [parts[name] for name in names]
            row[2].barh(names, values, color=[POSITIVE if value >= 0 else NEGATIVE for value in values])
            row[2].axvline(0, color="black", linewidth=0.8)
            row[2].set_title(f"sum {found.edge:.3g}, unexplained {found.residual:.0e}", loc="left", fontsize=9)
            row[2].invert_yaxis()
            row[2].set_xlabel("logits")
    return Path(path)


def shrunk(picture: np.ndarray) -> np.ndarray:
    """A picture at the size of figures, longer edge `_SIDE` pixels."""
    found = Image.fromarray(picture)
    factor = _SIDE / max(found.size)
    size = (max(1, round(found.width * factor)), max(1, round(found.height * factor)))
    return np.asarray(found.resize(size, Image.Resampling.NEAREST))


def overlay(axes: Axes, shown: np.ndarray, raster: np.ndarray) -> None:
    """A signed map over the grey picture, relative to its largest absolute value."""
    top = float(np.abs(raster).max()) or 1.0
    axes.imshow(np.asarray(Image.fromarray(shown).convert("L")), cmap="gray", vmin=0, vmax=255)
    axes.imshow(raster, cmap=_SIGNED, vmin=-top, vmax=top, alpha=0.15 + 0.75 * np.abs(raster) / top)
