"""Pictures of attribution graphs: positions from left to right, layers from bottom to top.

Only the strongest edges are drawn, and the nodes at their ends. In the graph of one prompt, an edge's strength is its
share of its target's incoming |weight| times the target's influence on the logits, the quantity that pruning ranks by.

In a comparison, nodes and edges of the first graph are blue, filled and in full lines, those of the second orange,
hollow and dashed, and those of both grey, so the picture can be read without colours too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from vlmscope.attribution.influence import edge_strengths
from vlmscope.core.graph import (
    ENDS,
    AttributionGraph,
    GraphComparison,
    MatchedNodes,
    NodeKind,
    NodeTable,
    PrunedGraph,
)
from vlmscope.core.records import TOWER, FeatureId, layer_name
from vlmscope.report.figures import COLOURS, HATCHES, INK, NEGATIVE, POSITIVE, drawing, pick, tidy

Nodes = NodeTable | MatchedNodes  # `position` is the number of a column, -1 for none
Labels = Mapping[FeatureId, str]

MARKS = {  # kind: (marker, face colour, words)
    NodeKind.TOKEN: ("s", "#444444", "token or soft token"),
    NodeKind.FEATURE: ("o", "#56B4E9", "feature"),
    NodeKind.ERROR: ("D", "#bdbdbd", "error"),
    NodeKind.BIAS: ("^", "#F0E442", "bias"),
    NodeKind.LEFT_OUT: ("P", "#999999", "features left out"),
}
_DASHED, _DOTTED = (0, (3, 1.5)), (0, (1, 1))
_NODES_ACROSS = 84  # room for this many nodes side by side over the whole width
_LOGIT_STEP = 7.0  # distance between logits, in nodes
_INCHES, _LEFT, _ACROSS = 14.0, 0.068, 0.925  # picture width; the axes' left edge and width as fractions of it
_NO_POSITION = -1  # the column of biases and of features left out
_NAMED = 12  # features whose ids are written next to them
_PICTURE = 1.45  # inches, the height of a picture under its soft tokens
_NUMBERED = 64  # parts of a picture; the numbers of more could not be read
_KEY_LINE = 0.17  # inches
_KEY_CHARACTERS = 88  # of an entry; two stand side by side


class Layout(NamedTuple):
    """Places of nodes and columns: `xy [N, 2]`, NaN for nodes not drawn; `slots[position]` = (centre, width)."""

    xy: np.ndarray
    slots: dict[int, tuple[float, float]]
    rows: dict[int, int]  # layer -> height in the picture


def lay_out(nodes: Nodes, shown: np.ndarray, strength: np.ndarray, is_image: np.ndarray, n_layers: int) -> Layout:
    """Place the nodes `shown`, by position and layer.

    Args:
        nodes: N nodes, of which the last is an end.
        shown: node numbers, ascending.
        strength: `[N]`, the strongest of a cell stand first.
        is_image: `[T]` bool, columns of soft tokens.
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
    # The number of a soft token needs some room even where hardly anything fires.
    least = {position: 1.6 if position >= 0 and is_image[position] else 1.0 for position in positions}
    most = max(widest.values())  # nodes side by side in one cell before they wrap: as many as the picture has room for

    def width_of(position: int) -> float:
        return max(least[position], min(most, widest[position])) + 0.35

    while most > 3 and sum(map(width_of, positions)) > _NODES_ACROSS:
        most -= 1
    slots, edge = {}, 0.0
    for position in positions:
        width = width_of(position)
        slots[position] = (edge + width / 2, width)
        edge += width
    # Ends (logits or targets) have a row of their own, above the other nodes of their layer.
    last_layer = nodes.layer[-1]
    above = int(last_layer) + int(last_layer < n_layers)
    every = range(-1, above + 1)
    seen = {int(layer) for layer in nodes.layer[body]} | {above}
    rows = {layer: row for row, layer in enumerate(sorted(seen | set(every)) if len(every) <= 16 else sorted(seen))}
    xy = np.full((len(nodes), 2), np.nan)
    for (position, layer), cell in cells.items():
        lines = [cell[start : start + most] for start in range(0, len(cell), most)]
        for level, line in enumerate(lines):
            y = rows[layer] + (level - (len(lines) - 1) / 2) * min(0.28, 0.8 / len(lines))
            for number, node in enumerate(line):
                xy[node] = slots[position][0] + (number - (len(line) - 1) / 2), y
    top = shown[ends]
    # Logits share the last position; side by side they need more room than it has, which is to its left.
    step = min(_LOGIT_STEP, edge / max(len(top), 1))
    last = slots[positions[-1]][0]
    first = min(last - step * (len(top) - 1) / 2, edge - step * (len(top) - 0.5))
    xy[top] = [(max(first, step / 2) + step * number, rows[above] + 0.1) for number in range(len(top))]
    return Layout(xy, slots, rows)


def key_entries(features: Sequence[FeatureId], labels: Labels | None) -> list[str]:
    """`L3/1242  planet = mars (0.97)` for each different feature that has a label, in order."""
    entries = [f"{feature}  {labels[feature]}" for feature in dict.fromkeys(features) if labels and feature in labels]
    return [text if len(text) <= _KEY_CHARACTERS else f"{text[: _KEY_CHARACTERS - 3]}..." for text in entries]


class Edges(NamedTuple):
    """Edges of one look: node numbers `[n]` of their ends, and sizes `[n]` >= 0, of which the width is made."""

    sources: np.ndarray
    targets: np.ndarray
    sizes: np.ndarray
    colour: str
    dashes: Any


@dataclass
class _Drawing:
    """A layered graph as a picture; faces, outlines and words are by node number."""

    nodes: Nodes
    strength: np.ndarray
    is_image: np.ndarray
    n_layers: int
    edges: Sequence[Edges]
    faces: Sequence[str]
    outlines: Sequence[str]
    end_words: Mapping[int, str]
    legend: Sequence[Line2D]  # besides the kinds of nodes
    pen: float  # points, of a node's outline

    def __post_init__(self) -> None:
        if not sum(len(group.sizes) for group in self.edges):
            raise ValueError("the graph has no edges to draw")
        joined = [part for group in self.edges for part in (group.sources, group.targets)]
        self.shown = np.unique(np.concatenate([*joined, list(self.end_words)])).astype(int)
        self.kinds = self.nodes.kind[self.shown]
        self.layout = lay_out(self.nodes, self.shown, self.strength, self.is_image, self.n_layers)

    def strongest(self, kind: NodeKind, count: int) -> list[int]:
        """The `count` nodes of a kind that are drawn and have most influence, the strongest first."""
        chosen = self.shown[self.kinds == kind]
        return chosen[np.argsort(-self.strength[chosen], kind="stable")][:count].tolist()

    def draw(
        self,
        path: str | Path,
        title: str,
        above: str,
        below: float,
        draw_columns: Callable[[Axes], None],
        labels: Labels | None,
        white_marks: bool = False,
    ) -> Path:
        """Write the picture, 14 inches (2,100 pixels) wide, readable at 1,400; labels of named features stand below.

        `above` names the row of the ends; `below` is the room in inches for the columns' names and the legend.
        """
        named = self.strongest(NodeKind.FEATURE, _NAMED)
        key = key_entries([_feature(self.nodes, node) for node in named], labels)
        rows = (len(key) + 1) // 2
        key_height = _KEY_LINE * rows + 0.15 if key else 0.0
        height = 2.1 + 0.72 * len(self.layout.rows) + key_height
        bottom = (below + key_height) / height
        with drawing(path, _INCHES, height, constrained=False) as figure:
            axes = figure.add_axes((_LEFT, bottom, _ACROSS, 1 - bottom - 0.32 / height))
            axes.set_title(title, loc="left", fontsize=10)
            self._draw_frame(axes, above)
            self._draw_edges(axes)
            self._draw_nodes(axes)
            self._name_features(axes, named)
            draw_columns(axes)
            marks = {"linestyle": "none", "markeredgecolor": INK, "markersize": 8}
            handles = [
                Line2D([], [], marker=marker, markerfacecolor="white" if white_marks else face, label=words, **marks)
                for kind, (marker, face, words) in MARKS.items()
                if kind in self.kinds
            ]
            where = {"loc": "lower center", "bbox_to_anchor": (0.5, key_height / height)}
            columns = 5 if white_marks else 8
            figure.legend(handles=[*handles, *self.legend], ncols=columns, frameon=False, fontsize=9, **where)
            for number, text in enumerate(key):
                column, row = divmod(number, rows)
                y = (key_height - 0.05 - row * _KEY_LINE) / height
                figure.text(0.03 + 0.48 * column, y, text, ha="left", va="top", fontsize=8)
        return Path(path)

    def _draw_frame(self, axes: Axes, above: str) -> None:
        """Rows, columns and the names of the layers."""
        slots, rows = self.layout.slots, self.layout.rows
        first, last = slots[min(slots)], slots[max(slots)]
        axes.set_xlim(first[0] - first[1] / 2, last[0] + last[1] / 2)
        axes.set_ylim(-0.5, len(rows) - 0.35)
        axes.grid(False)
        axes.set_xticks([])
        names = {-1: "embedding", TOWER - 1: "patch", max(rows): above}
        words = [str(layer) if layer >= 0 else layer_name(layer) for layer in rows]
        axes.set_yticks(list(rows.values()), [names.get(layer, word) for layer, word in zip(rows, words, strict=True)])
        axes.set_ylabel("layer")
        axes.yaxis.set_label_coords(-0.058, 0.5)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        for row in range(1, len(rows), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
        for centre, width in list(slots.values())[1:]:
            axes.axvline(centre - width / 2, color="#e4e4e4", linewidth=0.6, zorder=0.5)

    def _draw_edges(self, axes: Axes) -> None:
        largest = max(group.sizes.max(initial=0.0) for group in self.edges) or 1.0
        for group in self.edges:
            lines = np.stack([self.layout.xy[group.sources], self.layout.xy[group.targets]], axis=1)
            # The root keeps weak edges visible next to one that dwarfs them all.
            widths = 0.35 + 3.4 * np.sqrt(group.sizes / largest)
            look = {"linewidths": widths, "colors": group.colour, "linestyles": group.dashes}
            axes.add_collection(LineCollection(list(lines), alpha=0.42, zorder=1, **look))

    def _draw_nodes(self, axes: Axes) -> None:
        largest = self.strength[self.shown].max() or 1.0
        for kind, (marker, _, _) in MARKS.items():
            chosen = self.shown[self.kinds == kind]
            if len(chosen):
                sizes = 16 + 130 * np.sqrt(self.strength[chosen] / largest)
                faces, outlines = ([colours[node] for node in chosen] for colours in (self.faces, self.outlines))
                look = {"c": faces, "edgecolors": outlines, "marker": marker, "linewidths": self.pen, "zorder": 3}
                axes.scatter(*self.layout.xy[chosen].T, s=sizes, **look)
        for node, words in self.end_words.items():
            x, y = self.layout.xy[node].tolist()
            box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": self.outlines[node]}
            box |= {"linewidth": self.pen + 0.4}
            axes.text(x, y, words, ha="center", va="center", fontsize=9, bbox=box, zorder=4)

    def _name_features(self, axes: Axes, named: Sequence[int]) -> None:
        """Write the ids of features next to them, each where it covers no earlier one; without room, not at all."""
        renderer = axes.figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
        taken: list[Any] = []
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        for node in named:
            for shift, side in ((7, "bottom"), (-7, "top"), (17, "bottom"), (-17, "top")):
                look = {"ha": "center", "va": side, "fontsize": 7.5, "bbox": back, "zorder": 5}
                place = {"xytext": (0, shift), "textcoords": "offset points"}
                words = axes.annotate(str(_feature(self.nodes, node)), self.layout.xy[node].tolist(), **place, **look)
                extent = words.get_window_extent(renderer).expanded(1.04, 1.0)
                if not any(extent.overlaps(earlier) for earlier in taken):
                    taken.append(extent)
                    break
                words.remove()


def _feature(nodes: Nodes, node: int) -> FeatureId:
    return FeatureId(int(nodes.layer[node]), int(nodes.index[node]))


def attribution_graph(
    pruned: PrunedGraph,
    path: str | Path,
    images: Sequence[np.ndarray] = (),
    groups: Mapping[FeatureId, str] | None = None,
    max_edges: int = 150,
    labels: Labels | None = None,
) -> Path:
    """Draw the pruned graph of one prompt.

    `images` are the prompt's pictures (uint8 `[H, W, 3]`), drawn whole under their soft tokens with the part of each;
    without them soft tokens are named. `groups` gives features a supernode, which gets a colour. The `labels` of
    features whose ids are written stand below.
    """
    graph, scores = pruned.graph, pruned.scores
    columns = graph.prompt_positions()  # patches stand at their soft tokens
    at = np.where(graph.nodes.position < 0, -1, columns[graph.nodes.position])
    nodes, is_image = replace(graph.nodes, position=at), graph.is_image[: len(columns) - graph.n_patches]
    chosen = edge_strengths(pruned)[0][:max_edges]
    weights = graph.weights[chosen]
    sources, targets, sizes = graph.indices[chosen].astype(int), graph.targets_of(chosen), np.abs(weights)
    # Positive edges are blue and in full lines, negative ones orange and dashed.
    edges = [
        Edges(sources[sign], targets[sign], sizes[sign], colour, dashes)
        for sign, colour, dashes in ((weights >= 0, POSITIVE, "solid"), (weights < 0, NEGATIVE, _DASHED))
    ]
    groups, is_feature = groups or {}, nodes.kind == NodeKind.FEATURE
    colours = {name: pick(COLOURS[1:], number) for number, name in enumerate(dict.fromkeys(groups.values()))}
    group_of = [groups.get(nodes.feature_id(node)) if is_feature[node] else None for node in range(len(nodes))]
    plain = {kind: face for kind, (_, face, _) in MARKS.items()}
    faces = [
        plain.get(NodeKind(int(kind)), "white") if group is None else colours[group]
        for kind, group in zip(nodes.kind, group_of, strict=True)
    ]
    end_words = {}
    for number, node in enumerate(nodes.ends().tolist()):
        is_target = nodes.kind[node] == NodeKind.TARGET
        value = f"{nodes.target[node]:+.2f}" if is_target else f"p={graph.logit_probabilities[number]:.3f}"
        if pruned.node_mask[node]:
            end_words[node] = "\n".join([*textwrap.wrap(graph.logit_tokens[number], 14), value])
    legend = [
        Line2D([], [], color=POSITIVE, linewidth=2, label="positive edge"),
        Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=_DASHED, label="negative edge"),
    ]
    size, outlines = (is_image, graph.n_layers), [INK] * len(nodes)
    picture = _Drawing(nodes, pruned.influence, *size, edges, faces, outlines, end_words, legend, 0.6)
    met = dict.fromkeys(group for node in picture.shown.tolist() if (group := group_of[node]) is not None)
    mark = {"linestyle": "none", "markeredgecolor": INK, "markersize": 8, "marker": "o"}
    of_groups = [Line2D([], [], markerfacecolor=colours[name], label=f"feature: {name}", **mark) for name in met]
    picture.legend = [*of_groups, *legend]
    title = (
        f"the {len(chosen)} strongest of {pruned.n_edges:,} kept edges, {len(picture.shown)} of {pruned.n_nodes:,} "
        f"kept nodes; replacement score {scores.replacement:.2f}, completeness score {scores.completeness:.2f}"
    )
    above = "logits" if nodes.kind[-1] == NodeKind.LOGIT else "target"
    through = np.bincount(at + 1, pruned.influence, len(columns) + 1)[1:]  # biases have position -1
    places = partial(_draw_positions, graph, through, picture.layout, images)
    return picture.draw(path, title, above, 1.7 if not images else 2.3, places, labels)


def _draw_positions(
    graph: AttributionGraph, through: np.ndarray, layout: Layout, images: Sequence[np.ndarray], axes: Axes
) -> None:
    """Under every position its token, or the number of its part of the picture; under those the picture, divided.

    Parts are outlined the more, the more influence (`through`, of every position) goes through their soft tokens.
    """
    soft = {int(position): number for number, position in enumerate(np.flatnonzero(graph.is_image))}
    under, parts = axes.get_xaxis_transform(), dict[int, list[int]]()  # parts: picture -> positions
    below = {"xycoords": under, "textcoords": "offset points", "annotation_clip": False, "ha": "center", "va": "top"}
    for position, (centre, _) in layout.slots.items():
        if position in soft and images and graph.patch_boxes[position] is not None:
            axes.annotate(str(soft[position]), (centre, 0), (0, -6), fontsize=8.5, **below)
            parts.setdefault(int(graph.image_index[position]), []).append(position)
            continue
        text = f"soft {soft[position]}" if position in soft else graph.tokens[position]
        text, size = ("no position", 8) if position == _NO_POSITION else (text, 8.5)
        axes.annotate(text, (centre, 0), (0, -6), rotation=90, fontsize=size, **below)
    low, high = axes.get_xlim()
    figure_height = axes.figure.get_figheight()  # pyright: ignore[reportAttributeAccessIssue]
    tall = _PICTURE / (figure_height * axes.get_position().height)  # of the axes
    for picture, positions in parts.items():
        pixels = images[picture]
        wide = _PICTURE * pixels.shape[1] / pixels.shape[0] / (_INCHES * _ACROSS)
        centre = float(np.mean([layout.slots[position][0] for position in positions]))
        left = min(max((centre - low) / (high - low) - wide / 2, 0.0), 1 - wide)
        inset = axes.inset_axes((left, -tall * 1.22, wide, tall))
        inset.imshow(pixels, extent=(0, 1, 1, 0), aspect="auto")
        inset.set_axis_off()
        most = through[positions].max() or 1.0
        for position in sorted(positions, key=lambda position: through[position]):  # the strongest lie on top
            x, y, right, bottom = cast(Any, graph.patch_boxes[position])
            share = float(through[position] / most)
            look = {"edgecolor": pick(COLOURS, 1) if share > 0.3 else "white", "linewidth": 0.4 + 2.2 * share}
            inset.add_patch(Rectangle((x, y), right - x, bottom - y, fill=False, **look))
            if len(positions) <= _NUMBERED:
                outline = [withStroke(linewidth=1.6, foreground="black")]
                words = {"color": "white", "fontsize": 7, "va": "top", "path_effects": outline}
                inset.text(x + 0.012, y + 0.012, str(soft[position]), **words)


_FIRST, _SECOND, _BOTH = COLOURS[0], COLOURS[1], "#8a8a8a"
_UPRIGHT = 8  # columns, up to which their names need not be turned
_MORE = 2.0  # a node or edge is one graph's when its share there is this many times that in the other


def _side(shares: np.ndarray) -> np.ndarray:
    """1 where the first of `shares [2, n]` is at least twice the second, -1 where the second is, else 0."""
    first, second = shares
    return ((first > 0) & (first >= _MORE * second)).astype(int) - ((second > 0) & (second >= _MORE * first))


def difference_graph(
    comparison: GraphComparison, path: str | Path, max_edges: int = 90, labels: Labels | None = None
) -> Path:
    """Draw the edges whose shares of influence differ most, and the strongest ones that both graphs use."""
    edge_side, edges = _side(comparison.edge_share), []
    gap, common = np.abs(comparison.edge_share[0] - comparison.edge_share[1]), comparison.edge_share.min(axis=0)
    looks = ((1, gap, _FIRST, "solid"), (-1, gap, _SECOND, _DASHED), (0, common, _BOTH, _DOTTED))
    for side, sizes, colour, dashes in looks:
        chosen = np.flatnonzero(edge_side == side)
        chosen = chosen[np.argsort(-sizes[chosen], kind="stable")][: max_edges // 3]
        edges.append(Edges(comparison.sources[chosen], comparison.targets[chosen], sizes[chosen], colour, dashes))
    # No influence flows through an end: its probability decides which graph's it is.
    is_end = np.isin(comparison.nodes.kind, ENDS)
    sides = np.where(is_end, _side(np.nan_to_num(comparison.activation)), _side(comparison.share)).tolist()
    faces = [{1: _FIRST, 0: "#d0d0d0", -1: "white"}[side] for side in sides]
    outlines = [{1: _FIRST, 0: _BOTH, -1: _SECOND}[side] for side in sides]
    first, second = comparison.names
    title = (
        f"{first} against {second}: {len(edges[0].sizes)} edges of {first}, {len(edges[1].sizes)} of {second}, "
        f"{len(edges[2].sizes)} of both; line width: share of influence"
    )
    mark, more = {"marker": "o", "markersize": 8, "linewidth": 2}, "at least twice the other's share"
    legend = [
        Line2D([], [], color=_FIRST, label=f"{first}: {more}", **mark),
        Line2D([], [], color=_SECOND, linestyle=_DASHED, markerfacecolor="white", label=f"{second}: {more}", **mark),
        Line2D([], [], color=_BOTH, linestyle=_DOTTED, markerfacecolor="#d0d0d0", label="both", **mark),
    ]

    nodes, end_words = comparison.nodes, {}
    for node in np.flatnonzero(is_end).tolist():
        shown = " | ".join("?" if np.isnan(p) else f"{p:.2f}" for p in comparison.activation[:, node])
        value = f"p={shown}" if nodes.kind[node] == NodeKind.LOGIT else ""
        end_words[node] = f"{nodes.label[node]}\n{value}".strip()
    size = comparison.column_is_image, comparison.n_layers
    strength = comparison.share.max(axis=0)
    picture = _Drawing(nodes, strength, *size, edges, faces, outlines, end_words, legend, 1.3)
    below = 1.2 if len(picture.layout.slots) <= _UPRIGHT else 1.9
    columns = partial(_draw_columns, comparison, picture)
    return picture.draw(path, title, "targets", below, columns, labels, white_marks=True)


def _draw_columns(comparison: GraphComparison, picture: _Drawing, axes: Axes) -> None:
    """Under every column its name; where columns hold the tokens of a whole role, the strongest tokens too."""
    nodes, by_role = comparison.nodes, comparison.match in ("role", "feature")
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top"}
    upright = len(picture.layout.slots) <= _UPRIGHT
    turn = {"fontsize": 9.5} if upright else {"fontsize": 8, "rotation": 90}
    under = {"xycoords": axes.get_xaxis_transform(), "annotation_clip": False}
    drop = -20 if by_role else -6  # below the tokens' slanted names
    for column, (centre, _) in picture.layout.slots.items():
        text = "no position" if column == _NO_POSITION else comparison.columns[column]
        if column >= 0 and comparison.column_is_image[column] and comparison.match != "role":
            text = f"soft {text}"
        axes.annotate(text, (centre, 0), (0, drop), **turn, **under, **place)
    words = [node for node in picture.strongest(NodeKind.TOKEN, len(nodes)) if nodes.image[node] < 0]
    for node in words[:6] if by_role else ():
        spot = tuple(picture.layout.xy[node])
        axes.annotate(nodes.label[node].strip('"'), spot, (0, -9), fontsize=7.5, rotation=20, **place)


def share_bars(comparison: GraphComparison, path: str | Path, count: int = 20, labels: Labels | None = None) -> Path:
    """Bars to the left and right: the features whose shares of influence differ most, with their shares in both.

    `labels` are written next to the features.
    """
    nodes = comparison.nodes
    features = np.flatnonzero(nodes.kind == NodeKind.FEATURE)
    gap = comparison.share[0] - comparison.share[1]
    top = features[np.argsort(-np.abs(gap[features]), kind="stable")][:count]
    top = top[np.argsort(gap[top], kind="stable")]
    names = [f"{nodes.name(n)}  {comparison.where(n)}" for n in top.tolist()]
    if labels:
        texts = [textwrap.shorten(labels.get(_feature(nodes, n), ""), 56, placeholder="...") for n in top.tolist()]
        names = [f"{text}  {name}".strip() for text, name in zip(texts, names, strict=True)]
    rows = np.arange(len(top))
    with drawing(path, 10.5 if labels else 7.5, 1.4 + 0.27 * max(len(top), 1)) as figure:
        axes = figure.add_subplot()
        axes.barh(
            rows, -100 * comparison.share[0, top], color=_FIRST, edgecolor=INK, linewidth=0.6, label=comparison.names[0]
        )
        bars = {"color": "white", "edgecolor": _SECOND, "hatch": HATCHES[1], "linewidth": 1.0}
        axes.barh(rows, 100 * comparison.share[1, top], label=comparison.names[1], **bars)
        axes.set_yticks(rows, names)
        limit = 105 * max(comparison.share[:, top].max(initial=0.0), 1e-6)
        axes.set_xlim(-limit, limit)
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g} %")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("share of the influence on what is explained")
        axes.set_title("features whose shares differ most", loc="left")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
        tidy(axes, "x")
    return Path(path)
