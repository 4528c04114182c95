"""Thumbnails: the tint sits on the patches that fire, the frame on the strongest, and text is shaded in proportion."""

import io

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.records import PatchBox
from vlmscope.core.results import FeatureExample
from vlmscope.data.images import png_bytes
from vlmscope.report import pictures as thumbnails

HALVES = (PatchBox(0, 0, 0.5, 1), PatchBox(0.5, 0, 1, 1))


def overlaid(colour: int, *activations: float) -> np.ndarray:
    picture = Image.new("RGB", (8, 8), (colour,) * 3)
    return np.asarray(thumbnails.overlay(picture, HALVES, activations, side=64)).astype(int)


def test_tint_and_frame_mark_where_it_fires_in_proportion() -> None:
    shown = overlaid(100, 0.0, 3.0)
    assert (shown[:, :32] == 100).all() and (shown[10:50, 40:55, 0] > 150).all()
    half = overlaid(0, 1.0, 2.0)
    assert 2 * half[30, 16, 0] == pytest.approx(half[30, 48, 0], abs=3)
    assert (overlaid(100, 0.0, -1.0) == 100).all()
    with pytest.raises(ValueError, match="2 patch boxes but 1"):
        overlaid(0, 1.0)


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


def test_pictures_as_addresses() -> None:
    image = np.random.default_rng(1).integers(0, 255, (5, 7, 3), np.uint8)
    png, jpeg = png_bytes(image), io.BytesIO()
    assert thumbnails.size(png) == (7, 5)
    assert np.array_equal(np.asarray(thumbnails.decode(png)), image)
    assert thumbnails.data_uri(png).startswith("data:image/png;base64,iVBOR")
    Image.fromarray(image).save(jpeg, format="JPEG")
    assert thumbnails.data_uri(jpeg.getvalue()).startswith("data:image/jpeg;base64,/9j/")
    with pytest.raises(ValueError, match="not a PNG"):
        thumbnails.data_uri(b"<svg onload=alert(1)>")


def test_words_for_a_picture_and_spans_of_a_text() -> None:
    example = FeatureExample(3.0, "mars 1", b"", HALVES, (0.5, 2.0))
    assert thumbnails.example_alt(example) == "mars 1; fires on 2 of 2 patches, most at middle right"
    example = FeatureExample(4.0, "text", None, tokens=("a", "b", "c"), token_activations=(0.0, 4.0, 1.0))
    spans = [(span.text, span.shade, span.peak) for span in thumbnails.token_spans(example)]
    assert spans == [("a", 0, False), ("b", 1, True), ("c", 0.25, False)]
    long = tuple(f"t{at}" for at in range(30))
    example = FeatureExample(2.0, "text", None, tokens=long, token_activations=(0.0,) * 9 + (2.0,) + (0.0,) * 20)
    assert [span.text for span in thumbnails.token_spans(example, 1)] == ["…", "t8", "t9", "t10", "…"]
