"""Figures of single experiments.

Figures of captions: where each word comes from, and pictures with their captions before and after.

Figures of features that pictures and words share: who coincides with whom, at which layer, and what they cause.

Every function writes one PNG and returns its path; `ValueError` means that there is nothing to draw.

Figures of predicted against measured effects. Every function writes one PNG and returns its path.

Figures of predicted errors: areas under the curve with intervals, and the pictures that were asked about.

Every function writes one PNG and returns its path; `ValueError` means that there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.ticker import PercentFormatter

from vlmscope.core.intervention import Rate
from vlmscope.report.style import (
    COLOURS,
    HATCHES,
    INK,
    drawing,
    label,
    pick,
    tidy,
)


def word_bars(words: Sequence[str], series: Mapping[str, Sequence[Rate | None]], path: str | Path, xlabel: str) -> Path:
    """Horizontal bars with 95 % intervals, a group a word and a bar a series; None leaves a gap.

    Args:
        words: names of the groups, the first on top.
        series: name -> a share for each word.
        path: the PNG to write.
        xlabel: what the shares are of, and their unit (%).
    """
    height = 0.8 / len(series)
    with drawing(path, 7.4, 1.3 + 0.46 * len(words) * max(len(series) / 2, 1)) as figure:
        axes = figure.subplots()
        at = np.arange(len(words))
        for number, (name, rates) in enumerate(series.items()):
            known = [(y, rate) for y, rate in zip(at, rates, strict=True) if rate is not None]
            y = [place + (number - (len(series) - 1) / 2) * height for place, _ in known]
            values = np.array([rate.value for _, rate in known])
            axes.barh(
                y, values, height * 0.92, label=name, color=pick(COLOURS, number), hatch=pick(HATCHES, number),
                edgecolor="white", linewidth=0,
            )  # fmt: skip
            low = np.maximum(values - [rate.ci_low for _, rate in known], 0)
            high = np.maximum([rate.ci_high for _, rate in known] - values, 0)
            axes.errorbar(values, y, xerr=[low, high], fmt="none", ecolor=INK, elinewidth=1.0, capsize=2)
        axes.set_yticks(at, words)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        highest = max(rate.ci_high for rates in series.values() for rate in rates if rate is not None)
        axes.set_xlim(0, min(1.05 * highest, 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.set_xlabel(xlabel)
        tidy(axes, "x")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return Path(path)


@dataclass(frozen=True)
class CaptionedPicture:
    """Original and counterfactual side by side [H, 2 W, 3], and captions by name, in the order of reading."""

    picture: np.ndarray
    captions: dict[str, str]


def captioned(examples: Sequence[CaptionedPicture], path: str | Path) -> Path:
    """Pairs of pictures, each with its captions beside it."""
    lines = max(len(example.captions) for example in examples)
    row = max(1.3, 0.27 * lines)
    with drawing(path, 9.4, 0.45 + row * len(examples)) as figure:
        figure.suptitle("left: the picture that is captioned; right: its counterfactual", x=0.01, ha="left", fontsize=9)
        grid = figure.subplots(len(examples), 2, squeeze=False, width_ratios=[1, 2.6])
        for axes, example in zip(grid, examples, strict=True):
            half = example.picture.shape[1] // 2
            gap = np.full((len(example.picture), max(half // 16, 1), 3), 255, np.uint8)
            axes[0].imshow(np.concatenate([example.picture[:, :half], gap, example.picture[:, half:]], 1))
            for number, (name, text) in enumerate(example.captions.items()):
                height = 1 - (number + 0.5) / lines
                axes[1].text(0.0, height, label(name), fontsize=8.5, va="center", transform=axes[1].transAxes)
                axes[1].text(
                    0.33, height, fill(text, 60), fontsize=9.5, va="center", family="monospace",
                    transform=axes[1].transAxes,
                )  # fmt: skip
            for at in axes:
                at.set_axis_off()
    return Path(path)
