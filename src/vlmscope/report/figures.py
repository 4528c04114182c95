"""One look for all figures, and the charts of rates, curves, matrices and layers; each writes a PNG, returns its path.

The palette is safe for the colour-blind and survives a grey printer (Okabe and Ito's). Series differ by hatch, marker
or line style besides their colour, so no meaning depends on hue.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.results import Curve, Rate, SweepJob

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 1)))
# Light and dark alternate, and neighbours differ by hatch, so that a grey print tells the parts of a bar.
FILLS = (
    ("#0072B2", ""),
    ("#F0E442", "///"),
    ("#D55E00", ""),
    ("#F6B8D0", "..."),
    ("#009E73", "\\\\\\"),
    ("#dcdcdc", ""),
    ("#a8a8a8", "xxx"),
    ("#4d4d4d", ""),
)
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"
INK, MUTED = "#222222", "#6b6b6b"
DPI = 150

_RC = {
    # The style "whitegrid" of seaborn, whose import takes half a second.
    **dict.fromkeys(("xtick.color", "ytick.color"), ".15"),
    **dict.fromkeys(("xtick.bottom", "ytick.left"), False),
    **{"axes.grid": True, "axes.axisbelow": True, "lines.solid_capstyle": "round"},
    **{"patch.edgecolor": "w", "patch.force_edgecolor": True},
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.titlesize": 11.0,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.fontsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "grid.color": "#dddddd",
    "hatch.linewidth": 0.8,
    # Tokens are shown as they are: a dollar sign must not start a formula.
    "text.parse_math": False,
}

LABELS = {
    "steer": "steering",
    "patch": "patching",
    "ablate": "ablation",
    "generate": "generated, token by token",
    "all": "all layers, all positions",
    "no_last_layer": "without last layer",
    "no_last_position": "without last position",
    "role_image": "picture positions only",
    "role_question": "question positions only",
    "role_last": "last position only",
    "role_special": "special tokens only",
    "worst": "worst question",
}

logging.getLogger("matplotlib.category").setLevel(logging.WARNING)  # layers are strings that look like numbers


def label(name: str) -> str:
    """The words to show for the name of a method, mode, question or scope."""
    return LABELS.get(name, name.replace("_", " "))


def pick(choices: tuple[Any, ...], number: int) -> Any:
    """The style of series `number`; styles repeat when there are more series than styles."""
    return choices[number % len(choices)]


def line_style(number: int) -> dict[str, Any]:
    """Colour, dashes and marker of a line; where colours repeat, dashes and markers differ."""
    other = number + number // len(COLOURS)
    look = {"color": pick(COLOURS, number), "linestyle": pick(LINES, other), "marker": pick(MARKERS, other)}
    return look | {"markersize": 5}


def bar_style(number: int) -> dict[str, Any]:
    """Colour and hatch of a bar; where colours repeat, hatches differ."""
    hatch = pick(HATCHES, number + number // len(COLOURS))
    return {"color": pick(COLOURS, number), "hatch": hatch, "edgecolor": "white", "linewidth": 0}


def percent_axis(axis: Axis) -> None:
    """Label shares 0..1 in per cent; the unit belongs to the axis label."""
    axis.set_major_formatter(PercentFormatter(1.0, symbol=""))


@contextmanager
def drawing(
    path: str | Path, width: float, height: float, constrained: bool = True, dpi: int = DPI
) -> Iterator[Figure]:
    """Yield an empty figure of `width` x `height` inches; on success it is written to `path` as PNG, atomically."""
    with mpl.rc_context(_RC):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained" if constrained else None)
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            # Without the software's name, equal figures are equal bytes.
            figure.savefig(temporary, format="png", metadata={"Software": None})


def tidy(axes: Axes, grid: str | None = "y") -> None:
    """Keep the grid lines of one axis (or none) behind the data and drop the frame's right and top side."""
    axes.set_axisbelow(True)
    axes.grid(False)
    if grid is not None:
        axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)


CONTROL = "matched control"


def dose_response(
    curves: Sequence[Curve], path: str | Path, xlabel: str, ylabel: str, percent: bool = True, log_x: bool = False
) -> Path:
    """Lines with 95 % bands; `percent`: y is a share 0..1, shown in per cent; `log_x`: x counts something, from 0."""
    if not curves:
        raise ValueError(f"no curves to draw for {ylabel!r}")
    with drawing(path, 6.6, 4.2) as figure:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            axes.fill_between(curve.x, curve.low, curve.high, color=pick(COLOURS, number), alpha=0.16, linewidth=0)
            axes.plot(curve.x, curve.y, label=curve.name, **line_style(number))
        if log_x:
            counts = sorted({value for curve in curves for value in curve.x})
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(counts if len(counts) <= 12 else counts[:: -(-len(counts) // 12)])
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        if percent:
            axes.set_ylim(-0.02, 1.04)
            percent_axis(axes.yaxis)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        tidy(axes, "both")
        figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False)
    return Path(path)


def rate_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Rate | None]],
    path: str | Path,
    title: str,
    ylabel: str,
    control: str = CONTROL,
    notes: Sequence[str] | None = None,
) -> Path:
    """Bars of `series[name][group]` with intervals, values above them and hollow diamonds for the controls.

    `control` says what the diamonds are; `notes` stand under the groups' names.
    """
    if not groups:
        raise ValueError(f"nothing to draw for {title!r}")
    ticks = [fill(label(name), 14) for name in groups]
    if notes is not None:
        ticks = [f"{tick}\n{note}" for tick, note in zip(ticks, notes, strict=True)]
    step = min(0.8 / len(series), 0.34)
    with drawing(path, max(6.6, 1.6 + 0.35 * len(groups) * len(series), 1.6 + 1.15 * len(groups)), 4.4) as figure:
        axes = figure.subplots()
        # Named once each, and in the legend after the bars.
        marks: dict[str, object] = {}
        for number, (name, rates) in enumerate(series.items()):
            offset = (number - (len(series) - 1) / 2) * step
            known = [(position + offset, rate) for position, rate in enumerate(rates) if rate is not None]
            x, y = [position for position, _ in known], [rate.value for _, rate in known]
            axes.bar(x, y, step * 0.94, label=label(name), **bar_style(number))
            error = axes.errorbar(x, y, _interval(known), fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
            marks["95 % interval"] = error
            for position, rate in known:
                text, spot = f"{100 * rate.value:.0f}", (position, rate.ci_high)
                axes.annotate(text, spot, (0, 2), textcoords="offset points", ha="center", fontsize=8)
            controls = [(position, rate.control) for position, rate in known if rate.control is not None]
            if controls:
                style = {"marker": "D", "s": 34, "facecolors": "white", "edgecolors": INK, "linewidths": 1.3}
                marks[control] = axes.scatter(*zip(*controls, strict=True), zorder=5, **style)
        axes.set_xticks(range(len(groups)), ticks)
        axes.set(xlim=(-0.6, len(groups) - 0.4), ylim=(0, 1.08), yticks=np.linspace(0, 1, 6), ylabel=ylabel)
        percent_axis(axes.yaxis)
        axes.set_title(title, loc="left")
        tidy(axes)
        handles, names = axes.get_legend_handles_labels()
        handles, names = [*handles, *marks.values()], [*names, *marks]
        columns = len(names) if sum(map(len, names)) < 60 else 2
        figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
    return Path(path)


def _interval(known: Sequence[tuple[float, Rate]]) -> np.ndarray:
    """`[2, n]` distances of the interval's ends from the values."""
    ends = [(rate.value - rate.ci_low, rate.ci_high - rate.value) for _, rate in known]
    return np.maximum(np.reshape(ends, (-1, 2)).T, 0)


def word_bars(words: Sequence[str], series: Mapping[str, Sequence[Rate | None]], path: str | Path, xlabel: str) -> Path:
    """Horizontal bars with 95 % intervals, a group per word (the first on top), a bar per series; None leaves a gap."""
    height = 0.8 / len(series)
    with drawing(path, 7.4, 1.3 + 0.46 * len(words) * max(len(series) / 2, 1)) as figure:
        axes = figure.subplots()
        for number, (name, rates) in enumerate(series.items()):
            offset = (number - (len(series) - 1) / 2) * height
            known = [(position + offset, rate) for position, rate in enumerate(rates) if rate is not None]
            y, values = [position for position, _ in known], [rate.value for _, rate in known]
            axes.barh(y, values, height * 0.92, label=name, **bar_style(number))
            axes.errorbar(values, y, xerr=_interval(known), fmt="none", ecolor=INK, elinewidth=1.0, capsize=2)
        axes.set_yticks(range(len(words)), words)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        highest = max(rate.ci_high for rates in series.values() for rate in rates if rate is not None)
        axes.set(xlim=(0, min(1.05 * highest, 1.02)), xlabel=xlabel)
        percent_axis(axes.xaxis)
        tidy(axes, "x")
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return Path(path)


def layer_role_heatmap(
    matrix: np.ndarray,
    layers: Sequence[int] | Sequence[str],
    roles: Sequence[str],
    path: str | Path,
    label: str,
    xlabel: str = "position role",
    ylabel: str = "layer",
) -> Path:
    """`matrix [len(layers), len(roles)]` as a heatmap, last layer on top; `label` names the values and their unit.

    Signed values get a diverging scale around 0; every cell prints its number, so grey is enough. Integers are counts.
    """
    values = np.asarray(matrix, float)
    if values.shape != (len(layers), len(roles)):
        raise ValueError(f"matrix is {values.shape}, but there are {len(layers)} layers and {len(roles)} roles")
    signed = bool(np.nanmin(values) < 0)
    limit = float(np.nanmax(np.abs(values))) or 1.0
    counts = np.issubdtype(np.asarray(matrix).dtype, np.integer)
    look = {"vmin": -limit if signed else 0.0, "vmax": limit, "cmap": "vlag" if signed else "viridis"}
    look |= {"fmt": ",.0f" if counts else ".2g", "linewidths": 1.0, "cbar_kws": {"label": label}}
    with drawing(path, 2.6 + 1.15 * len(roles), 1.4 + 0.42 * len(layers)) as figure:
        axes = figure.subplots()
        names = [role.replace("_", " ") for role in roles]
        _heatmap(axes, values[::-1], [str(layer) for layer in reversed(list(layers))], names, **look)
        axes.set(xlabel=xlabel, ylabel=ylabel)
    return Path(path)


def _heatmap(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Any, **look: Any) -> None:
    import seaborn as sns  # here, as most runs draw no heatmap and the import takes half a second

    look = {"annot": True, "annot_kws": {"fontsize": 9}, "xticklabels": columns, "yticklabels": rows} | look
    sns.heatmap(values, ax=axes, **look)
    axes.tick_params(axis="y", labelrotation=0)


def share_matrices(
    names: Sequence[str],
    panels: Mapping[str, np.ndarray],
    path: str | Path,
    axes_of: tuple[str, str] = ("pictures of", "given the features of"),
    percent: bool = True,
) -> Path:
    """A matrix per panel, recipients down and donors across; hatched where there is nothing to measure.

    `panels` are title -> [n, n] of n concepts, nan where there is no value; `axes_of` names the rows and the columns;
    `percent`: values are shares 0..1, shown in per cent, else counts.
    """
    scale = 100 if percent else 1
    most = 100 if percent else max(float(np.nanmax(matrix)) for matrix in panels.values())
    with drawing(path, 4.1 * len(panels), 3.9) as figure:
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, shares) in zip(grid, panels.items(), strict=True):
            values = np.asarray(shares, float) * scale
            nothing = np.isnan(values)
            axes.set_facecolor("#f2f2f2")
            look = {"vmin": 0, "vmax": most, "cmap": "Blues", "fmt": ".0f", "linecolor": "white"}
            _heatmap(axes, values, names, names, mask=nothing, cbar=False, square=True, linewidths=1, **look)
            hatched = {"facecolor": "#f2f2f2", "edgecolor": "#c8c8c8", "hatch": "///", "lw": 0}
            for row, column in np.argwhere(nothing):
                axes.add_patch(Rectangle((column, row), 1, 1, **hatched))
            axes.tick_params(colors=INK, length=0)
            axes.tick_params(axis="x", rotation=45)
            axes.set_title(title, loc="left")
            axes.set_xlabel(axes_of[1])
        grid[0].set_ylabel(axes_of[0])
    return Path(path)


_INDEX_BINS = 10


def _by_layer(axes: Axes, layers: Sequence[int], lines: Mapping[str, Sequence[float]], ylabel: str) -> None:
    """A line per name over layers."""
    for number, (name, values) in enumerate(lines.items()):
        axes.plot(list(layers), list(values), label=name, **line_style(number))
    _layer_axes(axes, ylabel)


def _layer_axes(axes: Axes, ylabel: str) -> None:
    axes.set_ylim(bottom=0)
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(axes)


def fvu_by_layer(metrics: Mapping[str, float], path: str | Path) -> Path:
    """FVU by layer and kind of token, above the share of dead features, from an evaluation's `layers/..` metrics."""

    def by_layer(name: str) -> dict[int, float]:
        prefix = f"layers/{name}/layer_"
        return {int(key.removeprefix(prefix)): metrics[key] for key in metrics if key.startswith(prefix)}

    names = {
        "fvu": "all tokens",
        "fvu_text": "text",
        "fvu_token_text": "text, about each token's mean",
        "fvu_image": "image",
    }
    dead, found = by_layer("dead_frac"), {words: by_layer(name) for name, words in names.items()}
    layers, dead_frac = list(dead), list(dead.values())
    # Without pictures there is no figure for them.
    values = {words: list(line.values()) for words, line in found.items() if line.keys() == dead.keys()}
    if not layers or not values:
        raise ValueError("need one FVU for each layer")
    with drawing(path, 6.6, 5.0) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _by_layer(upper, layers, values, "FVU (fraction of\nvariance unexplained)")
        upper.set_xlabel("")
        lower.bar(layers, dead_frac, 0.6, color="#8c8c8c")
        lower.set(ylabel="dead features\n(% of all)", xlabel="layer", xticks=layers)
        lower.set_ylim(0, max(0.1, 1.15 * float(np.max(dead_frac))))
        percent_axis(lower.yaxis)
        tidy(lower)
        figure.legend(loc="outside lower center", ncols=len(values), frameon=False)
    return Path(path)


def modality_by_layer(
    layers: Sequence[int],
    groups: Mapping[str, Sequence[int]],
    index: Sequence[np.ndarray],
    shared: Mapping[str, Sequence[float]],
    path: str | Path,
) -> Path:
    """Groups of features by layer, their modality indices, and the firing by features of both modalities.

    Args:
        layers: L numbers.
        groups: name -> L counts of features; those of a layer add up to its width.
        index: L arrays of modality indices in [0, 1]; nan is left out.
        shared: name -> L shares 0..1, a line each.
        path: of the PNG.
    """
    with drawing(path, 11.5, 6.6) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1])
        axes = figure.add_subplot(grid[:, 0])
        totals, below, x = np.sum(list(groups.values()), axis=0), np.zeros(len(layers)), np.arange(len(layers))
        for number, (name, counts) in enumerate(groups.items()):
            share = np.asarray(counts) / np.maximum(totals, 1)
            fill, hatch = pick(FILLS, number)
            axes.bar(x, share, 0.82, below, label=name, color=fill, hatch=hatch, edgecolor=INK, linewidth=0.5)
            below += share
        axes.set_xticks(x, [str(layer) for layer in layers])
        axes.set(ylim=(0, 1), xlabel="layer", ylabel="features (%)")
        percent_axis(axes.yaxis)
        axes.set_title("Where features fire", loc="left")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
        tidy(axes)

        # The share of a layer's features in each tenth of the index, layers from bottom to top.
        axes = figure.add_subplot(grid[0, 1])
        edges = np.linspace(0, 1, _INDEX_BINS + 1)
        counts = np.array([np.histogram(values[~np.isnan(values)], edges)[0] for values in index])
        shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
        look = {"vmin": 0, "cmap": "cividis", "annot": len(layers) <= 12, "fmt": ".0f", "annot_kws": {"fontsize": 8}}
        names = [str(layer) for layer in reversed(layers)]
        _heatmap(axes, shares[::-1], names, False, linewidths=0.6, cbar_kws={"label": "features (%)"}, **look)
        axes.set_xticks([0, _INDEX_BINS / 2, _INDEX_BINS], ["0\nwords", "0.5", "1\nsoft tokens"], rotation=0)
        axes.set(xlabel="modality index", ylabel="layer")

        axes = figure.add_subplot(grid[1, 1])
        _by_layer(axes, layers, shared, "firing by features of both (%)")
        percent_axis(axes.yaxis)
        axes.legend(frameon=False)
    return Path(path)


_LAYER_METRICS = {
    "fvu": "FVU, all tokens",
    "fvu_text": "FVU, text tokens",
    "fvu_image": "FVU, image tokens",
    "dead_frac": "dead features (%)",
}
_COSTS = {"val/fvu": "FVU", "val/ce_delta": "rise of the loss, all layers\nreplaced (nats)"}


def sweep_overview(jobs: Sequence[SweepJob], path: str | Path) -> Path:
    """Transcoders of a sweep: FVU and dead features by layer, and what sparsity costs.

    One line per setting; repetitions with other seeds are averaged, a band shows their range.
    """
    groups: dict[str, list[Mapping[str, float]]] = {}
    for job in jobs:
        if job.metrics is not None and any(name.startswith("layers/fvu/") for name in job.metrics):
            # Settings without their keys' groups, `k=8` of `transcoder.k=8`: four names fit under the figure.
            group = re.sub(r"(^|, )[\w.]+\.(\w+)=", r"\1\2=", job.group)
            groups.setdefault(group, []).append(job.metrics)
    if not groups:
        raise ValueError("no job of the sweep has figures by layer")
    with drawing(path, 11.0, 7.2) as figure:
        panels = list(figure.subplots(2, 3).flat)
        for axes, (name, ylabel) in zip(panels, _LAYER_METRICS.items(), strict=False):
            prefix = f"layers/{name}/layer_"
            for number, (group, runs) in enumerate(groups.items()):
                keys = sorted(key for key in runs[0] if key.startswith(prefix) and all(key in run for run in runs))
                values = np.array([[run[key] for key in keys] for run in runs])
                layers = [int(key.removeprefix(prefix)) for key in keys]
                axes.plot(layers, values.mean(0), label=group, **line_style(number))
                if len(runs) > 1:
                    band = {"color": pick(COLOURS, number), "alpha": 0.15, "linewidth": 0}
                    axes.fill_between(layers, values.min(0), values.max(0), **band)
            _layer_axes(axes, ylabel)
        percent_axis(panels[3].yaxis)
        for axes, (name, ylabel) in zip(panels[len(_LAYER_METRICS) :], _COSTS.items(), strict=True):
            shown = np.zeros((1, 2))  # the origin is in view
            for number, runs in enumerate(groups.values()):
                points = [(run["val/l0"], run[name]) for run in runs if {"val/l0", name} <= run.keys()]
                if points:
                    style = line_style(number)
                    axes.scatter(*zip(*points, strict=True), color=style["color"], marker=style["marker"], s=36)
                    shown = np.vstack([shown, points])
            if len(shown) > 1:
                # Margins of the points' own spread, which is small next to their distance from 0, cut markers in half.
                (_, low), (right, high) = shown.min(0), shown.max(0)
                axes.set(xlim=(0, 1.1 * right), ylim=(1.1 * low, 1.1 * high))
            axes.set(xlabel="active features a token (L0)", ylabel=ylabel)
            tidy(axes)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(groups), 4), frameon=False)
    return Path(path)
