"""Pictures with the patches on which a feature fires, kept apart: the page draws one over the other, or leaves it.

Activations stay what they are in the study, a byte a patch. Where patches lie is written once a page.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from vlmscope.core.images import PatchBox
from vlmscope.report.thumbnails import data_uri, png_bytes, where

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
