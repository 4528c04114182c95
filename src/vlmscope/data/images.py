"""Opening picture files: the only place that does it.

Whatever the file's mode, the result is RGB: grey is repeated, transparency is laid on black (as a viewer on a dark page
would show it), 16-bit is scaled, EXIF orientation is applied, of an animation the first frame counts.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmscope.core.errors import UserError
from vlmscope.core.images import ImageRef

MAX_PIXELS = 100_000_000  # larger files are refused: decoding them would take gigabytes
KEEP_SIDE = 2048  # larger pictures are shrunk once, since every model resizes far below this


def open_image(path: str | Path) -> Image.Image:
    """Open a picture as RGB.

    Raises:
        UserError: the file is missing, is not a picture, is damaged, or has more than `MAX_PIXELS` pixels.
    """
    with _opened(Path(path)) as raw:
        return _decoded(raw)


def decode_image(data: bytes, what: str) -> Image.Image:
    """As `open_image`, from the bytes of a picture's file; `what` names it in messages."""
    with _readable(what), Image.open(io.BytesIO(data)) as raw:
        _check_size(raw, what)
        return _decoded(raw)


def picture_format(data: bytes, what: str) -> str:
    """The file name's ending for the bytes of a picture, such as "jpeg", from its header alone.

    Raises:
        UserError: they are no picture.
    """
    with _readable(what), Image.open(io.BytesIO(data)) as raw:
        return (raw.format or "png").lower()


def check_image(path: str | Path) -> None:
    """Look at a picture's header only; what `open_image` refuses for its header is refused.

    Raises:
        UserError: as `open_image`, but a file that is damaged after its header passes.
    """
    with _opened(Path(path)):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The picture before it is decoded; what goes wrong inside is told in one line too."""
    if not path.is_file():
        raise UserError(
            f"image {path}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of a picture"
        )
    with _readable(f"image {path}"), Image.open(path) as raw:
        _check_size(raw, f"image {path}")
        yield raw


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """What goes wrong inside is told in one line that begins with `what`."""
    try:
        yield
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{what}: cannot be read as a picture ({reason}); give a PNG, JPEG or WebP") from error


def _check_size(raw: Image.Image, what: str) -> None:
    if raw.width * raw.height > MAX_PIXELS:
        raise UserError(f"{what}: {raw.width} x {raw.height} pixels are too many (at most {MAX_PIXELS:,}); shrink it")


def _decoded(raw: Image.Image) -> Image.Image:
    raw.load()
    image = _to_rgb(ImageOps.exif_transpose(raw))
    if max(image.size) > KEEP_SIDE:
        image.thumbnail((KEEP_SIDE, KEEP_SIDE), Image.Resampling.LANCZOS)
    return image


def open_images(paths: Sequence[str | Path]) -> list[Image.Image]:
    """Open several pictures, in order."""
    return [open_image(path) for path in paths]


def image_ref(path: str | Path, image: Image.Image) -> ImageRef:
    """The record of a picture that came from a file."""
    return ImageRef(str(path), hashlib.sha256(Path(path).read_bytes()).hexdigest(), image.width, image.height)


def png_bytes(image: Image.Image | np.ndarray, side: int | None = None) -> bytes:
    """PNG bytes of a picture (or uint8 [H, W, 3]), shrunk to at most `side` pixels a side when given."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if side is not None and max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.asarray(image, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        return Image.fromarray((np.clip(values / top, 0, 1) * 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")
