"""Small pictures of where features fire.

Pictures of where a feature fires: the input with its activation grid over it, and text as shaded tokens.

Activation grids stay small numbers until someone looks at them; only here do they become PNG bytes or shades.

Pictures with the patches on which a feature fires, kept apart: the page draws one over the other, or leaves it.

Activations stay what they are in the study, a byte a patch. Where patches lie is written once a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import PatchBox

_TINT = (255, 0, 200)  # magenta: on no planet, and visible on black space
_MAX_ALPHA = 130
_COLOURS = 96  # palette size; with it, a thumbnail is a third of its true-colour size and looks the same


@dataclass(frozen=True)
class TokenSpan:
    """A token to shade: `shade` 0..1 is its activation over the window's maximum; `peak` marks that maximum."""

    text: str
    activation: float
    shade: float
    peak: bool


_GAP = TokenSpan("…", 0.0, 0.0, False)
_SHORT_TEXT = 24  # tokens


def png_bytes(image: Image.Image | np.ndarray) -> bytes:
    """A picture (PIL, or uint8 `[H, W, 3]`) as PNG bytes."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(picture: bytes) -> str:
    """PNG or JPEG bytes as a `data:` address that a page can hold.

    Raises:
        ValueError: the bytes are neither.
    """
    jpeg = picture[:3] == b"\xff\xd8\xff"
    if not jpeg:
        png_size(picture)
    return f"data:image/{'jpeg' if jpeg else 'png'};base64," + base64.b64encode(picture).decode("ascii")


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header alone.

    Raises:
        ValueError: the bytes are not a PNG.
    """
    if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
        raise ValueError("not a PNG picture")
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def decode(png: bytes) -> Image.Image:
    """PNG bytes as an RGB picture."""
    with Image.open(io.BytesIO(png)) as image:
        return image.convert("RGB")


def enlarge(image: Image.Image, side: int) -> Image.Image:
    """Scale so that the longer edge is about `side` pixels; small pictures grow by a whole factor, without
    smoothing.
    """
    longer = max(image.size)
    if longer >= side:
        size = (max(1, image.width * side // longer), max(1, image.height * side // longer))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = max(1, round(side / longer))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def activation_grid(activations: Sequence[float], top: float = 0.0) -> np.ndarray:
    """Activations relative to `top`, or to their maximum where that is larger, as uint8; negative ones give 0."""
    values = np.maximum(np.asarray(activations, np.float64), 0.0)
    return np.round(255 * values / (max(values.max(initial=0.0), top) or 1.0)).astype(np.uint8)


def overlay(
    image: Image.Image, boxes: Sequence[PatchBox], activations: Sequence[float], side: int = 128, top: float = 0.0
) -> Image.Image:
    """The picture with every patch tinted by its activation and a black-and-white frame around the strongest one.

    The tint is relative to the strongest patch, or to `top` where that is larger.

    Raises:
        ValueError: boxes and activations differ in number.
    """
    if len(boxes) != len(activations):
        raise ValueError(f"{len(boxes)} patch boxes but {len(activations)} activations")
    picture = enlarge(image.convert("RGB"), side)
    if not boxes:
        return picture
    grid = activation_grid(activations, top)
    tint = Image.new("RGBA", picture.size, (*_TINT, 0))
    paint = ImageDraw.Draw(tint)
    for box, level in zip(boxes, grid, strict=True):
        left, upper, right, bottom = box.pixels(*picture.size)
        paint.rectangle((left, upper, right - 1, bottom - 1), fill=(*_TINT, int(level) * _MAX_ALPHA // 255))
    picture = Image.alpha_composite(picture.convert("RGBA"), tint).convert("RGB")
    if max(activations) > 0:
        left, upper, right, bottom = boxes[int(np.argmax(activations))].pixels(*picture.size)
        frame = ImageDraw.Draw(picture)
        frame.rectangle((left, upper, right - 1, bottom - 1), outline=(0, 0, 0), width=3)
        frame.rectangle((left + 1, upper + 1, right - 2, bottom - 2), outline=(255, 255, 255), width=1)
    return picture


def example_png(example: FeatureExample, side: int = 128) -> bytes | None:
    """The example's picture with its activations over it as PNG bytes; None when the example is text alone."""
    if example.image_png is None:
        return None
    picture = overlay(decode(example.image_png), example.patch_boxes, example.patch_activations, side, _top(example))
    return png_bytes(picture.quantize(_COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))


def example_alt(example: FeatureExample) -> str:
    """Words for a reader who cannot see the example's picture: what it is, and where the feature fires most."""
    if not example.patch_boxes or max(example.patch_activations) <= 0:
        return f"{example.caption}; the feature does not fire on the picture"
    box = example.patch_boxes[int(np.argmax(example.patch_activations))]
    firing = sum(value > 0 for value in example.patch_activations)
    return f"{example.caption}; fires on {firing} of {len(example.patch_boxes)} patches, most at {where(box)}"


def where(box: PatchBox) -> str:
    """Which part of a picture a patch is in, such as `top left`."""
    down = ("top", "middle", "bottom")[min(2, int(3 * (box.top + box.bottom) / 2))]
    across = ("left", "centre", "right")[min(2, int(3 * (box.left + box.right) / 2))]
    return f"{down} {across}"


def token_spans(example: FeatureExample, context: int = 3) -> list[TokenSpan]:
    """The example's text as shaded tokens: those that fire and `context` on either side, the rest as one `…` a gap.

    Shades are relative to the example's strongest position, pictures included. Text alone is kept whole when short.

    Raises:
        ValueError: tokens and activations differ in number.
    """
    values = np.asarray(example.token_activations, np.float64)
    if len(example.tokens) != len(values):
        raise ValueError(f"{len(example.tokens)} tokens but {len(values)} activations")
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


SIDE = 128
_DIGITS = 4  # of a patch's edges, as fractions of the picture


@dataclass(frozen=True)
class HeatPicture:
    """A picture and where a feature fires on it.

    Attributes:
        data: the small picture as PNG or JPEG; None when it could not be had.
        width, height: of it in pixels.
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

    def __post_init__(self) -> None:
        if len(self.boxes) != len(self.levels):
            raise ValueError(f"{len(self.boxes)} patch boxes but {len(self.levels)} levels")

    @property
    def alt(self) -> str:
        """Words for those who cannot see it."""
        gone = "" if self.data is not None else "Picture not available. "
        firing = int((self.levels > 0).sum())
        if not firing:
            return f"{gone}{self.caption}; the feature does not fire on the picture"
        box = self.boxes[int(self.levels.argmax())]
        return f"{gone}{self.caption}; fires on {firing} of {len(self.boxes)} patches, most at {where(box)}"

    @property
    def uri(self) -> str:
        """The picture as an address; empty when it could not be had."""
        return "" if self.data is None else data_uri(self.data)

    @property
    def levels64(self) -> str:
        """The levels as base64."""
        return base64.b64encode(np.asarray(self.levels, np.uint8).tobytes()).decode("ascii")


@dataclass
class Geometries:
    """Numbers for the arrangements of patches on a page, so that each is written once."""

    known: dict[tuple[PatchBox, ...], int] = field(default_factory=dict)

    def number(self, boxes: tuple[PatchBox, ...]) -> int:
        """The number of an arrangement; a new one gets the next."""
        return self.known.setdefault(boxes, len(self.known))

    def table(self) -> list[list[float]]:
        """Left, top, right, bottom of every patch, one list an arrangement."""
        return [[round(edge, _DIGITS) for box in boxes for edge in box] for boxes in self.known]


def thumbnail(image: Image.Image, side: int = SIDE) -> tuple[bytes, int, int]:
    """A picture of at most `side` pixels an edge, as PNG (small ones, exactly) or JPEG, with its width and height."""
    if max(image.size) <= side:
        return png_bytes(image), image.width, image.height
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=82, optimize=True)
    return buffer.getvalue(), small.width, small.height


def strongest(pictures: Sequence[HeatPicture]) -> HeatPicture | None:
    """The picture with the strongest patch."""
    return max(pictures, key=lambda picture: int(picture.levels.max(initial=0)), default=None)
