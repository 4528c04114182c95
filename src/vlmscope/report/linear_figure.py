"""Figures of predicted against measured effects. Every function writes one PNG and returns its path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.report.style import COLOURS, INK, LINES, MARKERS, MUTED, drawing, pick, tidy

_LINEAR = 0.01  # logits: effects below are drawn on a linear scale


def predicted_scatter(
    panels: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], bands: Sequence[str], path: str | Path
) -> Path:
    """One panel a title, in a row: measured against predicted effects in logits, with the line where they agree.

    Args:
        panels: title -> predicted, measured and number of the band, [n] each.
        bands: their names.
        path: the PNG.
    """
    if not panels:
        raise ValueError("no panel to draw")
    most = max(float(np.abs(v).max(initial=_LINEAR)) for x, y, _ in panels.values() for v in (x, y)) * 1.5
    with drawing(path, 3.7 * len(panels), 4.3) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (title, (x, y, band)) in zip(grid, panels.items(), strict=True):
            line = np.concatenate([-np.geomspace(most, _LINEAR / 10, 60), np.geomspace(_LINEAR / 10, most, 60)])
            axes.plot(line, line, color=INK, lw=1, ls="--", zorder=1, label="as predicted")
            for number, name in enumerate(bands):
                rows = band == number
                axes.scatter(x[rows], y[rows], s=13, alpha=0.65, linewidths=0.4, edgecolors="white", label=name,
                             color=pick(COLOURS, number), marker=pick(MARKERS, number), zorder=2)  # fmt: skip
            axes.set_xscale("symlog", linthresh=_LINEAR)
            axes.set_yscale("symlog", linthresh=_LINEAR)
            ticks = [t for t in (-10, -1, -0.1, 0, 0.1, 1, 10) if abs(t) <= most]
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
            axes.minorticks_off()
            axes.set_xlim(-most, most)
            axes.set_ylim(-most, most)
            axes.set_title(title, loc="left")
            axes.set_xlabel("predicted effect (logits)")
            tidy(axes, "both")
        grid[0].set_ylabel("measured effect (logits)")
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return Path(path)


def by_edit(
    panels: Mapping[str, Mapping[str, Sequence[Rate]]], edits: Sequence[str], path: str | Path, control: str
) -> Path:
    """One panel a measure: a line a series over the kinds of edit, with 95 % intervals.

    Args:
        panels: label of the y axis -> series -> a rate for each edit; controls are drawn as hollow diamonds.
        edits: what is on the x axis.
        path: the PNG.
        control: what the diamonds are.
    """
    if not panels or not edits:
        raise ValueError("nothing to draw")
    with drawing(path, 5.2 * len(panels), 4.2) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (ylabel, series) in zip(grid, panels.items(), strict=True):
            for number, (name, rates) in enumerate(series.items()):
                x = np.arange(len(edits)) + (number - (len(series) - 1) / 2) * 0.09
                y = np.array([r.value for r in rates])
                spread = np.array([[max(r.value - r.ci_low, 0), max(r.ci_high - r.value, 0)] for r in rates]).T
                axes.errorbar(x, y, yerr=spread, capsize=3, ms=6, lw=1.4, label=name, color=pick(COLOURS, number),
                              marker=pick(MARKERS, number), ls=pick(LINES, number))  # fmt: skip
                shuffled = [(at, r.control) for at, r in zip(x, rates, strict=True) if r.control is not None]
                if shuffled:
                    axes.scatter(*zip(*shuffled, strict=True), marker="D", s=24, facecolors="white", edgecolors=MUTED,
                                 zorder=4, label=control if number == 0 else None)  # fmt: skip
            axes.set_xticks(np.arange(len(edits)), list(edits))
            axes.set_ylabel(ylabel)
            axes.set_xlabel("edit of one feature's activation")
            axes.axhline(0, color=MUTED, lw=0.8)
            tidy(axes)
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    return Path(path)
