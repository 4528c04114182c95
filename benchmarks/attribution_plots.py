"""The growth of attribution with the size of its input, drawn on logarithmic axes."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator

from vlmscope.report.figures import drawing

_LABELS = {
    "growth-nodes": "nodes with a row (of 15,872 active features)",
    "growth-tokens": "tokens",
    "growth-layers": "layers",
    "growth-features": "active features a position",
}
_FIELD = {"growth-nodes": "max_nodes", "growth-tokens": "n_tokens", "growth-layers": "n_layers", "growth-features": "k"}


def _sizes(name: str, points: list[dict[str, Any]]) -> np.ndarray:
    return np.array([point["change"][_FIELD[name]] for point in points], dtype=float)


def exponent(name: str, points: list[dict[str, Any]]) -> float:
    """The slope of log(seconds) over log(size), least squares over the upper half where constants matter little."""
    upper = max(2, (len(points) + 1) // 2)
    seconds = np.array([point["seconds"] for point in points])
    return float(np.polyfit(np.log(_sizes(name, points)[-upper:]), np.log(seconds[-upper:]), 1)[0])


def draw_growth(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """One panel an axis, with the exponent."""
    shown = [name for name in _LABELS if name in results]
    with drawing(path, 9.0, 6.0) as figure:
        for number, name in enumerate(shown):
            axes = figure.add_subplot(2, 2, number + 1)
            sizes, seconds = _sizes(name, results[name]), [point["seconds"] for point in results[name]]
            axes.loglog(sizes, seconds, marker="o")
            axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.minorticks_off()
            axes.set_xlabel(_LABELS[name])
            axes.set_ylabel("seconds, one thread")
            axes.set_title(f"exponent {exponent(name, results[name]):.2f}")
