"""Features with their strongest examples, one row each: a picture with where it fires, or the words around the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from vlmscope.core.intervention import FeatureExample
from vlmscope.report.style import MUTED, drawing
from vlmscope.report.thumbnails import decode, overlay, token_spans

_SIDE = 160


@dataclass(frozen=True)
class FeatureRow:
    """A title, such as the feature with its label, a line below it, and examples."""

    title: str
    subtitle: str
    examples: tuple[FeatureExample, ...]


def feature_sheet(rows: Sequence[FeatureRow], path: str | Path, title: str = "", columns: int = 6) -> Path:
    """Write a PNG of one line a feature.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("no features to draw")
    with drawing(path, 1.55 * columns + 0.2, 2.35 * len(rows) + 0.5) as figure:
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for number, row in enumerate(rows):
            part = parts[number]
            part.suptitle(f"{fill(row.title, 110)}\n{fill(row.subtitle, 130)}", x=0.01, ha="left", fontsize=9)
            panels = part.subplots(1, columns, squeeze=False)[0]
            for axes in panels:
                axes.set_axis_off()
            for axes, example in zip(panels, row.examples[:columns], strict=False):
                _draw(axes, example)
    return Path(path)


def _draw(axes: Axes, example: FeatureExample) -> None:
    words = "".join(f"[{span.text}] " if span.peak else f"{span.text} " for span in token_spans(example, 2)).strip()
    if example.image_png is None:
        axes.text(0.5, 0.5, fill(words or example.caption, 22), ha="center", va="center", fontsize=7)
        axes.set_title(f"{example.activation:.2f}", fontsize=7, color=MUTED)
        return
    top = max((*example.patch_activations, *example.token_activations), default=0.0)
    picture = overlay(decode(example.image_png), example.patch_boxes, example.patch_activations, _SIDE, top)
    axes.imshow(np.asarray(picture))
    axes.set_title(f"{example.activation:.2f}", fontsize=7, color=MUTED, pad=2)
    said = fill(words or example.caption, 26)[:80]
    axes.text(0.5, -0.04, said, ha="center", va="top", fontsize=6, transform=axes.transAxes)
