"""Figures of a dictionary's structure and of maps over pictures.

Figures of a dictionary's structure: which features belong to pictures, words or both, layer by layer.

Every function writes one PNG and returns its path; `ValueError` means that there is nothing to draw or lengths differ.

Pictures under the maps of features, a row a feature and picture, a column a kind of map.

Pictures beside maps over their soft tokens, a row a picture and a column a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from vlmscope.core.maps import PictureMap
from vlmscope.core.records import PatchBox
from vlmscope.report.graph_figure import shrunk
from vlmscope.report.graph_figure import signed_overlay as overlay
from vlmscope.report.style import COLOURS, INK, LINES, MARKERS, POSITIVE, drawing, pick, tidy

# Light and dark alternate, and neighbours differ by hatch, so that a grey print tells the parts of a bar.
_FILLS = (
    ("#0072B2", ""),
    ("#F0E442", "///"),
    ("#D55E00", ""),
    ("#F6B8D0", "..."),
    ("#009E73", "\\\\\\"),
    ("#dcdcdc", ""),
    ("#a8a8a8", "xxx"),
    ("#4d4d4d", ""),
)
INDEX_BINS = 10


def modality_by_layer(
    layers: Sequence[int],
    groups: Mapping[str, Sequence[int]],
    index: Sequence[np.ndarray],
    shared: Mapping[str, Sequence[float]],
    path: str | Path,
) -> Path:
    """Groups of features, how their modality index lies, and what features of both modalities do.

    Args:
        layers: L numbers.
        groups: name -> L counts of features; those of a layer add up to its width.
        index: L arrays of modality indices in [0, 1]; nan is left out.
        shared: name -> L shares 0..1, a line each.
        path: of the PNG.
    """
    if not layers or any(len(of) != len(layers) for of in (*groups.values(), index, *shared.values())):
        raise ValueError(f"{len(layers)} layers, but other numbers of values: {[len(of) for of in groups.values()]}")
    with drawing(path, 11.5, 6.6) as figure:
        grid = figure.add_gridspec(2, 2, width_ratios=[1.25, 1])
        _stacked(figure.add_subplot(grid[:, 0]), layers, groups)
        _index_map(figure.add_subplot(grid[0, 1]), layers, index)
        _lines(figure.add_subplot(grid[1, 1]), layers, shared)
    return Path(path)


def _stacked(axes: Axes, layers: Sequence[int], groups: Mapping[str, Sequence[int]]) -> None:
    totals = np.sum([np.asarray(of, float) for of in groups.values()], axis=0)
    below = np.zeros(len(layers))
    at = np.arange(len(layers))
    for number, (name, counts) in enumerate(groups.items()):
        share = np.divide(counts, totals, out=np.zeros(len(layers)), where=totals > 0)
        fill, hatch = pick(_FILLS, number)
        axes.bar(at, share, 0.82, below, label=name, color=fill, hatch=hatch, edgecolor=INK, linewidth=0.5)
        below += share
    axes.set_xticks(at, [str(layer) for layer in layers])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_xlabel("layer")
    axes.set_ylabel("features (%)")
    axes.set_title("Where features fire", loc="left")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    tidy(axes)


def _index_map(axes: Axes, layers: Sequence[int], index: Sequence[np.ndarray]) -> None:
    """Share of a layer's features in each tenth of the index, layers from bottom to top; numbers are in the cells."""
    edges = np.linspace(0, 1, INDEX_BINS + 1)
    rows = []
    for of in index:
        counts, _ = np.histogram(of[~np.isnan(of)], edges)
        rows.append(100 * counts / max(counts.sum(), 1))
    sns.heatmap(
        np.array(rows)[::-1],
        ax=axes,
        vmin=0,
        cmap="cividis",
        annot=len(layers) <= 12,
        fmt=".0f",
        annot_kws={"fontsize": 8},
        linewidths=0.6,
        xticklabels=False,
        yticklabels=[str(layer) for layer in reversed(layers)],
        cbar_kws={"label": "features (%)"},
    )
    axes.set_xticks([0, INDEX_BINS / 2, INDEX_BINS], ["0\nwords", "0.5", "1\nsoft tokens"], rotation=0)
    axes.tick_params(axis="y", labelrotation=0)
    axes.set_xlabel("modality index")
    axes.set_ylabel("layer")


def _lines(axes: Axes, layers: Sequence[int], shared: Mapping[str, Sequence[float]]) -> None:
    for number, (name, values) in enumerate(shared.items()):
        style = {"linestyle": pick(LINES, number), "marker": pick(MARKERS, number), "markersize": 5}
        sns.lineplot(x=list(layers), y=list(values), ax=axes, label=name, color=pick(COLOURS, number), **style)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel("firing by features of both (%)")
    axes.legend(frameon=False)
    tidy(axes)


_GROUPS = {"image": "soft tokens", "both": "both", "text": "words"}  # how groups of features are drawn together


def score_by_layer(layers: np.ndarray, score: np.ndarray, group: np.ndarray, path: str | Path) -> Path:
    """Boxes of the monosemanticity score by layer, one for features of soft tokens, of both and of words.

    Args:
        layers: [F] of each feature.
        score: [F]; nan is left out.
        group: [F], names of `features.modality_tables.GROUPS`.
        path: of the PNG.
    """
    kind = np.array([_GROUPS.get("text" if name.startswith("words") else str(name), "") for name in group])
    known = ~np.isnan(score) & (kind != "")
    if not known.any():
        raise ValueError("no feature has a score")
    order = [name for name in _GROUPS.values() if (kind[known] == name).any()]
    with drawing(path, 9.0, 4.2) as figure:
        axes = figure.subplots()
        sns.boxplot(
            x=layers[known].astype(int),
            y=score[known],
            hue=kind[known],
            hue_order=order,
            palette=[pick(_FILLS, number)[0] for number in range(len(order))],
            fliersize=1.2,
            linewidth=0.8,
            width=0.8,
            ax=axes,
        )
        for number, container in enumerate(axes.containers):
            for box in getattr(container, "boxes", ()):
                box.set_hatch(pick(_FILLS, number)[1])
        axes.axhline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("layer")
        axes.set_ylabel("monosemanticity (mean cosine of pictures)")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        tidy(axes)
    return Path(path)


def twins_by_layer(
    layers: Sequence[int], shares: Mapping[str, Sequence[float]], path: str | Path, cosine: float
) -> Path:
    """Share of features with a near-parallel partner, a line for each way of comparing; `shares` name -> [L]."""
    if not layers or not shares:
        raise ValueError("no layer or no share to draw")
    with drawing(path, 7.6, 4.2) as figure:
        axes = figure.subplots()
        for number, (name, values) in enumerate(shares.items()):
            space, _, where = name.partition("_")
            style = {"linestyle": pick(LINES, number), "marker": pick(MARKERS, number), "markersize": 5}
            label = f"{space}, {where.replace('_', ' ')}"
            sns.lineplot(x=list(layers), y=list(values), ax=axes, label=label, color=pick(COLOURS, number), **style)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel(f"live features with a partner\nat cosine {cosine:g} or more (%)")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
        tidy(axes)
    return Path(path)


_UNSIGNED = LinearSegmentedColormap.from_list("unsigned", ["#ffffff", POSITIVE])
NAMES = {
    "rollout": "attention rollout",
    "similarity": "similarity",
    "vision_path": "attribution to patches",
    "activation": "own activation",
    "contrast": "contrast of pixels",
    "rollout_no_feature": "rollout, no feature",
    "random": "random",
}


def feature_maps(
    maps: Mapping[str, Mapping[str, Sequence[PictureMap]]], pictures: Sequence[np.ndarray], path: str | Path
) -> Path:
    """The picture, and each kind of map over it, for each feature; colours are relative to a map's largest value.

    Args:
        maps: feature -> kind -> a map a picture; at least one. A map without negative values starts at its least one,
            which would otherwise hide what differs.
        pictures: uint8 `[H, W, 3]`, by number.
        path: the PNG to write.
    """
    rows = [(feature, number) for feature in maps for number in range(len(pictures))]
    kinds = list(next(iter(maps.values())))
    with drawing(path, 1.9 * (len(kinds) + 1), 0.6 + 2.1 * len(rows)) as figure:
        figure.suptitle(
            "blue: for the feature, orange: against it; as strong as the map's largest", x=0.01, ha="left", fontsize=9
        )
        grid = figure.subplots(len(rows), len(kinds) + 1, squeeze=False)
        for axes, (feature, number) in zip(grid, rows, strict=True):
            shown = shrunk(pictures[number])
            axes[0].imshow(shown)
            axes[0].set_title(feature, loc="left", fontsize=9)
            for at, kind in zip(axes[1:], kinds, strict=True):
                _draw(at, shown, maps[feature][kind][number])
                at.set_title(NAMES.get(kind, kind), loc="left", fontsize=9)
            for at in axes:
                at.set_axis_off()
    return Path(path)


def _draw(axes: Axes, shown: np.ndarray, found: PictureMap) -> None:
    raster = found.raster(shown.shape[0], shown.shape[1])
    if raster.min() < 0:
        overlay(axes, shown, raster)
        return
    low, high = float(raster.min()), float(raster.max())
    share = (raster - low) / ((high - low) or 1.0)
    axes.imshow(np.asarray(Image.fromarray(shown).convert("L")), cmap="gray", vmin=0, vmax=255)
    axes.imshow(share, cmap=_UNSIGNED, vmin=0, vmax=1, alpha=0.1 + 0.75 * share)


_SHADE = LinearSegmentedColormap.from_list("shade", ["#ffffff", POSITIVE])


def object_maps(
    pictures: Sequence[np.ndarray],
    boxes: Sequence[Sequence[PatchBox]],
    maps: Sequence[Mapping[str, np.ndarray]],
    path: str | Path,
) -> Path:
    """Draw each picture, and over it in grey each of its maps; colours are relative to a map's largest value.

    Args:
        pictures: uint8 [H, W, 3]; at least one.
        boxes: of each picture S boxes.
        maps: of each picture name -> [S], at least 0; every picture has the same names.
        path: the PNG to write.
    """
    names = list(maps[0])
    with drawing(path, 2.0 * (len(names) + 1), 0.5 + 2.1 * len(pictures)) as figure:
        figure.suptitle("darker blue: more, relative to the map's largest value", x=0.01, ha="left", fontsize=9)
        grid = figure.subplots(len(pictures), len(names) + 1, squeeze=False)
        for axes, picture, places, found in zip(grid, pictures, boxes, maps, strict=True):
            axes[0].imshow(picture)
            axes[0].set_title("picture", loc="left", fontsize=9)
            grey = np.asarray(Image.fromarray(picture).convert("L"))
            for at, name in zip(axes[1:], names, strict=True):
                share = np.zeros(picture.shape[:2])
                for box, value in zip(places, found[name] / (found[name].max() or 1.0), strict=True):
                    left, top, right, bottom = box.pixels(picture.shape[1], picture.shape[0])
                    share[top:bottom, left:right] = value
                at.imshow(grey, cmap="gray", vmin=0, vmax=255)
                at.imshow(share, cmap=_SHADE, vmin=0, vmax=1, alpha=0.55)
                at.set_title(name.replace("_", " "), loc="left", fontsize=9)
            for at in axes:
                at.set_axis_off()
    return Path(path)
