"""Figures of predicted and measured effects are drawn from any numbers, or say that there is nothing to draw."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.intervention import Rate
from vlmscope.report.experiment_figures import by_edit, predicted_scatter


def test_figures_are_drawn(tmp_path: Path) -> None:
    x = np.linspace(-3, 3, 12)
    band = np.arange(12) % 2
    one = predicted_scatter({"direct": (x, x, band)}, ["few", "many"], tmp_path / "a.png")
    two = predicted_scatter({"direct": (x, x, band), "free": (x, 0 * x, band)}, ["few", "many"], tmp_path / "b.png")
    assert Image.open(two).width > 1.5 * Image.open(one).width
    rates = [Rate(0.5, 0.4, 0.6, 12, 0.1), Rate(0.2, 0.1, 0.3, 12)]
    drawn = by_edit({"slope": {"free": rates, "direct": rates[::-1]}}, ["ablate", "× 2"], tmp_path / "c.png", "mixed")
    assert np.asarray(Image.open(drawn).convert("L")).std() > 5


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="draw"):
        predicted_scatter({}, [], tmp_path / "a.png")
    with pytest.raises(ValueError, match="draw"):
        by_edit({}, [], tmp_path / "a.png", "")
