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
import seaborn as sns
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlmscope.core.intervention import Rate
from vlmscope.report.figures import bars_legend, grouped_bars
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


_DONE = {
    "own": "the concept's\nown",
    "every_question": "under every\nquestion",
    "other_concept": "another\nconcept's",
    "shared": "shared\nfeatures",
    "no_last_layer": "shared, no\nlast layer",
    "everything": "all\nfeatures",
    "everything_no_last_layer": "all, no\nlast layer",
}
_SAYS = {
    "ablation": ("Shared features ablated, everywhere", "answer changed (% of cases)"),
    "patching": ("Last position patched from the other kind", "answers as the donor (% of cases)"),
}
_KINDS = {"picture": "beside a picture", "text": "in text alone"}


def coincidence_maps(tables: Mapping[str, np.ndarray], concepts: Sequence[str], path: str | Path) -> Path:
    """One map a question: features that prefer the row's concept on pictures and the column's in words."""
    if not tables:
        raise ValueError("no question to draw")
    most = max(float(table.max()) for table in tables.values())
    side = 1.6 + 0.55 * len(concepts)
    with drawing(path, side * len(tables) + 1.2, side) as figure:
        grid = figure.subplots(1, len(tables), squeeze=False)[0]
        for number, (axes, (question, table)) in enumerate(zip(grid, tables.items(), strict=True)):
            sns.heatmap(
                table,
                ax=axes,
                vmin=0,
                vmax=most,
                cmap="cividis",
                annot=True,
                fmt="d",
                annot_kws={"fontsize": 9},
                linewidths=0.8,
                cbar=number == len(tables) - 1,
                cbar_kws={"label": "features", "shrink": 0.9},
                xticklabels=list(concepts),
                yticklabels=list(concepts) if number == 0 else False,
            )
            axes.set_title(question, loc="left")
            axes.set_xlabel("prefers the word")
            axes.set_ylabel("prefers pictures of" if number == 0 else "")
            axes.tick_params(axis="x", labelrotation=45)
            axes.tick_params(axis="y", labelrotation=0)
    return Path(path)


def shared_by_layer(
    layers: Sequence[int], counts: Mapping[str, np.ndarray], null: np.ndarray, path: str | Path
) -> Path:
    """Shared features by layer, a bar for each place, beside the counts under shuffled pictures.

    Args:
        layers: L numbers.
        counts: place -> [L].
        null: [draws, L], features at any place.
        path: of the PNG.
    """
    if not len(layers) or not counts:
        raise ValueError("no layer or no place to draw")
    with drawing(path, max(6.6, 1.6 + 0.8 * len(layers)), 4.2) as figure:
        axes = figure.subplots()
        at = np.arange(len(layers))
        width = 0.8 / len(counts)
        names = {"image": "at soft tokens", "question": "at words after the picture", "last": "at the last position"}
        for number, (place, values) in enumerate(counts.items()):
            where = at + (number - (len(counts) - 1) / 2) * width
            style = {"color": pick(COLOURS, number), "hatch": pick(HATCHES, number), "edgecolor": "white"}
            bars = axes.bar(where, values, width * 0.94, label=names.get(place, place), linewidth=0, **style)
            axes.bar_label(bars, fontsize=8, padding=1)
        low, high = np.quantile(null, (0.025, 0.975), axis=0)
        mean = null.mean(0)
        errors = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
        style = {"fmt": "D", "color": INK, "markerfacecolor": "white", "markersize": 5, "capsize": 3, "clip_on": False}
        axes.errorbar(at, mean, errors, label="any place, pictures shuffled (mean, 95 %)", zorder=5, **style)
        axes.set_xticks(at, [str(layer) for layer in layers])
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("shared features, all concepts and questions")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        tidy(axes)
    return Path(path)


def effect_bars(panels: Mapping[str, Mapping[str, Mapping[str, Rate]]], path: str | Path) -> Path:
    """One panel each for ablation and patching: panel -> kind of prompt -> what was done -> rate.

    Raises:
        ValueError: nothing was measured.
    """
    shown = {name: kinds for name, kinds in panels.items() if any(kinds.values())}
    if not shown:
        raise ValueError("no effect was measured")
    with drawing(path, 6.4 * len(shown), 4.4) as figure:
        grid = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (name, kinds) in zip(grid, shown.items(), strict=True):
            done = list(dict.fromkeys(what for of in kinds.values() for what in of))
            series = {_KINDS.get(kind, kind): [of.get(what) for what in done] for kind, of in kinds.items() if of}
            grouped_bars(axes, [_DONE.get(what, what) for what in done], series)
            title, says = _SAYS.get(name, (name, "cases (%)"))
            first = [next(iter(of.values())).cases for of in kinds.values() if of]
            axes.set_title(f"{title}\nn = {' and '.join(map(str, dict.fromkeys(first)))} cases", loc="left")
            axes.set_ylabel(says)
        bars_legend(figure, grid[0])
    return Path(path)
