"""Small pictures of where features fire, and text as shaded tokens.

Reports hold pictures with the tint drawn in; feature pages hold the picture and, as numbers, how strongly the feature
fires on each patch, so that a reader can take the heatmap away.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import PatchBox
from vlmscope.data.images import png_bytes

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


def jpeg_bytes(image: Image.Image, side: int, quality: int) -> tuple[bytes, int, int]:
    """A picture of at most `side` pixels an edge as JPEG, with its width and height."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue(), small.width, small.height


def thumbnail(image: Image.Image) -> tuple[bytes, int, int]:
    """A picture of at most `SIDE` pixels an edge: a small one exactly, as PNG, else JPEG; with its width and height."""
    if max(image.size) <= SIDE:
        return png_bytes(image), image.width, image.height
    return jpeg_bytes(image, SIDE, 82)


def data_uri(picture: bytes) -> str:
    """PNG or JPEG bytes as a `data:` address; anything else is a `ValueError`."""
    for kind, start in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if picture.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    raise ValueError("not a PNG or JPEG picture")


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
        left, upper, right, bottom = box.pixels(*picture.size)
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
    """Words for a reader who cannot see the example's picture: what it is, and where the feature fires most."""
    return _alt(example.caption, example.patch_boxes, np.asarray(example.patch_activations))


def _alt(caption: str, boxes: Sequence[PatchBox], values: np.ndarray) -> str:
    firing = int((values > 0).sum())
    if not firing:
        return f"{caption}; the feature does not fire on the picture"
    box = boxes[int(values.argmax())]
    down = ("top", "middle", "bottom")[min(2, int(3 * (box.top + box.bottom) / 2))]
    across = ("left", "centre", "right")[min(2, int(3 * (box.left + box.right) / 2))]
    return f"{caption}; fires on {firing} of {len(boxes)} patches, most at {down} {across}"


def token_spans(example: FeatureExample, context: int = 3) -> list[TokenSpan]:
    """The example's text as shaded tokens: those that fire and `context` on either side, the rest as one `…` per gap.

    Shades are relative to the example's strongest position, pictures included. Text alone is kept whole when short.
    """
    values = np.asarray(example.token_activations, np.float64)
    near = np.zeros(len(values), bool)
    for at in np.flatnonzero(values > 0):
        near[max(at - context, 0) : at + context + 1] = True
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


@dataclass(frozen=True)
class HeatPicture:
    """A picture and where a feature fires on it.

    Attributes:
        data: the small picture as PNG or JPEG; None when it is not available.
        width: of it in pixels; `height` likewise.
        caption: what the input says.
        boxes: P patches.
        levels: `[P]` uint8, activations in 255ths of the example's peak.
        peak: the example's peak is in this picture.
    """

    data: bytes | None
    width: int
    height: int
    caption: str
    boxes: tuple[PatchBox, ...]
    levels: np.ndarray
    peak: bool

    @property
    def alt(self) -> str:
        """Words for those who cannot see it."""
        gone = "" if self.data is not None else "Picture not available. "
        return gone + _alt(self.caption, self.boxes, self.levels)

    @property
    def levels64(self) -> str:
        """The levels as base64."""
        return base64.b64encode(np.asarray(self.levels, np.uint8).tobytes()).decode("ascii")
