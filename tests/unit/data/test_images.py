"""Odd pictures become RGB; bad ones are refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.data import images
from vlmscope.data.images import check_image, open_image, png_bytes


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "RGB"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tiff" if mode == "CMYK" else "png"
    if mode == "I;16":
        Image.fromarray(np.full((5, 7), 40000, np.uint16)).save(tmp_path / "x.png")
    else:
        Image.new("RGB", (7, 5), (200, 200, 200)).convert(mode).save(tmp_path / f"x.{suffix}")
    image = open_image(tmp_path / f"x.{suffix}")
    assert image.mode == "RGB"
    assert image.size == (7, 5)
    expected = 156 if mode == "I;16" else 255 if mode == "1" else 200
    if mode != "1":  # dithered
        assert np.asarray(image).mean() == pytest.approx(expected, abs=6)


def test_transparency_is_laid_on_black(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png")).max() == 0


def test_one_pixel_and_large_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert open_image(tmp_path / "dot.png").size == (1, 1)
    Image.new("L", (5000, 3000)).save(tmp_path / "large.png")
    assert max(open_image(tmp_path / "large.png").size) == images.KEEP_SIDE


def test_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (4, 8)


def test_bad_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(png_bytes(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)))
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:3000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("missing.png", "cut.png", "empty.png", "text.png", "."):
        with pytest.raises(UserError) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="too many"):
        open_image(good)


def test_a_header_is_checked_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.effect_noise((64, 64), 90).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:500])
    check_image(tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        open_image(tmp_path / "x.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    with pytest.raises(UserError, match="64 x 64 pixels are too many"):
        check_image(tmp_path / "x.png")
    for name, words in (("gone.png", "no such file"), ("", "is a folder")):
        with pytest.raises(UserError, match=words):
            check_image(tmp_path / name)
