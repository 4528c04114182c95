"""Pictures as models take them, and parts of pictures; image files are opened by `vlmscope.data.images`."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vlmscope.core.errors import UserError

_ORIENTATION = 0x0112  # EXIF
_TOP = 65535  # white in 16 bits


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


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, upright; one that is RGB and upright already is returned as it is.

    EXIF orientation is applied, grey is repeated, and transparency is laid on white, as the image processors of
    transformers do. 16-bit grey is scaled from 0..65,535 and floating-point grey from 0..1, whatever values occur.

    Raises:
        UserError: nothing says which of its values is white: 32-bit integers, or numbers that are not in 0..1.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    check_mode(image)
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float32)
        if clear is not None:
            values[values == clear] = _TOP
        return _grey(values / _TOP)
    if image.mode == "F":
        return _grey(_unit_range(np.asarray(image)))
    if "A" in image.getbands() or clear is not None:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raise a `UserError` when a picture's header does not say which value is white."""
    if image.mode == "I" and image.format != "PPM":  # Pillow scales the files of that family to 16 bits
        raise UserError("its pixels are 32-bit integers, of which none is known to be white; save it with 8 or 16 bits")


def _grey(share: np.ndarray) -> Image.Image:
    """A picture of shares of white, `[H, W]` in 0..1."""
    return Image.fromarray(np.rint(share * 255).astype(np.uint8)).convert("RGB")


def _unit_range(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 1):  # NaN too
        raise UserError(
            f"its pixels are floating-point numbers from {low:.4g} to {high:.4g}, where 0 is black and 1 is white; "
            "scale them to 0..1, or save it with 8 or 16 bits"
        )
    return values
