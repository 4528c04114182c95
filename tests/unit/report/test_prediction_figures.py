"""Figures of predicted errors are written, show something, and refuse what they cannot draw."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.intervention import Rate
from vlmscope.report.experiment_figures import AskedPicture, areas, asked_pictures, probabilities


def shown(path: Path) -> float:
    with Image.open(path) as image:
        return float(np.asarray(image.convert("L"), float).std())


def test_they_are_drawn(tmp_path: Path) -> None:
    area = Rate(0.7, 0.6, 0.8, 50, 0.5)
    groups = {"within": {"graph": area, "probability": Rate(0.65, 0.5, 0.75, 50)}, "pooled": {"graph": area}}
    assert shown(areas(groups, tmp_path / "areas.png")) > 10
    assert shown(probabilities(np.array([0.9, 0.99]), np.array([0.4]), tmp_path / "p.png")) > 10
    picture = np.full((8, 8, 3), 90, np.uint8)
    cases = [AskedPicture(picture, "what is this ?", "a", answer, 0.5) for answer in ("a", "b")]
    assert shown(asked_pictures(cases, tmp_path / "asked.png")) > 10


def test_nothing_is_not_drawn(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no area"):
        areas({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no picture"):
        asked_pictures([], tmp_path / "b.png")
    assert not list(tmp_path.iterdir())
