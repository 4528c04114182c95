"""Pictures under the maps of features, a row a feature and picture, a column a kind of map."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image

from vlmscope.core.intervention import Rate
from vlmscope.core.patches import PictureMap
from vlmscope.report.figures import bars_legend, grouped_bars
from vlmscope.report.patch_figure import overlay, shrunk
from vlmscope.report.style import POSITIVE, drawing

_UNSIGNED = LinearSegmentedColormap.from_list("unsigned", ["#ffffff", POSITIVE])
NAMES = {
    "rollout": "attention rollout",
    "similarity": "similarity",
    "vision_path": "attribution to patches",
    "activation": "own activation",
    "contrast": "contrast of pixels",
    "rollout_no_feature": "rollout, no feature",
    "random": "random",
}


def feature_maps(
    maps: Mapping[str, Mapping[str, Sequence[PictureMap]]], pictures: Sequence[np.ndarray], path: str | Path
) -> Path:
    """The picture, and each kind of map over it, for each feature; colours are relative to a map's largest value.

    Args:
        maps: feature -> kind -> a map a picture; at least one. A map without negative values starts at its least one,
            which would otherwise hide what differs.
        pictures: uint8 `[H, W, 3]`, by number.
        path: the PNG to write.
    """
    rows = [(feature, number) for feature in maps for number in range(len(pictures))]
    kinds = list(next(iter(maps.values())))
    with drawing(path, 1.9 * (len(kinds) + 1), 0.6 + 2.1 * len(rows)) as figure:
        figure.suptitle(
            "blue: for the feature, orange: against it; as strong as the map's largest", x=0.01, ha="left", fontsize=9
        )
        grid = figure.subplots(len(rows), len(kinds) + 1, squeeze=False)
        for axes, (feature, number) in zip(grid, rows, strict=True):
            shown = shrunk(pictures[number])
            axes[0].imshow(shown)
            axes[0].set_title(feature, loc="left", fontsize=9)
            for at, kind in zip(axes[1:], kinds, strict=True):
                _draw(at, shown, maps[feature][kind][number])
                at.set_title(NAMES.get(kind, kind), loc="left", fontsize=9)
            for at in axes:
                at.set_axis_off()
    return Path(path)


def _draw(axes: Axes, shown: np.ndarray, found: PictureMap) -> None:
    raster = found.raster(shown.shape[0], shown.shape[1])
    if raster.min() < 0:
        overlay(axes, shown, raster)
        return
    low, high = float(raster.min()), float(raster.max())
    share = (raster - low) / ((high - low) or 1.0)
    axes.imshow(np.asarray(Image.fromarray(shown).convert("L")), cmap="gray", vmin=0, vmax=255)
    axes.imshow(share, cmap=_UNSIGNED, vmin=0, vmax=1, alpha=0.1 + 0.75 * share)


def pointing_bars(groups: Sequence[str], series: Mapping[str, Sequence[Rate | None]], path: str | Path) -> Path:
    """How often the peak of each map lies on the object, by kind of scene; `control` is a random cell's chance."""
    with drawing(path, 9.4, 4.4) as figure:
        axes = figure.subplots()
        grouped_bars(axes, groups, series)
        axes.set_title("Where the peak of a map lies", loc="left")
        axes.set_ylabel("peak on the object (% of features and scenes)")
        bars_legend(figure, axes, control="a random cell")
    return Path(path)
