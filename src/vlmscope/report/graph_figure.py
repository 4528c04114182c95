"""Figures of attribution graphs and of patches.

The plan of a layered graph picture: columns from left to right, layers from bottom to top.

A key below a figure: the features that it names by their numbers, with their labels.

A pruned attribution graph as a layered picture: positions from left to right, layers from bottom to top.

Only the strongest edges are drawn, and the nodes at their ends. An edge's strength is its share of its target's
incoming
|weight| times the target's influence on the logits, the quantity that pruning ranks by.

Pictures under the maps of what their patches contribute to targets.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from vlmscope.core.graph import ENDS, AttributionGraph, NodeKind, PrunedGraph
from vlmscope.core.maps import PictureMap
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.report.style import COLOURS, INK, MUTED, NEGATIVE, POSITIVE, drawing, pick

MARKS = {  # kind: (marker, face colour, words)
    NodeKind.TOKEN: ("s", "#444444", "token or soft token"),
    NodeKind.FEATURE: ("o", "#56B4E9", "feature"),
    NodeKind.ERROR: ("D", "#bdbdbd", "error"),
    NodeKind.BIAS: ("^", "#F0E442", "bias"),
    NodeKind.LEFT_OUT: ("P", "#999999", "features left out"),
}
_NODES_ACROSS = 84  # room for this many nodes side by side over the whole width
_LOGIT_STEP = 7.0  # distance between logits, in nodes
INCHES, LEFT, ACROSS = 14.0, 0.068, 0.925  # picture width; the axes' left edge and width as fractions of it
SIDE_COLUMN = -1  # position of nodes without one (bias, left out)


@dataclass(frozen=True)
class Layout:
    """Where things go. `xy [N, 2]` is NaN for nodes that are not drawn; `slots[position]` = (centre, width)."""

    xy: np.ndarray
    slots: dict[int, tuple[float, float]]
    rows: dict[int, int]  # layer -> height in the picture


class Placed(Protocol):
    """A table of nodes; `position` is the number of a column, -1 for none."""

    @property
    def kind(self) -> np.ndarray:
        """`[N]`, `NodeKind`."""
        ...

    @property
    def layer(self) -> np.ndarray:
        """`[N]`."""
        ...

    @property
    def position(self) -> np.ndarray:
        """`[N]`."""
        ...

    def __len__(self) -> int: ...


def lay_out(nodes: Placed, shown: np.ndarray, strength: np.ndarray, is_image: np.ndarray, n_layers: int) -> Layout:
    """Give the nodes `shown` a place each.

    Args:
        nodes: N nodes, of which the last is an end.
        shown: node numbers, ascending.
        strength: `[N]`, the strongest of a cell stand first.
        is_image: `[T]` bool, columns that need room for a thumbnail.
        n_layers: of the model.
    """
    ends = np.isin(nodes.kind[shown], ENDS)
    body = shown[~ends]
    cells: dict[tuple[int, int], list[int]] = {}
    for node in body[np.argsort(-strength[body], kind="stable")]:
        cells.setdefault((int(nodes.position[node]), int(nodes.layer[node])), []).append(int(node))
    n_tokens = len(is_image)
    used = {position for position, _ in cells}
    # A short prompt keeps its empty positions as context; a long one only has room for those that matter.
    positions = sorted(used | set(range(n_tokens)) if n_tokens <= 48 else used)
    widest = dict.fromkeys(positions, 0)
    for (position, _), cell in cells.items():
        widest[position] = max(widest[position], len(cell))
    # A thumbnail needs some room even where hardly anything fires.
    least = {at: 1.6 if at >= 0 and is_image[at] else 1.0 for at in positions}
    most = max(widest.values())  # nodes side by side in one cell before they wrap: as many as the picture has room for
    while most > 3 and sum(max(least[at], min(most, widest[at])) + 0.35 for at in positions) > _NODES_ACROSS:
        most -= 1
    slots, edge = {}, 0.0
    for position in positions:
        width = max(least[position], min(most, widest[position])) + 0.35
        slots[position] = (edge + width / 2, width)
        edge += width
    # What is explained stands in a row of its own, above all that its layer holds.
    last_layer = nodes.layer[-1]
    above = int(last_layer) + int(last_layer < n_layers)
    seen = {int(layer) for layer in nodes.layer[body]} | {above}
    every = range(-1, above + 1)
    rows = {layer: at for at, layer in enumerate(every if len(every) <= 16 else sorted(seen))}
    xy = np.full((len(nodes), 2), np.nan)
    for (position, layer), cell in cells.items():
        lines = [cell[at : at + most] for at in range(0, len(cell), most)]
        for level, line in enumerate(lines):
            y = rows[layer] + (level - (len(lines) - 1) / 2) * min(0.28, 0.8 / len(lines))
            for at, node in enumerate(line):
                xy[node] = slots[position][0] + (at - (len(line) - 1) / 2), y
    top = shown[ends]
    # Logits share the last position; side by side they need more room than it has, which is to its left.
    step = min(_LOGIT_STEP, edge / max(len(top), 1))
    last = slots[positions[-1]][0]
    first = min(last - step * (len(top) - 1) / 2, edge - step * (len(top) - 0.5))
    xy[top] = [(max(first, step / 2) + step * at, rows[above] + 0.1) for at in range(len(top))]
    return Layout(xy, slots, rows)


def frame(axes: Axes, layout: Layout, above: str, title: str) -> None:
    """Draw rows, columns and the names of the layers; `above` names the row of what is explained."""
    first, last = min(layout.slots), max(layout.slots)
    axes.set_xlim(
        layout.slots[first][0] - layout.slots[first][1] / 2, layout.slots[last][0] + layout.slots[last][1] / 2
    )
    axes.set_ylim(-0.5, len(layout.rows) - 0.35)
    axes.grid(False)
    axes.set_xticks([])
    names = {-1: "embedding", max(layout.rows): above}
    axes.set_yticks(list(layout.rows.values()), [names.get(layer, str(layer)) for layer in layout.rows])
    axes.set_ylabel("layer")
    axes.yaxis.set_label_coords(-0.058, 0.5)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for row in layout.rows.values():
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
    for number, (centre, width) in enumerate(layout.slots.values()):
        if number:
            axes.axvline(centre - width / 2, color="#e4e4e4", linewidth=0.6, zorder=0.5)
    axes.set_title(title, loc="left", fontsize=10)


def draw_edges(
    axes: Axes, layout: Layout, ends: tuple[np.ndarray, np.ndarray], widths: np.ndarray, style: tuple[str, object]
) -> None:
    """Draw edges from `ends[0]` to `ends[1]`, node numbers `[n]`, `widths [n]` points wide, in one colour and dash."""
    if len(widths):
        lines = np.stack([layout.xy[ends[0]], layout.xy[ends[1]]], axis=1)
        chosen = LineCollection(list(lines), linewidths=widths, colors=style[0], linestyles=style[1])  # pyright: ignore[reportArgumentType]
        chosen.set_alpha(0.42)
        chosen.set_zorder(1)
        axes.add_collection(chosen)


def edge_widths(sizes: np.ndarray) -> np.ndarray:
    """Points, for `sizes [n]` >= 0; the root keeps weak edges visible beside one that dwarfs them all."""
    return 0.35 + 3.4 * np.sqrt(sizes / (sizes.max() or 1.0))


_LINE = 0.17  # inches
_CHARACTERS = 88  # of an entry; two stand side by side


def key_entries(features: Sequence[FeatureId], labels: Mapping[FeatureId, str] | None) -> list[str]:
    """`L5/709  planet = mars (0.97)` for each different feature that has a label, in order."""
    found = [f"{one}  {labels[one]}" for one in dict.fromkeys(features) if labels and one in labels]
    return [text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 3]}..." for text in found]


def key_height(entries: Sequence[str]) -> float:
    """Inches that the key takes; 0 without entries."""
    return _LINE * ((len(entries) + 1) // 2) + 0.15 if entries else 0.0


def draw_key(figure: Figure, entries: Sequence[str]) -> None:
    """Write the entries in two columns at the bottom of a figure, in `key_height` inches."""
    height = float(figure.get_figheight())
    rows = (len(entries) + 1) // 2
    for number, text in enumerate(entries):
        column, row = divmod(number, rows)
        y = (key_height(entries) - 0.05 - row * _LINE) / height
        figure.text(0.03 + 0.48 * column, y, text, ha="left", va="top", fontsize=8)


def attribution_graph(
    pruned: PrunedGraph,
    path: str | Path,
    images: Sequence[np.ndarray] = (),
    groups: Mapping[FeatureId, str] | None = None,
    max_edges: int = 150,
    labels: Mapping[FeatureId, str] | None = None,
) -> Path:
    """Draw the pruned graph, 14 inches (2,100 pixels) wide, readable at 1,400.

    `images` are the prompt's pictures (uint8 `[H, W, 3]`), cut into thumbnails under their soft tokens; without them
    soft tokens are boxes. `groups` names the supernode of a feature and marks it in that group's colour. What
    `labels` calls the features that are named by their numbers stands below.

    Raises:
        ValueError: nothing was kept, or a soft token's picture is missing from `images`.
    """
    graph = pruned.graph
    edges = strongest_edges(pruned, max_edges)
    if len(edges) == 0:
        raise ValueError("the pruned graph has no edges to draw")
    sources, targets = graph.indices[edges].astype(int), graph.targets_of(edges)
    ends = graph.nodes.ends()
    shown = np.unique(np.concatenate([sources, targets, ends[pruned.node_mask[ends]]]))
    layout = lay_out(graph.nodes, shown, pruned.influence, graph.is_image, graph.n_layers)
    named = _strongest_features(pruned, shown)
    key = key_entries([graph.nodes.feature_id(int(node)) for node in named], labels)
    height = 2.1 + 0.72 * len(layout.rows) + key_height(key)
    below = (1.7 + key_height(key)) / height
    with drawing(path, INCHES, height, constrained=False) as figure:
        axes = figure.add_axes((LEFT, below, ACROSS, 1 - below - 0.32 / height))
        above = "logits" if graph.nodes.kind[-1] == NodeKind.LOGIT else "target"
        frame(axes, layout, above, _title(pruned, len(edges), len(shown)))
        _draw_edges(axes, layout, sources, targets, graph.weights[edges])
        marked = _draw_nodes(axes, pruned, layout, shown, groups or {})
        _draw_positions(axes, graph, layout, images)
        style = {"ncols": 8, "frameon": False, "fontsize": 9, "bbox_to_anchor": (0.5, key_height(key) / height)}
        figure.legend(handles=_legend(pruned, shown, marked), loc="lower center", **style)
        draw_key(figure, key)
    return Path(path)


def strongest_edges(pruned: PrunedGraph, count: int) -> np.ndarray:
    """Numbers of the `count` kept edges that matter most to the logits, strongest first, int64."""
    graph = pruned.graph
    total = graph.absolute_sums()
    importance = pruned.influence.astype(np.float64).copy()
    # Influence starts from what the ends are worth and does not count the start itself.
    importance[graph.nodes.ends()] += graph.end_weights
    kept = np.flatnonzero(pruned.edge_mask)
    targets = graph.targets_of(kept)
    magnitude = np.abs(graph.weights[kept].astype(np.float64))
    strength = magnitude / np.where(total > 0, total, 1.0)[targets] * importance[targets]
    kept, strength = kept[strength > 0], strength[strength > 0]
    return kept[np.argsort(-strength, kind="stable")][:count]


def _title(pruned: PrunedGraph, n_edges: int, n_nodes: int) -> str:
    scores = pruned.scores
    return (
        f"the {n_edges} strongest of {pruned.n_edges:,} kept edges, {n_nodes} of {pruned.n_nodes:,} kept nodes;"
        f" replacement score {scores.replacement:.2f}, completeness score {scores.completeness:.2f}"
    )


def _draw_edges(axes: Axes, layout: Layout, sources: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> None:
    widths = edge_widths(np.abs(weights))
    for sign, colour, dashes in ((weights >= 0, POSITIVE, "solid"), (weights < 0, NEGATIVE, (0, (3, 1.5)))):
        draw_edges(axes, layout, (sources[sign], targets[sign]), widths[sign], (colour, dashes))


def _draw_nodes(
    axes: Axes, pruned: PrunedGraph, layout: Layout, shown: np.ndarray, groups: Mapping[FeatureId, str]
) -> dict[str, str]:
    """Draw all nodes; return the colour of every group that was met."""
    nodes = pruned.graph.nodes
    marked: dict[str, str] = {}
    names = list(dict.fromkeys(groups.values()))
    largest = pruned.influence[shown].max() or 1.0
    for kind, (marker, face, _) in MARKS.items():
        chosen = shown[nodes.kind[shown] == kind]
        if len(chosen) == 0:
            continue
        faces = [face] * len(chosen)
        if kind == NodeKind.FEATURE:
            for at, node in enumerate(chosen):
                group = groups.get(nodes.feature_id(int(node)))
                if group is not None:
                    faces[at] = marked.setdefault(group, pick(COLOURS[1:], names.index(group)))
        sizes = 16 + 130 * np.sqrt(pruned.influence[chosen] / largest)
        axes.scatter(*layout.xy[chosen].T, s=sizes, c=faces, marker=marker, edgecolors=INK, linewidths=0.6, zorder=3)
    for node in shown[np.isin(nodes.kind[shown], ENDS)]:
        number = int(node - nodes.ends()[0])
        value = f"p={pruned.graph.logit_probabilities[number]:.3f}"
        if nodes.kind[node] == NodeKind.TARGET:
            value = f"{nodes.target[node]:+.2f}"
        words = "\n".join([*textwrap.wrap(pruned.graph.logit_tokens[number], 14), value])
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": INK}
        axes.text(*layout.xy[node], words, ha="center", va="center", fontsize=9, bbox=box, zorder=4)  # pyright: ignore[reportCallIssue]
    _name_features(axes, pruned, layout, shown)
    return marked


def _strongest_features(pruned: PrunedGraph, shown: np.ndarray, count: int = 12) -> np.ndarray:
    """Nodes of the most influential features, the first one first."""
    features = shown[pruned.graph.nodes.kind[shown] == NodeKind.FEATURE]
    return features[np.argsort(-pruned.influence[features], kind="stable")][:count]


def _name_features(axes: Axes, pruned: PrunedGraph, layout: Layout, shown: np.ndarray) -> None:
    """Write the index of the most influential features above or below them, where a neighbour's leaves room."""
    nodes = pruned.graph.nodes
    named: list[np.ndarray] = []
    room = 0.024 * sum(width for _, width in layout.slots.values())
    for node in _strongest_features(pruned, shown):
        spot = layout.xy[node]
        close = sum(abs(spot[0] - other[0]) < room and abs(spot[1] - other[1]) < 0.3 for other in named)
        named.append(spot)
        if close > 1:
            continue
        crowded = close == 1
        axes.annotate(
            str(nodes.index[node]),
            (float(spot[0]), float(spot[1])),
            (0, -7 if crowded else 7),
            textcoords="offset points",
            ha="center",
            va="top" if crowded else "bottom",
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
            zorder=5,
        )


def _draw_positions(axes: Axes, graph: AttributionGraph, layout: Layout, images: Sequence[np.ndarray]) -> None:
    """Under every position its token, or a thumbnail of its patch with the soft token's number."""
    soft = {int(position): number for number, position in enumerate(np.flatnonzero(graph.is_image))}
    inches = INCHES * ACROSS / sum(width for _, width in layout.slots.values())
    narrowest = min((layout.slots[position][1] for position in soft if position in layout.slots), default=1.0)
    points = min(0.92 * narrowest * inches * 72, 30.0)
    for position, (centre, _) in layout.slots.items():
        below = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        if position == SIDE_COLUMN:
            axes.annotate("no position", (centre, 0), (0, -6), rotation=90, ha="center", va="top", fontsize=8, **below)
            continue
        box = graph.patch_boxes[position]
        if box is None or not images:
            text = f"soft {soft[position]}" if position in soft else graph.tokens[position]
            axes.annotate(text, (centre, 0), (0, -6), rotation=90, ha="center", va="top", fontsize=8.5, **below)
            continue
        if int(graph.image_index[position]) >= len(images):
            raise ValueError(f"position {position} shows picture {graph.image_index[position]}, of {len(images)} given")
        patch = OffsetImage(_patch(images[int(graph.image_index[position])], box), zoom=points / 48)
        thumbnail = AnnotationBbox(
            patch,
            (centre, 0),
            (0, -6),
            xycoords=axes.get_xaxis_transform(),
            boxcoords="offset points",
            box_alignment=(0.5, 1),
            pad=0,
            bboxprops={"edgecolor": MUTED, "linewidth": 0.6},
            annotation_clip=False,
        )
        axes.add_artist(thumbnail)
        number = str(soft[position])
        axes.annotate(number, (centre, 0), (0, -10 - points), ha="center", va="top", fontsize=8.5, **below)


def _patch(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    height, width = image.shape[:2]
    left, top, right, bottom = PatchBox(*box).pixels(width, height)
    cut = Image.fromarray(image[top:bottom, left:right])
    return np.asarray(cut.resize((48, 48), Image.Resampling.NEAREST))


def _legend(pruned: PrunedGraph, shown: np.ndarray, marked: Mapping[str, str]) -> list[Line2D]:
    plain = {"linestyle": "none", "markeredgecolor": INK, "markersize": 8}
    kinds = {NodeKind(int(kind)) for kind in pruned.graph.nodes.kind[shown]}
    handles = [
        Line2D([], [], marker=marker, markerfacecolor=face, label=words, **plain)
        for kind, (marker, face, words) in MARKS.items()
        if kind in kinds
    ]
    handles += [
        Line2D([], [], marker="o", markerfacecolor=colour, label=f"feature: {name}", **plain)
        for name, colour in marked.items()
    ]
    handles.append(Line2D([], [], color=POSITIVE, linewidth=2, label="positive edge"))
    handles.append(Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=(0, (3, 1.5)), label="negative edge"))
    return handles


_SIDE = 256  # pixels of the longer edge
_SIGNED = LinearSegmentedColormap.from_list("signed", [NEGATIVE, "#ffffff", POSITIVE])


def patch_maps(maps: Sequence[PictureMap], pictures: Sequence[np.ndarray], path: str | Path, effect: str) -> Path:
    """One row a map: the picture, the map over it, and what the picture's edge is made of.

    Colours are relative to the largest contribution for an area of the map.

    Args:
        maps: at least one.
        pictures: uint8 `[H, W, 3]`, by number.
        path: the PNG to write.
        effect: "total" or "direct", for the title.
    """
    if not maps:
        raise ValueError("no maps to draw")
    with drawing(path, 8.6, 0.5 + 2.5 * len(maps)) as figure:
        grid = figure.subplots(len(maps), 3, squeeze=False, width_ratios=[1, 1, 1.25])
        for row, found in zip(grid, maps, strict=True):
            shown = shrunk(pictures[found.picture])
            row[0].imshow(shown)
            row[0].set_title(f"picture {found.picture + 1}", loc="left")
            signed_overlay(row[1], shown, found.raster(shown.shape[0], shown.shape[1]))
            row[1].set_title(f"{effect} effect on {found.target!r}", loc="left")
            for axes in row[:2]:
                axes.set_axis_off()
            parts = {"patches": found.from_patches, **found.remainder}
            names = [name for name, value in parts.items() if value or name == "patches"]
            values = [parts[name] for name in names]
            row[2].barh(names, values, color=[POSITIVE if value >= 0 else NEGATIVE for value in values])
            row[2].axvline(0, color="black", linewidth=0.8)
            row[2].set_title(f"sum {found.edge:.3g}, unexplained {found.residual:.0e}", loc="left", fontsize=9)
            row[2].invert_yaxis()
            row[2].set_xlabel("logits")
    return Path(path)


def shrunk(picture: np.ndarray) -> np.ndarray:
    """A picture at the size of figures, longer edge `_SIDE` pixels."""
    found = Image.fromarray(picture)
    factor = _SIDE / max(found.size)
    size = (max(1, round(found.width * factor)), max(1, round(found.height * factor)))
    return np.asarray(found.resize(size, Image.Resampling.NEAREST))


def signed_overlay(axes: Axes, shown: np.ndarray, raster: np.ndarray) -> None:
    """A signed map over the grey picture, relative to its largest absolute value."""
    top = float(np.abs(raster).max()) or 1.0
    axes.imshow(np.asarray(Image.fromarray(shown).convert("L")), cmap="gray", vmin=0, vmax=255)
    axes.imshow(raster, cmap=_SIGNED, vmin=-top, vmax=top, alpha=0.15 + 0.75 * np.abs(raster) / top)
