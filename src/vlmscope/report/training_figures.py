"""Figures of training and of sweeps.

Figures of training and quality: reconstruction by layer, accuracy beside shuffled pictures, training curves.

Every function writes one PNG and returns its path; `ValueError` means that there is nothing to draw or lengths differ.

Transcoders of a sweep side by side: FVU by layer and modality, dead features, and what sparsity costs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlmscope.core.intervention import Rate
from vlmscope.core.runs import SweepJob
from vlmscope.report.figures import bars_legend, grouped_bars
from vlmscope.report.style import COLOURS, INK, LINES, MARKERS, drawing, pick, tidy

Points = tuple[Sequence[float], Sequence[float]]  # x, y


def fvu_by_layer(
    values: Mapping[str, Sequence[float]], dead_frac: Sequence[float], path: str | Path, target: float | None = None
) -> Path:
    """FVU by layer, one line a modality (`values['image'][layer]`), above the share of dead features.

    `target` draws a line at the FVU aimed at.
    """
    n_layers = len(dead_frac)
    if not values or any(len(line) != n_layers for line in values.values()):
        raise ValueError(f"need one FVU a layer and modality for {n_layers} layers")
    layers = np.arange(n_layers)
    with drawing(path, 6.6, 5.0) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for number, (name, line) in enumerate(values.items()):
            style = {"linestyle": pick(LINES, number), "marker": pick(MARKERS, number)}
            upper.plot(layers, line, label=name, color=pick(COLOURS, number), **style)
        if target is not None:
            upper.axhline(target, color=INK, linewidth=1, linestyle=(0, (1, 2)), label=f"target {target:g}")
        upper.set_ylim(bottom=0)
        upper.set_ylabel("FVU (fraction of\nvariance unexplained)")
        tidy(upper)
        lower.bar(layers, dead_frac, 0.6, color="#8c8c8c")
        lower.set_ylabel("dead features\n(% of all)")
        lower.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        lower.set_ylim(0, max(0.1, 1.15 * float(np.max(dead_frac))))
        lower.set_xlabel("layer")
        lower.set_xticks(layers)
        tidy(lower)
        figure.legend(loc="outside lower center", ncols=len(values) + 1, frameon=False)
    return Path(path)


def accuracy_bars(
    accuracies: Mapping[str, Rate | float],
    shuffled: Mapping[str, float],
    path: str | Path,
    ylabel: str = "accuracy (%)",
) -> Path:
    """Accuracy by question with 95 % intervals (none for a plain float); diamonds: the same with pictures shuffled."""
    if not accuracies:
        raise ValueError("no accuracies to draw")
    rates: list[Rate | None] = []
    for name, value in accuracies.items():
        known = value if isinstance(value, Rate) else Rate(value, value, value, 0)
        rates.append(Rate(known.value, known.ci_low, known.ci_high, known.cases, shuffled.get(name)))
    with drawing(path, max(6.6, 1.4 + 0.85 * len(rates)), 4.0) as figure:
        axes = figure.subplots()
        grouped_bars(axes, [fill(name.replace("_", " "), 12) for name in accuracies], {"pictures in place": rates})
        axes.set_ylabel(ylabel)
        bars_legend(figure, axes, control="pictures shuffled between questions")
    return Path(path)


def training_curves(panels: Mapping[str, Mapping[str, Points]], path: str | Path, xlabel: str = "step") -> Path:
    """One panel a quantity: `panels[ylabel][series] = (steps, values)`; a panel whose values span 30x is
    logarithmic.
    """
    if not panels or not all(panels.values()):
        raise ValueError("no curves to draw")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(path, 5.2 * columns, 3.3 * rows) as figure:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (ylabel, lines) in zip(grid, panels.items(), strict=False):
            for number, (name, (x, y)) in enumerate(lines.items()):
                colour, dashes = pick(COLOURS, number), pick(LINES, number)
                axes.plot(x, y, label=name, color=colour, linestyle=dashes, linewidth=1.6)
            values = np.concatenate([np.asarray(y, float) for _, y in lines.values()])
            if values.min() > 0 and values.max() > 30 * values.min():
                axes.set_yscale("log")
                # The default labels are formulas, which tokens with dollar signs made us switch off.
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_xlabel(xlabel)
            axes.set_ylabel(ylabel)
            axes.legend(frameon=False)
            tidy(axes, "both")
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
    return Path(path)


_BY_LAYER = {
    "fvu": "FVU, all tokens",
    "fvu_text": "FVU, text tokens",
    "fvu_image": "FVU, image tokens",
    "dead_frac": "dead features (%)",
}
_COSTS = {"val/fvu": "FVU", "val/ce_delta": "rise of the loss, all layers\nreplaced (nats)"}


def sweep_overview(jobs: Sequence[SweepJob], path: str | Path) -> Path:
    """One line a setting; repetitions with other seeds are averaged, a band shows their range.

    Raises:
        ValueError: no job has figures by layer.
    """
    groups: dict[str, list[SweepJob]] = {}
    for job in jobs:
        if job.metrics is not None and any(name.startswith("layers/fvu/") for name in job.metrics):
            groups.setdefault(job.group, []).append(job)
    if not groups:
        raise ValueError("no job of the sweep has figures by layer")
    with drawing(path, 11.0, 7.2) as figure:
        panels = list(figure.subplots(2, 3).flat)
        for axes, (name, label) in zip(panels, _BY_LAYER.items(), strict=False):
            _by_layer(axes, groups, name)
            axes.set_ylabel(label)
        for axes, (name, label) in zip(panels[len(_BY_LAYER) :], _COSTS.items(), strict=True):
            _against_l0(axes, groups, name)
            axes.set_ylabel(label)
        panels[3].yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(groups), 4), frameon=False)
    return Path(path)


def _by_layer(axes: Axes, groups: dict[str, list[SweepJob]], name: str) -> None:
    prefix = f"layers/{name}/layer_"
    for number, (group, jobs) in enumerate(groups.items()):
        found = [{k: v for k, v in (job.metrics or {}).items() if k.startswith(prefix)} for job in jobs]
        keys = sorted(set.intersection(*(set(one) for one in found)))
        if not keys:
            continue
        layers = [int(key.removeprefix(prefix)) for key in keys]
        values = np.array([[one[key] for key in keys] for one in found])
        colour = pick(COLOURS, number)
        style = {"linestyle": pick(LINES, number), "marker": _marker(number), "markersize": 4.5}
        axes.plot(layers, values.mean(0), label=_short(group), color=colour, **style)
        if len(values) > 1:
            axes.fill_between(layers, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def _against_l0(axes: Axes, groups: dict[str, list[SweepJob]], name: str) -> None:
    shown = np.zeros((1, 2))  # the origin is in view
    for number, jobs in enumerate(groups.values()):
        points = [
            (job.metrics["val/l0"], job.metrics[name])
            for job in jobs
            if job.metrics is not None and {"val/l0", name} <= job.metrics.keys()
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, color=pick(COLOURS, number), marker=_marker(number), s=36)
            shown = np.vstack([shown, points])
    axes.set_xlabel("active features a token (L0)")
    if len(shown) > 1:
        # Margins for the points' own spread, which is small beside the way to 0, would cut markers in half.
        (_, low), (right, high) = shown.min(0), shown.max(0)
        axes.set_xlim(0, 1.1 * right)
        axes.set_ylim(1.1 * low, 1.1 * high)
    tidy(axes)


def _marker(number: int) -> str:
    """A marker; when colours come round again, another goes with each."""
    return pick(MARKERS, number + number // len(COLOURS))


def _short(group: str) -> str:
    """Settings without their keys' groups: `transcoder.k=8` is `k=8`, so that four names fit under the figure."""
    return re.sub(r"(^|, )[\w.]+\.(\w+)=", r"\1\2=", group)
