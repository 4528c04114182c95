"""Pictures beside maps over their soft tokens, a row a picture and a column a map."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from vlmscope.core.images import PatchBox
from vlmscope.report.style import POSITIVE, drawing

_SHADE = LinearSegmentedColormap.from_list("shade", ["#ffffff", POSITIVE])


def object_maps(
    pictures: Sequence[np.ndarray],
    boxes: Sequence[Sequence[PatchBox]],
    maps: Sequence[Mapping[str, np.ndarray]],
    path: str | Path,
) -> Path:
    """Draw each picture, and over it in grey each of its maps; colours are relative to a map's largest value.

    Args:
        pictures: uint8 [H, W, 3]; at least one.
        boxes: of each picture S boxes.
        maps: of each picture name -> [S], at least 0; every picture has the same names.
        path: the PNG to write.
    """
    names = list(maps[0])
    with drawing(path, 2.0 * (len(names) + 1), 0.5 + 2.1 * len(pictures)) as figure:
        figure.suptitle("darker blue: more, relative to the map's largest value", x=0.01, ha="left", fontsize=9)
        grid = figure.subplots(len(pictures), len(names) + 1, squeeze=False)
        for axes, picture, places, found in zip(grid, pictures, boxes, maps, strict=True):
            axes[0].imshow(picture)
            axes[0].set_title("picture", loc="left", fontsize=9)
            grey = np.asarray(Image.fromarray(picture).convert("L"))
            for at, name in zip(axes[1:], names, strict=True):
                share = np.zeros(picture.shape[:2])
                for box, value in zip(places, found[name] / (found[name].max() or 1.0), strict=True):
                    left, top, right, bottom = box.pixels(picture.shape[1], picture.shape[0])
                    share[top:bottom, left:right] = value
                at.imshow(grey, cmap="gray", vmin=0, vmax=255)
                at.imshow(share, cmap=_SHADE, vmin=0, vmax=1, alpha=0.55)
                at.set_title(name.replace("_", " "), loc="left", fontsize=9)
            for at in axes:
                at.set_axis_off()
    return Path(path)
