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
        """The box in whole pixels `(left, top, right, bottom)` of a picture of this size."""
        return (
            round(self.left * width),
            round(self.top * height),
            round(self.right * width),
            round(self.bottom * height),
        )


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
