"""A pruned attribution graph as a layered picture: positions from left to right, layers from bottom to top.

Only the strongest edges are drawn, and the nodes at their ends. An edge's strength is its share of its target's
incoming
|weight| times the target's influence on the logits, the quantity that pruning ranks by.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from vlmscope.core.graph import ENDS, AttributionGraph, NodeKind, PrunedGraph
from vlmscope.core.ids import FeatureId
from vlmscope.core.images import PatchBox
from vlmscope.report.feature_key import draw_key, key_entries, key_height
from vlmscope.report.layers import (
    ACROSS,
    INCHES,
    LEFT,
    MARKS,
    SIDE_COLUMN,
    Layout,
    draw_edges,
    edge_widths,
    frame,
    lay_out,
)
from vlmscope.report.style import COLOURS, INK, MUTED, NEGATIVE, POSITIVE, drawing, pick


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
