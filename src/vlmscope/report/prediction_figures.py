"""Figures of predicted errors: areas under the curve with intervals, and the pictures that were asked about.

Every function writes one PNG and returns its path; `ValueError` means that there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.report.style import COLOURS, INK, MARKERS, MUTED, NEGATIVE, POSITIVE, drawing, pick, tidy


@dataclass(frozen=True)
class AskedPicture:
    """A picture uint8 [H, W, 3], what was asked of it, what was said and how sure that was, and what is right."""

    image: np.ndarray
    prompt: str
    said: str
    answer: str
    probability: float


def areas(groups: Mapping[str, Mapping[str, Rate]], path: str | Path, chance: str = "mean of shuffled answers") -> Path:
    """Areas under the curve with intervals: a band of rows for each group, a mark for each predictor.

    Args:
        groups: group -> predictor -> area; a `control` is drawn as a hollow diamond.
        path: the PNG.
        chance: what the diamonds are.
    """
    rows = [(group, name, area) for group, found in groups.items() for name, area in found.items()]
    if not rows:
        raise ValueError("no area to draw")
    predictors = list(dict.fromkeys(name for _, name, _ in rows))
    with drawing(path, 7.4, 1.3 + 0.3 * (len(rows) + len(groups))) as figure:
        axes = figure.subplots()
        at, ticks, names = 0.0, [], []
        diamonds = None
        for group, found in groups.items():
            axes.text(0.0, at, group, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, weight="bold")
            at += 1
            for name, area in found.items():
                number = predictors.index(name)
                low, high = max(area.value - area.ci_low, 0), max(area.ci_high - area.value, 0)
                style = {"color": pick(COLOURS, number), "marker": pick(MARKERS, number), "capsize": 3, "markersize": 6}
                axes.errorbar([area.value], [at], xerr=[[low], [high]], linestyle="none", **style)
                axes.annotate(f"{area.value:.2f}", (area.ci_high, at), (5, 0), textcoords="offset points",
                              va="center", fontsize=8)  # fmt: skip
                if area.control is not None:
                    marks = {"marker": "D", "s": 26, "facecolors": "white", "edgecolors": INK, "zorder": 4}
                    diamonds = axes.scatter([area.control], [at], **marks)
                ticks.append(at)
                names.append(name)
                at += 1
        axes.axvline(0.5, color=MUTED, linewidth=1, linestyle="--")
        if diamonds is not None:
            diamonds.set_label(chance)
            figure.legend(loc="outside lower center", frameon=False)
        axes.set_yticks(ticks, names)
        axes.set_ylim(at - 0.4, -0.7)
        lowest = min(min(area.ci_low, area.control or 1.0) for _, _, area in rows)
        axes.set_xlim(min(0.38, lowest - 0.03), max(1.0, max(area.ci_high for _, _, area in rows)) + 0.06)
        axes.set_xlabel("area under the ROC curve (0.5: chance)")
        tidy(axes, "x")
    return Path(path)


def probabilities(right: np.ndarray, wrong: np.ndarray, path: str | Path) -> Path:
    """How sure the model is when it is right and when it is wrong: shares of cases by the answer's probability."""
    with drawing(path, 6.6, 3.6) as figure:
        axes = figure.subplots()
        edges = np.linspace(0, 1, 21)
        for name, values, colour, hatch in (("right", right, POSITIVE, ""), ("wrong", wrong, NEGATIVE, "///")):
            shares = np.histogram(values, edges)[0] / max(len(values), 1)
            style = {"color": colour, "alpha": 0.55, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            label = f"{name} (n = {len(values)})"
            axes.bar(edges[:-1], 100 * shares, np.diff(edges), align="edge", label=label, **style)
        axes.set_xlabel("probability of the answer")
        axes.set_ylabel("answers of that kind (%)")
        axes.legend(frameon=False)
        tidy(axes)
    return Path(path)


def asked_pictures(cases: Sequence[AskedPicture], path: str | Path, columns: int = 6) -> Path:
    """Pictures with what was asked, said and right."""
    if not cases:
        raise ValueError("no picture to draw")
    columns = min(columns, len(cases))
    rows = -(-len(cases) // columns)
    with drawing(path, 2.1 * columns, 2.75 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, case in zip(grid.flat, cases, strict=False):
            axes.imshow(case.image, interpolation="nearest")
            axes.set_title(fill(case.prompt, 24), fontsize=8)
            right = case.said == case.answer
            text = f"says {case.said} (p = {case.probability:.2f})\n{'right' if right else f'right: {case.answer}'}"
            colour = POSITIVE if right else NEGATIVE
            axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=8, color=colour)
    return Path(path)
