"""Thumbnails: the tint sits on the patches that fire, the frame on the strongest, and text is shaded in proportion."""

import io

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import PatchBox
from vlmscope.data.images import png_bytes
from vlmscope.report import thumbnails

HALVES = (PatchBox(0, 0, 0.5, 1), PatchBox(0.5, 0, 1, 1))


def test_tint_and_frame_mark_where_it_fires() -> None:
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    shown = np.asarray(thumbnails.overlay(grey, HALVES, (0.0, 3.0), side=64)).astype(int)
    assert shown.shape == (64, 64, 3)
    assert (shown[:, :32] == 100).all()
    tinted = shown[10:50, 40:55]
    assert (tinted[..., 0] > 150).all()
    assert (tinted[..., 1] < 60).all()
    assert (shown[1, 33:63] == 255).all(), "white frame inside a black one"
    assert (shown[0, 32:] == 0).all()


def test_tint_is_proportional() -> None:
    black = Image.new("RGB", (8, 8))
    shown = np.asarray(thumbnails.overlay(black, HALVES, (1.0, 2.0), side=64)).astype(int)
    assert 2 * shown[30, 16, 0] == pytest.approx(shown[30, 48, 0], abs=3)


def test_nothing_fires_leaves_the_picture_alone() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    same = thumbnails.overlay(picture, HALVES, (0.0, -1.0), side=64)
    assert np.array_equal(np.asarray(same), np.asarray(picture))
    with pytest.raises(ValueError, match="2 patch boxes but 1"):
        thumbnails.overlay(picture, HALVES, (1.0,))


def test_enlarge_keeps_shape_and_pixels() -> None:
    small = Image.fromarray(np.arange(27, dtype=np.uint8).reshape(3, 3, 3))
    assert np.array_equal(np.asarray(thumbnails.enlarge(small, 12))[::4, ::4], np.asarray(small))
    assert thumbnails.enlarge(Image.new("RGB", (800, 400)), 128).size == (128, 64)


def test_one_scale_for_picture_and_text() -> None:
    """A patch that fires at a tenth of the strongest token is tinted a tenth, and the token is fully shaded."""
    black = png_bytes(np.zeros((64, 64, 3), np.uint8))
    both = FeatureExample(5.0, "c", black, HALVES, (0.5, 0.0), ("a", "b"), (0.0, 5.0))
    alone = FeatureExample(0.5, "c", black, HALVES, (0.5, 0.0))
    levels = []
    for example in (both, alone):
        png = thumbnails.example_png(example)
        assert png is not None
        levels.append(np.asarray(thumbnails.decode(png)).astype(int)[64, 20, 0])
    assert levels[0] == pytest.approx(levels[1] / 10, abs=3)
    assert [span.shade for span in thumbnails.token_spans(both)] == [0, 1]
    assert thumbnails.token_spans(alone) == []


def test_png_round_trip_and_refusals() -> None:
    image = np.random.default_rng(1).integers(0, 255, (5, 7, 3), np.uint8)
    png = png_bytes(image)
    assert thumbnails.png_size(png) == (7, 5)
    assert np.array_equal(np.asarray(thumbnails.decode(png)), image)
    assert thumbnails.data_uri(png).startswith("data:image/png;base64,iVBOR")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG")
    with pytest.raises(ValueError, match="not a PNG"):
        thumbnails.png_size(buffer.getvalue())
    assert thumbnails.data_uri(buffer.getvalue()).startswith("data:image/jpeg;base64,/9j/")
    with pytest.raises(ValueError, match="not a PNG"):
        thumbnails.data_uri(b"<svg onload=alert(1)>")


def test_alt_text_says_where() -> None:
    example = FeatureExample(3.0, "mars 1", b"", HALVES, (0.5, 2.0))
    assert thumbnails.example_alt(example) == "mars 1; fires on 2 of 2 patches, most at middle right"


def test_token_spans() -> None:
    example = FeatureExample(4.0, "text", None, tokens=("a", "b", "c"), token_activations=(0.0, 4.0, 1.0))
    spans = thumbnails.token_spans(example)
    assert [(span.text, span.shade, span.peak) for span in spans] == [
        ("a", 0, False),
        ("b", 1, True),
        ("c", 0.25, False),
    ]
    long = tuple(f"t{at}" for at in range(30))
    example = FeatureExample(2.0, "text", None, tokens=long, token_activations=(0.0,) * 9 + (2.0,) + (0.0,) * 20)
    assert [span.text for span in thumbnails.token_spans(example, 1)] == ["…", "t8", "t9", "t10", "…"]
