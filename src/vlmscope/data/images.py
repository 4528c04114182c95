"""Opening picture files: the only place that does it; `vlmscope.core.records.as_rgb` says what RGB a file becomes.

Nothing is shrunk: how many pixels a model sees is for its checkpoint's processor to say. Of an animation or a file of
several pages the first frame counts.
"""

from __future__ import annotations

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

MAX_PIXELS = 100_000_000  # larger files are refused before they are decoded, which would take gigabytes
FIGURE_SIDE = 2048  # pixels of the longer side in figures, which show no more


def open_image(path: str | Path) -> Image.Image:
    """Open a picture as RGB.

    Raises:
        UserError: the file is missing, is not a picture, is damaged, has more than `MAX_PIXELS` pixels, or `as_rgb`
            refuses it.
    """
    path = _file(path)
    with _opened(path, f"image {path}") as raw:
        return _decoded(raw)


def decode_image(data: bytes, what: str) -> Image.Image:
    """As `open_image`, from the bytes of a picture's file; `what` names it in messages."""
    with _opened(io.BytesIO(data), what) as raw:
        return _decoded(raw)


def picture_format(data: bytes, what: str) -> str:
    """The file name's ending for the bytes of a picture, such as "jpeg", from its header alone.

    Raises:
        UserError: as `check_image`.
    """
    with _opened(io.BytesIO(data), what) as raw:
        return (raw.format or "png").lower()


def check_image(path: str | Path) -> None:
    """Look at a picture's header only; what `open_image` refuses for its header is refused.

    Raises:
        UserError: as `open_image`, but a file that is damaged after its header passes.
    """
    path = _file(path)
    with _opened(path, f"image {path}"):
        pass


def _file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"image {path}: {'is a folder' if path.is_dir() else 'no such file'}; give the path of a picture"
        )
    return path


@contextmanager
def _opened(source: Path | io.BytesIO, what: str) -> Iterator[Image.Image]:
    """The picture before it is decoded; what goes wrong inside is reported in one line that begins with `what`."""
    try:
        with warnings.catch_warnings():
            # Pillow warns of pictures near our own limit, and raises at about twice that.
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
        said = f"{what}: cannot be read as a picture ({reason or type(error).__name__}); give a PNG, JPEG or WebP"
        raise BadPicture(said, source if isinstance(source, Path) else None) from error


def _too_many(pixels: str) -> str:
    return f"{pixels} pixels are too many (at most {MAX_PIXELS:,}); shrink it"


def _decoded(raw: Image.Image) -> Image.Image:
    raw.load()
    image = as_rgb(raw)
    return raw.copy() if image is raw else image  # which needs no open file


def open_images(paths: Sequence[str | Path]) -> list[Image.Image]:
    """Open several pictures, in order."""
    return [open_image(path) for path in paths]


class PictureFiles(Sequence[Image.Image]):
    """Pictures that are opened whenever they are asked for, since many large ones do not fit into memory together.

    Raises:
        UserError: at once, as `open_image`, for the first that cannot be opened.
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
    """Pictures as figures take them: uint8 `[H, W, 3]`, the longer side at most `FIGURE_SIDE` pixels."""
    return [np.asarray(_shrunk(picture, FIGURE_SIDE)) for picture in pictures]


def png_bytes(image: Image.Image | np.ndarray, side: int | None = None) -> bytes:
    """PNG bytes of a picture (or uint8 [H, W, 3]), shrunk to at most `side` pixels a side when given."""
    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    _shrunk(picture, side).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _shrunk(picture: Image.Image, side: int | None) -> Image.Image:
    """The picture with at most `side` pixels a side; itself when it is no larger."""
    if side is None or max(picture.size) <= side:
        return picture
    small = picture.copy()
    small.thumbnail((side, side))
    return small
