"""Figures made of pictures: maps over them, what soft tokens say, and the examples on which features fire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.patches import Rectangle
from PIL import Image

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.maps import PictureMap
from vlmscope.core.records import PatchBox
from vlmscope.report.style import INK, MUTED, NEGATIVE, POSITIVE, drawing
from vlmscope.report.thumbnails import example_picture, token_spans

_SIDE = 256  # pixels of the longer edge
_SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])
_UNSIGNED = LinearSegmentedColormap.from_list("unsigned", ["#ffffff", POSITIVE])
MAP_NAMES = {
    "rollout": "attention rollout",
    "similarity": "similarity",
    "vision_path": "attribution to patches",
    "activation": "own activation",
    "contrast": "contrast of pixels",
    "rollout_no_feature": "rollout, no feature",
    "random": "random",
}


def _shrunk(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    factor = _SIDE / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST))


def _show(axes: Axes, image: np.ndarray, title: str) -> None:
    axes.imshow(image)
    axes.set_title(title, loc="left", fontsize=9)
    axes.set_axis_off()


def _show_map(axes: Axes, image: np.ndarray, raster: np.ndarray, title: str) -> None:
    """A map over the grey picture, relative to its largest absolute value.

    A map without negative values starts at its least one, which would otherwise hide what differs.
    """
    _show(axes, np.asarray(Image.fromarray(image).convert("L").convert("RGB")), title)
    if raster.min() < 0:
        share = raster / float(np.abs(raster).max())
        axes.imshow(share, cmap=_SIGNED, vmin=-1, vmax=1, alpha=0.15 + 0.75 * np.abs(share))
    else:
        share = (raster - raster.min()) / (float(np.ptp(raster)) or 1.0)
        axes.imshow(share, cmap=_UNSIGNED, vmin=0, vmax=1, alpha=0.1 + 0.75 * share)


def patch_maps(maps: Sequence[PictureMap], pictures: Sequence[np.ndarray], path: str | Path, effect: str) -> Path:
    """A row per map: the picture (uint8 `[H, W, 3]`), the map over it, and what the picture's edge is made of.

    `effect`, "total" or "direct", is for the title.
    """
    with drawing(path, 8.6, 0.5 + 2.5 * len(maps)) as figure:
        grid = figure.subplots(len(maps), 3, squeeze=False, width_ratios=[1, 1, 1.25])
        for (left, middle, right), found in zip(grid, maps, strict=True):
            image = _shrunk(pictures[found.picture])
            _show(left, image, f"picture {found.picture + 1}")
            _show_map(middle, image, found.raster(*image.shape[:2]), f"{effect} effect on {found.target!r}")
            parts = {"patches": found.from_patches} | {name: v for name, v in found.remainder.items() if v}
            right.barh(
                list(parts),
                list(parts.values()),
                color=[POSITIVE if value >= 0 else NEGATIVE for value in parts.values()],
            )
            right.axvline(0, color="black", linewidth=0.8)
            right.set_title(f"sum {found.edge:.3g}, unexplained {found.residual:.0e}", loc="left", fontsize=9)
            right.invert_yaxis()
            right.set_xlabel("logits")
    return Path(path)


def feature_maps(
    maps: Mapping[str, Mapping[str, Sequence[PictureMap]]], pictures: Sequence[np.ndarray], path: str | Path
) -> Path:
    """A row per feature and picture (uint8 `[H, W, 3]`): `maps` are feature -> kind -> a map per picture."""
    rows = [
        (feature, picture, {MAP_NAMES.get(kind, kind): of[number] for kind, of in kinds.items()})
        for feature, kinds in maps.items()
        for number, picture in enumerate(pictures)
    ]
    return map_rows(rows, path, "blue: for the feature, orange: against it; as strong as the map's largest")


def map_rows(rows: Sequence[tuple[str, np.ndarray, Mapping[str, PictureMap]]], path: str | Path, note: str) -> Path:
    """A row per picture with a title, each of its maps over it; all rows have maps of the same names."""
    columns = len(rows[0][2]) + 1
    with drawing(path, 1.9 * columns, 0.6 + 2.1 * len(rows)) as figure:
        figure.suptitle(note, x=0.01, ha="left", fontsize=9)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for (first, *others), (title, picture, maps) in zip(grid, rows, strict=True):
            image = _shrunk(picture)
            _show(first, image, title)
            for axes, (name, found) in zip(others, maps.items(), strict=True):
                _show_map(axes, image, found.raster(*image.shape[:2]), name)
    return Path(path)


_READABLE = 36  # soft tokens whose words still fit
_COLUMNS = 5


def soft_token_words(
    pictures: Sequence[np.ndarray],
    places: Sequence[tuple[int, PatchBox | None]],
    words: np.ndarray,
    probability: np.ndarray,
    word: str,
    path: str | Path,
) -> Path:
    """The first picture, then a panel per state: the probability of a word, with the most probable word as text.

    Args:
        pictures: uint8 `[H, W, 3]`; the first one is drawn.
        places: picture and box of each of the S soft tokens.
        words: `[states, S]` strings.
        probability: `[states, S]`, of `word`.
        word: the word that is looked for.
        path: the PNG to write.
    """
    mine = [(at, box) for at, (picture, box) in enumerate(places) if picture == 0 and box is not None]
    rows = -(-(len(words) + 1) // _COLUMNS)
    colours = sns.light_palette(POSITIVE, as_cmap=True)
    with drawing(path, 2.1 * _COLUMNS, 2.3 * rows + 0.3) as figure:
        grid = figure.subplots(rows, _COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        _show(grid.flat[0], _shrunk(pictures[0]), "picture")
        for state, axes in enumerate(grid.flat[1 : len(words) + 1]):
            name = f"before layer {state}" if state < len(words) - 1 else "after the last layer"
            axes.set_title(name, loc="left", fontsize=9)
            axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
            for at, box in mine:
                value = float(probability[state, at])
                width, height = box.right - box.left, box.bottom - box.top
                face = {"facecolor": colours(value), "edgecolor": "white"}
                axes.add_patch(Rectangle((box.left, box.top), width, height, **face))
                if len(mine) <= _READABLE:
                    text = words[state, at]
                    text = text if len(text) <= 9 else f"{text[:8]}…"
                    style = {"ha": "center", "va": "center", "fontsize": 5.5, "color": "white" if value > 0.6 else INK}
                    axes.text(box.left + width / 2, box.top + height / 2, text, **style)
        bar = ScalarMappable(Normalize(0, 1), colours)
        figure.colorbar(bar, ax=grid, label=f"probability of {word!r}", shrink=0.6)
    return Path(path)


class FeatureRow(NamedTuple):
    """A title, such as the feature with its label, a line below it, and examples."""

    title: str
    subtitle: str
    examples: tuple[FeatureExample, ...]


def feature_sheet(rows: Sequence[FeatureRow], path: str | Path, title: str = "", columns: int = 6) -> Path:
    """A line per feature: its examples, each a picture with where it fires, or the words around the peak."""
    with drawing(path, 1.55 * columns + 0.2, 2.35 * len(rows) + 0.5) as figure:
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for part, row in zip(parts, rows, strict=True):
            part.suptitle(f"{fill(row.title, 110)}\n{fill(row.subtitle, 130)}", x=0.01, ha="left", fontsize=9)
            panels = part.subplots(1, columns, squeeze=False)[0]
            for axes in panels:
                axes.set_axis_off()
            for axes, example in zip(panels, row.examples, strict=False):
                spans = token_spans(example, 2)
                words = " ".join(f"[{span.text}]" if span.peak else span.text for span in spans) or example.caption
                axes.set_title(f"{example.activation:.2f}", fontsize=7, color=MUTED, pad=2)
                picture = example_picture(example, 160)
                if picture is None:
                    axes.text(0.5, 0.5, fill(words, 22), ha="center", va="center", fontsize=7)
                else:
                    axes.imshow(np.asarray(picture))
                    below = {"ha": "center", "va": "top", "transform": axes.transAxes}
                    axes.text(0.5, -0.04, fill(words, 26)[:80], fontsize=6, **below)
    return Path(path)
