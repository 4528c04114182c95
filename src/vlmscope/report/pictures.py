"""Pictures of where features fire, text as shaded tokens, and figures made of pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from PIL import Image, ImageDraw

from vlmscope.core.graph import PictureMap
from vlmscope.core.records import PatchBox
from vlmscope.core.results import FeatureExample
from vlmscope.data.images import data_uri, jpeg_bytes, png_bytes  # noqa: F401
from vlmscope.report.figures import MUTED, NEGATIVE, POSITIVE, drawing

SIDE = 128  # pixels
_TINT = (255, 0, 200)  # magenta: on no planet, and visible on black space
_MAX_ALPHA = 130
_COLOURS = 96  # palette size; with it, a thumbnail is a third of its true-colour size and looks the same
_SHORT_TEXT = 24  # tokens


class TokenSpan(NamedTuple):
    """A token to shade: `shade` 0..1 is its activation over the example's maximum; `peak` marks that maximum."""

    text: str
    activation: float
    shade: float
    peak: bool


_GAP = TokenSpan("…", 0.0, 0.0, False)


def thumbnail(image: Image.Image) -> bytes:
    """A picture of at most `SIDE` pixels an edge: a small one exactly, as PNG, else JPEG."""
    return png_bytes(image) if max(image.size) <= SIDE else jpeg_bytes(image, SIDE, 82)


def size(picture: bytes) -> tuple[int, int]:
    """Width and height in pixels."""
    with Image.open(io.BytesIO(picture)) as image:
        return image.size


def decode(png: bytes) -> Image.Image:
    """PNG bytes as an RGB picture."""
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB")


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Scale the longer edge to about `side` pixels; small pictures grow by a whole factor, without smoothing."""
    longer = max(image.size)
    if longer >= side:
        size = (max(1, image.width * side // longer), max(1, image.height * side // longer))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, round(side / longer))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def overlay(
    image: Image.Image, boxes: Sequence[PatchBox], activations: Sequence[float], side: int = SIDE, top: float = 0.0
) -> Image.Image:
    """The picture with every patch tinted by its activation and a black-and-white frame around the strongest one.

    The tint is relative to the strongest patch, or to `top` where that is larger.
    """
    if len(boxes) != len(activations):
        raise ValueError(f"{len(boxes)} patch boxes but {len(activations)} activations")
    picture = enlarge(image.convert("RGB"), side)
    if max(activations, default=0.0) <= 0:
        return picture
    values = np.maximum(np.asarray(activations, np.float64), 0.0)
    levels = np.round(255 * values / max(values.max(), top)).astype(int)
    tint = Image.new("RGBA", picture.size, (*_TINT, 0))
    paint = ImageDraw.Draw(tint)
    for box, level in zip(boxes, levels.tolist(), strict=True):
        left, upper, right, bottom = box.pixels(*picture.size)  # Pillow's rectangles include right and bottom
        paint.rectangle((left, upper, right - 1, bottom - 1), fill=(*_TINT, level * _MAX_ALPHA // 255))
    picture = Image.alpha_composite(picture.convert("RGBA"), tint).convert("RGB")
    left, upper, right, bottom = boxes[int(values.argmax())].pixels(*picture.size)
    frame = ImageDraw.Draw(picture)
    frame.rectangle((left, upper, right - 1, bottom - 1), outline=(0, 0, 0), width=3)
    frame.rectangle((left + 1, upper + 1, right - 2, bottom - 2), outline=(255, 255, 255), width=1)
    return picture


def example_picture(example: FeatureExample, side: int = SIDE) -> Image.Image | None:
    """The example's picture with its activations over it; None when the example is text alone."""
    if example.image_png is None:
        return None
    return overlay(decode(example.image_png), example.patch_boxes, example.patch_activations, side, _top(example))


def example_png(example: FeatureExample) -> bytes | None:
    """`example_picture` as PNG bytes."""
    picture = example_picture(example)
    if picture is None:
        return None
    return png_bytes(picture.quantize(_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))


def example_alt(example: FeatureExample) -> str:
    """Alternative text for the example's picture: its caption, and where the feature fires most."""
    values, boxes = np.asarray(example.patch_activations), example.patch_boxes
    firing = int((values > 0).sum())
    if not firing:
        return f"{example.caption}; the feature does not fire on the picture"
    box = boxes[int(values.argmax())]
    down = ("top", "middle", "bottom")[min(2, int(3 * (box.top + box.bottom) / 2))]
    across = ("left", "centre", "right")[min(2, int(3 * (box.left + box.right) / 2))]
    return f"{example.caption}; fires on {firing} of {len(boxes)} patches, most at {down} {across}"


def token_spans(example: FeatureExample, context: int = 3) -> list[TokenSpan]:
    """The example's text as shaded tokens: those that fire and `context` on either side, the rest as one `…` per gap.

    Shades are relative to the example's strongest position, pictures included. Text alone is kept whole when short.
    """
    values = np.asarray(example.token_activations, np.float64)
    near = np.zeros(len(values), bool)
    for position in np.flatnonzero(values > 0):
        near[max(position - context, 0) : position + context + 1] = True
    if example.image_png is None and len(values) <= _SHORT_TEXT:
        near[:] = True
    top, best = _top(example), values.max(initial=0.0)
    spans: list[TokenSpan] = []
    for token, value, kept in zip(example.tokens, values, near, strict=True):
        if kept:
            spans.append(TokenSpan(token, float(value), max(float(value), 0.0) / top, bool(value == best > 0)))
        elif not spans or spans[-1] != _GAP:
            spans.append(_GAP)
    return spans if near.any() else []


def _top(example: FeatureExample) -> float:
    """The example's strongest activation at any position, the scale of its tints and shades; 1 if it never fires."""
    return max((*example.patch_activations, *example.token_activations), default=0.0) or 1.0


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
    """A row per map: the picture (uint8 `[H, W, 3]`), the map over it, and the parts of the picture's edge.

    `effect`, "total" or "direct", is for the title.
    """
    with drawing(path, 8.6, 0.5 + 2.5 * len(maps)) as figure:
        grid = figure.subplots(len(maps), 3, squeeze=False, width_ratios=[1, 1, 1.25])
        for (left, middle, right), patch_map in zip(grid, maps, strict=True):
            image = _shrunk(pictures[patch_map.picture])
            _show(left, image, f"picture {patch_map.picture + 1}")
            _show_map(middle, image, patch_map.raster(*image.shape[:2]), f"{effect} effect on {patch_map.target!r}")
            parts = {"patches": patch_map.from_patches} | {name: v for name, v in patch_map.remainder.items() if v}
            right.barh(
                list(parts),
                list(parts.values()),
                color=[POSITIVE if value >= 0 else NEGATIVE for value in parts.values()],
            )
            right.axvline(0, color="black", linewidth=0.8)
            right.set_title(f"sum {patch_map.edge:.3g}, unexplained {patch_map.residual:.0e}", loc="left", fontsize=9)
            right.invert_yaxis()
            right.set_xlabel("logits")
    return Path(path)


def feature_maps(
    maps: Mapping[str, Mapping[str, Sequence[PictureMap]]], pictures: Sequence[np.ndarray], path: str | Path
) -> Path:
    """A row per feature and picture (uint8 `[H, W, 3]`): `maps` are feature -> kind -> a map per picture."""
    rows = [
        (feature, picture, {MAP_NAMES.get(kind, kind): by_picture[number] for kind, by_picture in kinds.items()})
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
            for axes, (name, picture_map) in zip(others, maps.items(), strict=True):
                _show_map(axes, image, picture_map.raster(*image.shape[:2]), name)
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
