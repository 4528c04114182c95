"""Odd pictures become RGB, from a file, its bytes or a PIL object alike; bad ones are refused in one line."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from vlmscope.core.errors import UserError
from vlmscope.core.records import as_rgb
from vlmscope.data import images
from vlmscope.data.images import (
    check_image,
    decode_image,
    open_image,
    picture_format,
)

NOISE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
ALPHA = np.array([0, 255, 128, 0, 255, 64, 0], np.uint8) * np.ones((5, 1), np.uint8)
HOLES = np.arange(35).reshape(5, 7) % 3 == 0


def encoded(picture: Image.Image, form: str, **settings: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **settings)
    return buffer.getvalue()


def through_every_door(data: bytes, folder: Path) -> list[np.ndarray]:
    (folder / "picture").write_bytes(data)
    found = (open_image(folder / "picture"), decode_image(data, "x"), as_rgb(Image.open(io.BytesIO(data))))
    assert all(picture.mode == "RGB" and as_rgb(picture) is picture for picture in found)
    return [np.asarray(picture) for picture in found]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "RGB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    data = encoded(Image.new("RGB", (7, 5), (200, 200, 200)).convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    for pixels in through_every_door(data, tmp_path):
        assert pixels.shape == (5, 7, 3)
        if mode != "1":  # dithered
            assert pixels.mean() == pytest.approx(200, abs=6)


def rgba() -> Image.Image:
    return Image.fromarray(np.dstack([NOISE, ALPHA]))


def palette() -> Image.Image:
    """Colour 0, which is black, where there are holes."""
    picture = Image.fromarray(np.where(HOLES, 0, 1).astype(np.uint8))
    picture.putpalette([0, 0, 0, 10, 120, 250])
    return picture


def keyed(mode: str) -> Image.Image:
    return Image.fromarray(np.where(HOLES[..., None], 0, NOISE | 1).astype(np.uint8)).convert(mode)


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


SOLID = np.where(HOLES, 0, 255)
GREY = np.asarray(keyed("L"))[..., None].repeat(3, 2)
BLUE = np.full((5, 7, 3), (10, 120, 250))
TRANSPARENT: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "RGBA": (lambda: encoded(rgba(), "PNG"), on_white(NOISE, ALPHA)),
    "LA": (
        lambda: encoded(Image.merge("LA", (keyed("L"), Image.fromarray(ALPHA))), "PNG"),
        on_white(GREY, ALPHA),
    ),
    "palette with levels": (
        lambda: encoded(palette(), "PNG", transparency=bytes([0, 128])),
        on_white(BLUE, np.where(HOLES, 0, 128)),
    ),
    "grey tRNS": (lambda: encoded(keyed("L"), "PNG", transparency=0), on_white(GREY, SOLID)),
    "RGB tRNS": (lambda: encoded(keyed("RGB"), "PNG", transparency=(0, 0, 0)), on_white(NOISE | 1, SOLID)),
    "16 bit tRNS": (
        lambda: encoded(Image.fromarray(np.where(HOLES, 7, 65535 // 5).astype(np.uint16)), "PNG", transparency=7),
        on_white(np.full((5, 7, 3), 51), SOLID),
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_laid_on_white_as_the_processors_do(tmp_path: Path, kind: str) -> None:
    make, wanted = TRANSPARENT[kind]
    data = make()
    for pixels in through_every_door(data, tmp_path):
        assert np.abs(pixels - wanted).max() <= 1  # Pillow rounds in whole numbers
        if kind != "16 bit tRNS":  # which Pillow alone makes white altogether
            theirs = convert_to_rgb(Image.open(io.BytesIO(data)), return_numpy=True)
            assert np.array_equal(pixels, np.asarray(theirs))


WIDE = {
    "PNG": lambda values: encoded(Image.fromarray(values.astype(np.uint16)), "PNG"),
    "big-endian TIFF": lambda values: encoded(
        Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes()), "TIFF"
    ),
    "PGM": lambda values: b"P5 %d %d 65535\n" % values.shape[::-1] + values.astype(">u2").tobytes(),
    "float TIFF": lambda values: encoded(Image.fromarray((values / 65535).astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("top", [0, 255, 40000, 65535])
@pytest.mark.parametrize("kind", WIDE)
def test_the_scale_of_wide_pixels_is_that_of_the_format_whatever_values_occur(
    tmp_path: Path, kind: str, top: int
) -> None:
    values = np.linspace(0, top, 35).round().reshape(5, 7)
    for pixels in through_every_door(WIDE[kind](values), tmp_path):
        assert np.array_equal(pixels, np.round(values / 65535 * 255)[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0, 255]], np.int32), "32-bit integers"),
        (np.array([[0, 200]], np.float32), "from 0 to 200"),
        (np.array([[-0.5, 1]], np.float32), "from -0.5 to 1"),
        (np.array([[0, np.nan]], np.float32), "from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "from 0 to inf"),
    ],
)
def test_pixels_of_unknown_scale_are_refused(values: np.ndarray, words: str) -> None:
    data = encoded(Image.fromarray(values), "TIFF")
    for door in (lambda: decode_image(data, "x.tif"), lambda: as_rgb(Image.fromarray(values))):
        with pytest.raises(UserError, match=f"{words}.*save it with 8 or 16 bits"):
            door()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_orientation_is_applied(tmp_path: Path, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for pixels in through_every_door(encoded(Image.new("RGB", (8, 4)), form, exif=exif), tmp_path):
        assert pixels.shape == (8, 4, 3)


def header(side: int) -> bytes:
    """A grey PNG of `side * side` pixels, none of which it holds."""
    fields = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + fields + struct.pack(">I", zlib.crc32(fields))
    return head + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize(("side", "words"), [(10_001, "10,001 x 10,001"), (30_000, "900,000,000")])
@pytest.mark.filterwarnings("error")  # Pillow's own, near the limit
def test_decompression_bombs_are_refused_by_their_header(tmp_path: Path, side: int, words: str) -> None:
    (tmp_path / "x.png").write_bytes(header(side))
    doors = (
        lambda: open_image(tmp_path / "x.png"),
        lambda: check_image(tmp_path / "x.png"),
        lambda: decode_image(header(side), "x.png"),
        lambda: picture_format(header(side), "x.png"),
    )
    for door in doors:
        with pytest.raises(UserError, match=rf"x.png: {words} pixels are too many \(at most 100,000,000\); shrink it"):
            door()
    (tmp_path / "x.png").write_bytes(header(9_900))  # allowed, and no warning either
    check_image(tmp_path / "x.png")


def test_bad_files_are_named_and_headers_checked_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    check_image(tmp_path / "cut.png")  # damaged after its header
    for name in ("missing.png", "cut.png", "text.png", "."):
        for door in (open_image, check_image) if name != "cut.png" else (open_image,):
            with pytest.raises(UserError) as caught:
                door(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="64 x 64 pixels are too many"):
        check_image(tmp_path / "good.png")
