"""Figures of interventions and of matrices.

Figures of interventions: flip rates beside their controls, dose response, shifted answers, where a circuit acts.

Every function takes records, writes one PNG and returns its path. `ValueError` means that the records hold nothing to
draw or say two things about one bar.

What the logit lens says at the soft tokens of a picture, state by state, and how early over many pictures.

Shares of a matrix of concepts as numbers on grey: who is turned into whom.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator, PercentFormatter
from PIL import Image

from vlmscope.core.intervention import AnswerExample, Curve, FlipRow, Rate
from vlmscope.core.records import PatchBox
from vlmscope.report.graph_figure import shrunk
from vlmscope.report.style import COLOURS, HATCHES, INK, LINES, MARKERS, drawing, label, pick, tidy

_FLIP_LABEL = "flip rate (% of cases)"


def flip_rates(rows: Sequence[FlipRow], path: str | Path, mode: str = "free", scope: str = "all") -> Path:
    """Flip rate by question (groups) and method (bars) for one mode and scope."""
    chosen = [row for row in rows if row.mode == mode and row.scope == scope]
    return bars(chosen, path, lambda row: row.question, f"Flip rate by question ({label(mode)}, {label(scope)})")


def dose_response(curves: Sequence[Curve], path: str | Path, xlabel: str, ylabel: str, percent: bool = True) -> Path:
    """Lines with 95 % bands. `percent`: y is a share 0..1, shown in per cent."""
    return _curves(curves, path, xlabel, ylabel, percent, log_x=False)


def feature_count_curve(
    curves: Sequence[Curve], path: str | Path, xlabel: str = "features used (number)", ylabel: str = _FLIP_LABEL
) -> Path:
    """Effect against the number of features used, strongest first, on a logarithmic axis; counts of 0 are allowed."""
    return _curves(curves, path, xlabel, ylabel, percent=True, log_x=True)


def answer_shift(
    examples: Sequence[AnswerExample], path: str | Path, max_examples: int = 6, max_words: int = 5
) -> Path:
    """Per example the picture and the probabilities of its top words before and after."""
    shown = list(examples)[:max_examples]
    if not shown:
        raise ValueError("no examples to draw")
    columns = min(2, len(shown))
    height = -(-len(shown) // columns)
    with drawing(path, 5.4 * columns, 2.5 * height + 0.5) as figure:
        grid = figure.subplots(height, 2 * columns, squeeze=False, width_ratios=[1, 1.5] * columns)
        for axes in grid.flat:
            axes.set_axis_off()
        for number, example in enumerate(shown):
            row, column = divmod(number, columns)
            picture, bars = grid[row, 2 * column], grid[row, 2 * column + 1]
            picture.imshow(np.asarray(Image.open(io.BytesIO(example.image_png)).convert("RGB")))
            picture.set_title(fill(example.question, 22), fontsize=9)
            _shift_bars(bars, example, max_words)
        handles, names = grid[0, 1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False)
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
    with drawing(path, 2.6 + 1.15 * len(roles), 1.4 + 0.42 * len(layers)) as figure:
        axes = figure.subplots()
        sns.heatmap(
            values[::-1],
            ax=axes,
            vmin=-limit if signed else 0.0,
            vmax=limit,
            cmap="vlag" if signed else "viridis",
            annot=True,
            fmt=",.0f" if np.issubdtype(np.asarray(matrix).dtype, np.integer) else ".2g",
            annot_kws={"fontsize": 9},
            linewidths=1.0,
            xticklabels=[role.replace("_", " ") for role in roles],
            yticklabels=[str(layer) for layer in reversed(list(layers))],
            cbar_kws={"label": label},
        )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.tick_params(axis="y", labelrotation=0)
    return Path(path)


def bars(rows: Sequence[FlipRow], path: str | Path, category: Callable[[FlipRow], str], title: str) -> Path:
    """A bar for each method in each category of rows, with intervals and controls."""
    if not rows:
        raise ValueError(f"no rows to draw for {title!r}")
    found: dict[str, dict[str, FlipRow]] = {}
    for row in rows:
        series = found.setdefault(row.method, {})
        if category(row) in series:
            raise ValueError(f"two rows for {row.method}, {category(row)} in {title!r}")
        series[category(row)] = row
    names = list(dict.fromkeys(category(row) for row in rows))
    ticks = [fill(label(name), 14) + _feature_note([s[name] for s in found.values() if name in s]) for name in names]
    rates = {method: [s[name].rate if name in s else None for name in names] for method, s in found.items()}
    cases = sorted({row.rate.cases for row in rows})
    spread = f"{cases[0]}" if len(cases) == 1 else f"{cases[0]} to {cases[-1]}"
    with drawing(path, max(6.6, 1.6 + 1.15 * len(names)), 4.3) as figure:
        axes = figure.subplots()
        grouped_bars(axes, ticks, rates)
        axes.set_title(f"{title}\nn = {spread} cases", loc="left")
        axes.set_ylabel(_FLIP_LABEL)
        bars_legend(figure, axes)
    return Path(path)


def _feature_note(rows: Sequence[FlipRow]) -> str:
    """The number of features that acted, under the group's name; both ends when the methods differ."""
    counts = sorted({row.n_features for row in rows})
    number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}/{counts[-1]}"
    return f"\n({number} features)"


def grouped_bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[Rate | None]]) -> None:
    """Bars of `series[name][group]` with intervals, values above them and hollow diamonds for the controls."""
    width = min(0.8 / len(series), 0.34)
    interval = control = None
    for number, (name, rates) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        known = [(at + offset, rate) for at, rate in enumerate(rates) if rate is not None]
        x = [at for at, _ in known]
        y = np.array([rate.value for _, rate in known])
        axes.bar(
            x,
            y,
            width * 0.94,
            label=label(name),
            color=pick(COLOURS, number),
            hatch=pick(HATCHES, number),
            edgecolor="white",
            linewidth=0,
        )
        low = np.maximum(y - [rate.ci_low for _, rate in known], 0)
        high = np.maximum([rate.ci_high for _, rate in known] - y, 0)
        interval = axes.errorbar(x, y, [low, high], fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
        for at, rate in known:
            text = f"{100 * rate.value:.0f}"
            axes.annotate(text, (at, rate.ci_high), (0, 2), textcoords="offset points", ha="center", fontsize=8)
        marked = [(at, rate.control) for at, rate in known if rate.control is not None]
        if marked:
            style = {"marker": "D", "s": 34, "facecolors": "white", "edgecolors": INK, "linewidths": 1.3, "zorder": 5}
            control = axes.scatter(*zip(*marked, strict=True), **style)
    if interval is not None:
        interval.set_label("95 % interval")
    if control is not None:
        control.set_label("matched control")
    axes.set_xticks(range(len(groups)), groups)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, 1.08)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    tidy(axes)


def rate_bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Rate | None]],
    path: str | Path,
    title: str,
    ylabel: str,
    control: str = "matched control",
) -> Path:
    """`grouped_bars` as a figure of its own; `control` says what the diamonds are."""
    width = max(6.6, 1.6 + 0.35 * len(groups) * len(series), 1.1 * len(groups))
    with drawing(path, width, 4.4) as figure:
        axes = figure.subplots()
        grouped_bars(axes, [fill(label(name), 14) for name in groups], series)
        axes.set_title(title, loc="left")
        axes.set_ylabel(ylabel)
        bars_legend(figure, axes, control)
    return Path(path)


def bars_legend(figure: Figure, axes: Axes, control: str = "matched control") -> None:
    """Legend of `grouped_bars` under the axes: bars first, then what the marks on them are; `control` names
    diamonds.
    """
    order = {"95 % interval": 1, "matched control": 2}
    handles, names = axes.get_legend_handles_labels()
    entries = sorted(zip(names, handles, strict=True), key=lambda entry: order.get(entry[0], 0))
    shown = [control if name == "matched control" else name for name, _ in entries]
    columns = len(shown) if sum(map(len, shown)) < 60 else 2
    figure.legend([handle for _, handle in entries], shown, loc="outside lower center", ncols=columns, frameon=False)


def _curves(curves: Sequence[Curve], path: str | Path, xlabel: str, ylabel: str, percent: bool, log_x: bool) -> Path:
    if not curves:
        raise ValueError(f"no curves to draw for {ylabel!r}")
    with drawing(path, 6.6, 4.2) as figure:
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            colour = pick(COLOURS, number)
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(
                curve.x,
                curve.y,
                label=curve.name,
                color=colour,
                linestyle=pick(LINES, number),
                marker=pick(MARKERS, number),
                markersize=5,
            )
        if log_x:
            counts = sorted({value for curve in curves for value in curve.x})
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xticks(counts if len(counts) <= 12 else counts[:: -(-len(counts) // 12)])
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.xaxis.set_minor_locator(NullLocator())
        if percent:
            axes.set_ylim(-0.02, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        tidy(axes, "both")
        figure.legend(loc="outside lower center", ncols=min(3, len(curves)), frameon=False)
    return Path(path)


def _shift_bars(axes: Axes, example: AnswerExample, max_words: int) -> None:
    """Paired horizontal bars; a word that a side does not list is drawn as absent, not as zero with a label."""
    before, after = dict(example.probs_before), dict(example.probs_after)
    ranked = sorted({*before, *after}, key=lambda word: -max(before.get(word, 0.0), after.get(word, 0.0)))[:max_words]
    at = np.arange(len(ranked))
    for side, probs in enumerate((before, after)):
        style = {"color": pick(COLOURS, side), "hatch": pick(HATCHES, side), "edgecolor": "white", "linewidth": 0}
        where = at + (-0.2, 0.2)[side]
        axes.barh(where, [probs.get(word, 0.0) for word in ranked], 0.38, label=("before", "after")[side], **style)
        for y, word in zip(where, ranked, strict=True):
            if word in probs:
                axes.text(probs[word] + 0.02, y, f"{100 * probs[word]:.1f}", va="center", fontsize=7)
    axes.set_axis_on()
    axes.set_yticks(at, ranked)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2)
    axes.set_xticks([0, 0.5, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_xlabel("probability (%)", fontsize=8)
    axes.set_title(fill(example.intervention, 34), fontsize=9)
    tidy(axes, "x")


_READABLE = 36  # soft tokens whose words still fit
_COLUMNS = 5


def soft_token_words(
    pictures: Sequence[np.ndarray],
    places: Sequence[tuple[int, PatchBox | None]],
    words: np.ndarray,
    probability: np.ndarray,
    word: str,
    path: str | Path,
) -> Path:
    """The first picture, then one panel a state: the probability of a word, with the most probable word as text.

    Args:
        pictures: uint8 `[H, W, 3]`; the first one is drawn.
        places: picture and box of each of the S soft tokens.
        words: `[states, S]` strings.
        probability: `[states, S]`, of `word`.
        word: the word that is looked for.
        path: the PNG to write.
    """
    mine = [(at, box) for at, (picture, box) in enumerate(places) if picture == 0 and box is not None]
    rows = -(-(len(words) + 1) // _COLUMNS)
    colours = sns.light_palette("#0072B2", as_cmap=True)
    with drawing(path, 2.1 * _COLUMNS, 2.3 * rows + 0.3) as figure:
        grid = figure.subplots(rows, _COLUMNS, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        grid.flat[0].imshow(shrunk(pictures[0]))
        grid.flat[0].set_title("picture", loc="left", fontsize=9)
        for state, axes in enumerate(grid.flat[1 : len(words) + 1]):
            name = f"before layer {state}" if state < len(words) - 1 else "after the last layer"
            axes.set_title(name, loc="left", fontsize=9)
            axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
            for at, box in mine:
                value = float(probability[state, at])
                width, height = box.right - box.left, box.bottom - box.top
                spot = Rectangle((box.left, box.top), width, height, facecolor=colours(value), edgecolor="white")
                axes.add_patch(spot)
                if len(mine) <= _READABLE:
                    middle = (box.left + width / 2, box.top + height / 2)
                    ink = "white" if value > 0.6 else INK
                    axes.text(*middle, _short(words[state, at]), ha="center", va="center", fontsize=5.5, color=ink)
        bar = ScalarMappable(Normalize(0, 1), colours)
        figure.colorbar(bar, ax=grid, label=f"probability of {word!r}", shrink=0.6)
    return Path(path)


def _short(word: str) -> str:
    return word if len(word) <= 9 else f"{word[:8]}…"


def share_matrices(
    names: Sequence[str],
    panels: Mapping[str, np.ndarray],
    path: str | Path,
    rows: int = 1,
    axes_of: tuple[str, str] = ("pictures of", "given the features of"),
    percent: bool = True,
) -> Path:
    """One matrix a panel, recipients down and donors across, in per cent; hatched where there is nothing to measure.

    Args:
        names: n concepts.
        panels: title -> [n, n] shares 0..1, nan where there is none.
        path: the PNG to write.
        rows: of panels.
        axes_of: what stands down and across.
        percent: values are shares; else counts.
    """
    most = 1 if percent else max(float(np.nanmax(of)) for of in panels.values())
    columns = -(-len(panels) // rows)
    with drawing(path, 4.1 * columns, 3.9 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (title, shares) in zip(grid.flat, panels.items(), strict=False):
            _panel(axes, names, np.asarray(shares, float) * (100 if percent else 1), (100 if percent else 1) * most)
            axes.set_title(title, loc="left")
        for row in grid:
            row[0].set_ylabel(axes_of[0])
        for axes in grid[-1]:
            axes.set_xlabel(axes_of[1])
    return Path(path)


def _panel(axes: Axes, names: Sequence[str], values: np.ndarray, most: float) -> None:
    nothing = np.isnan(values)
    axes.set_facecolor("#f2f2f2")
    sns.heatmap(
        values, mask=nothing, ax=axes, cmap="Blues", vmin=0, vmax=most, annot=True, fmt=".0f", cbar=False,
        square=True, linewidths=1, linecolor="white", xticklabels=list(names), yticklabels=list(names),
        annot_kws={"fontsize": 9},
    )  # fmt: skip
    for row, column in zip(*np.nonzero(nothing), strict=True):
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor="#f2f2f2", edgecolor="#c8c8c8", hatch="///", lw=0))
    axes.tick_params(axis="x", rotation=45, colors=INK, length=0)
    axes.tick_params(axis="y", rotation=0, colors=INK, length=0)
