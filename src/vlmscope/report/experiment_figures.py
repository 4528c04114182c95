"""Horizontal bars of groups, such as where each word of a caption comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.ticker import PercentFormatter

from vlmscope.core.intervention import Rate
from vlmscope.report.style import (
    COLOURS,
    HATCHES,
    INK,
    drawing,
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

    return Path(path)
