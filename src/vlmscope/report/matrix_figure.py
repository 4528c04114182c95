"""Shares of a matrix of concepts as numbers on grey: who is turned into whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from vlmscope.report.style import INK, drawing


def share_matrices(names: Sequence[str], panels: Mapping[str, np.ndarray], path: str | Path, rows: int = 1) -> Path:
    """One matrix a panel, recipients down and donors across, in per cent; hatched where there is nothing to measure.

    Args:
        names: n concepts.
        panels: title -> [n, n] shares 0..1, nan where there is none.
        path: the PNG to write.
        rows: of panels.
    """
    columns = -(-len(panels) // rows)
    with drawing(path, 4.1 * columns, 3.9 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, shares) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, names, np.asarray(shares, float))
            axes.set_title(title, loc="left")
        for row in grid:
            row[0].set_ylabel("pictures of")
        for axes in grid[-1]:
            axes.set_xlabel("given the features of")
    return Path(path)


def _panel(axes: Axes, names: Sequence[str], shares: np.ndarray) -> None:
    nothing = np.isnan(shares)
    axes.set_facecolor("#f2f2f2")
    sns.heatmap(
        100 * shares, mask=nothing, ax=axes, cmap="Blues", vmin=0, vmax=100, annot=True, fmt=".0f", cbar=False,
        square=True, linewidths=1, linecolor="white", xticklabels=list(names), yticklabels=list(names),
        annot_kws={"fontsize": 9},
    )  # fmt: skip
    for row, column in zip(*np.nonzero(nothing), strict=True):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="#f2f2f2", edgecolor="#c8c8c8", hatch="///", lw=0))
    axes.tick_params(axis="x", rotation=45, colors=INK, length=0)
    axes.tick_params(axis="y", rotation=0, colors=INK, length=0)
