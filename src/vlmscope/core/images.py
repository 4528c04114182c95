"""Records that refer to pictures and to parts of them; image files are opened by `vlmscope.data.images`."""

from dataclasses import dataclass
from typing import NamedTuple


class PatchBox(NamedTuple):
    """The part of a picture that a soft token stands for, as fractions 0..1 of its width and height; y points down."""

    left: float
    top: float
    right: float
    bottom: float

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The box in whole pixels `(left, top, right, bottom)` of a picture of this size.

        A box without area, such as that of a token that ends a row, becomes one pixel wide or high.
        """
        left, right = _span(self.left, self.right, width)
        top, bottom = _span(self.top, self.bottom, height)
        return left, top, right, bottom


def _span(first: float, last: float, length: int) -> tuple[int, int]:
    start = min(round(first * length), length - 1)
    return start, max(round(last * length), start + 1)


@dataclass(frozen=True)
class ImageRef:
    """Where a picture came from and what it was.

    `uri` is a path or a name such as `orrery:planets/test/17`; `sha256` is the hex digest of the file's bytes, or None
    when the picture never was a file; `width` and `height` are in pixels.
    """

    uri: str
    sha256: str | None
    width: int
    height: int
