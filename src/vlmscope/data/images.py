"""Open picture files, here only; `vlmscope.core.records.as_rgb` defines the conversion to RGB.

Pictures are not resized, since the checkpoint's processor decides how many pixels a model sees. Animations and files of
several pages give their first frame.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlmscope.core.errors import BadPicture, UserError
from vlmscope.core.records import as_rgb, check_mode

MAX_PIXELS = 100_000_000  # larger pictures are refused before decoding, which would take gigabytes
EMBEDDED_SIDE = 512  # pixels of the longer side of a picture within a file
_SMALL_FILE = 1 << 15  # bytes of a picture that is embedded exactly
FIGURE_SIDE = 2048  # pixels of the longer side, as many as figures can show


def open_image(path: str | Path) -> Image.Image:
    """Open a picture as RGB; raise `UserError` if it is missing, damaged, too large or of unknown scale (`as_rgb`)."""
    with _opened(Path(path), f"image {path}") as raw:
        return _decoded(raw)


def decode_image(data: bytes, what: str) -> Image.Image:
    """Open a picture from the bytes of its file, as `open_image` does; `what` names it in messages."""
    with _opened(io.BytesIO(data), what) as raw:
        return _decoded(raw)


def picture_format(data: bytes, what: str) -> str:
    """File extension for the bytes of a picture, such as "jpeg", from its header alone."""
    with _opened(io.BytesIO(data), what) as raw:
        return (raw.format or "png").lower()


def check_image(path: str | Path) -> None:
    """Raise as `open_image` does, but read the header only: damage behind it goes unnoticed."""
    with _opened(Path(path), f"image {path}"):
        pass


@contextmanager
def _opened(source: Path | io.BytesIO, what: str) -> Iterator[Image.Image]:
    """Yield the undecoded picture; errors inside, decoding included, become one line that begins with `what`."""
    if isinstance(source, Path) and not source.is_file():
        reason = "is a folder" if source.is_dir() else "no such file"
        raise UserError(f"{what}: {reason}; give the path of a picture")
    try:
        with warnings.catch_warnings():
            # Pillow warns near our own limit, and raises `DecompressionBombError` at about twice that.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            raw = Image.open(source)
        with raw:
            if raw.width * raw.height > MAX_PIXELS:
                raise UserError(_too_many(f"{raw.width:,} x {raw.height:,}"))
            check_mode(raw)
            yield raw
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise UserError(f"{what}: {_too_many(f'{int(count[0]):,}' if count else 'its')}") from error
    except MemoryError as error:
        raise UserError(f"{what}: there is not enough memory to open it; shrink it") from error
    except Exception as error:  # decoders raise what they like at damaged files, struct.error and RuntimeError included
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error).partition("\n")[0]
        message = f"{what}: cannot be read as a picture ({reason or type(error).__name__}); give a PNG, JPEG or WebP"
        raise BadPicture(message, source if isinstance(source, Path) else None) from error


def _too_many(pixels: str) -> str:
    return f"{pixels} pixels are too many (at most {MAX_PIXELS:,}); shrink it"


def _decoded(raw: Image.Image) -> Image.Image:
    raw.load()
    image = as_rgb(raw)
    return raw.copy() if image is raw else image  # a copy does not depend on the open file


def open_images(paths: Sequence[str | Path]) -> list[Image.Image]:
    """Open several pictures, in order."""
    return [open_image(path) for path in paths]


class PictureFiles(Sequence[Image.Image]):
    """Pictures that are opened on each access, since many large ones do not fit into memory together.

    Each is also opened once at the start, so that a bad file is refused before any work.
    """

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = tuple(paths)
        for path in self.paths:
            open_image(path)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        return open_images(self.paths[index]) if isinstance(index, slice) else open_image(self.paths[index])


def for_figures(pictures: Sequence[Image.Image]) -> list[np.ndarray]:
    """Arrays for figures: uint8 `[H, W, 3]`, the longer side at most `FIGURE_SIDE` pixels."""
    return [np.asarray(_shrunk(picture, FIGURE_SIDE)) for picture in pictures]


def png_bytes(image: Image.Image | np.ndarray, side: int | None = None) -> bytes:
    """Optimised PNG bytes of a picture or uint8 [H, W, 3], shrunk to at most `side` pixels per side."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return _png(picture if side is None else _shrunk(picture, side), optimize=True)


def jpeg_bytes(image: Image.Image, side: int, quality: int) -> bytes:
    """A picture of at most `side` pixels an edge as JPEG."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def data_uri(picture: bytes) -> str:
    """PNG or JPEG bytes as a `data:` address; anything else is a `ValueError`."""
    for kind, start in (("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff")):
        if picture.startswith(start):
            return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    raise ValueError("not a PNG or JPEG picture")


def embedded(picture: Image.Image) -> str:
    """A picture as a `data:` address, at most `EMBEDDED_SIDE` pixels a side: as PNG, or as JPEG if that is large."""
    exact = png_bytes(picture, EMBEDDED_SIDE)
    return data_uri(exact if len(exact) <= _SMALL_FILE else jpeg_bytes(picture, EMBEDDED_SIDE, 85))


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W, 3], compressed less but faster, for data sets."""
    return _png(Image.fromarray(image), compress_level=4)


def _png(picture: Image.Image, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **settings)
    return buffer.getvalue()


def _shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture with at most `side` pixels per side; unchanged when it is no larger."""
    if max(picture.size) <= side:
        return picture
    small = picture.copy()
    small.thumbnail((side, side))
    return small
