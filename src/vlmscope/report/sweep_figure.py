"""Transcoders of a sweep side by side: FVU by layer and modality, dead features, and what sparsity costs."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlmscope.core.sweep import SweepJob
from vlmscope.report.style import COLOURS, LINES, MARKERS, drawing, pick, tidy

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
