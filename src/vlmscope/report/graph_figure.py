"""Pictures of attribution graphs: positions from left to right, layers from bottom to top.

Only the strongest edges are drawn, and the nodes at their ends. In the graph of one prompt, an edge's strength is its
share of its target's incoming |weight| times the target's influence on the logits, the quantity that pruning ranks by.

In a comparison, what is the first graph's is blue, filled and in full lines; what is the second's is orange, hollow and
dashed; what both use is grey: so the picture can be read without colours too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image

from vlmscope.attribution.trace_files import strongest_edges
from vlmscope.core.graph import (
    ENDS,
    AggregateGraph,
    GraphComparison,
    MatchedNodes,
    MergedGraph,
    NodeKind,
    NodeTable,
    PrunedGraph,
)
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.report.style import COLOURS, HATCHES, INK, MUTED, NEGATIVE, POSITIVE, drawing, pick, tidy

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
_NAMED = 12  # features whose numbers are written beside them
_KEY_LINE = 0.17  # inches
_KEY_CHARACTERS = 88  # of an entry; two stand side by side


class Layout(NamedTuple):
    """Where things go. `xy [N, 2]` is NaN for nodes that are not drawn; `slots[position]` = (centre, width)."""

    xy: np.ndarray
    slots: dict[int, tuple[float, float]]
    rows: dict[int, int]  # layer -> height in the picture


def lay_out(nodes: Nodes, shown: np.ndarray, strength: np.ndarray, is_image: np.ndarray, n_layers: int) -> Layout:
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
    every = range(-1, above + 1)
    seen = {int(layer) for layer in nodes.layer[body]} | {above}
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


def key_entries(features: Sequence[FeatureId], labels: Labels | None) -> list[str]:
    """`L5/709  planet = mars (0.97)` for each different feature that has a label, in order."""
    found = [f"{one}  {labels[one]}" for one in dict.fromkeys(features) if labels and one in labels]
    return [text if len(text) <= _KEY_CHARACTERS else f"{text[: _KEY_CHARACTERS - 3]}..." for text in found]


class Edges(NamedTuple):
    """Edges of one look: node numbers `[n]` of their ends, and sizes `[n]` >= 0, of which the width is made."""

    sources: np.ndarray
    targets: np.ndarray
    sizes: np.ndarray
    colour: str
    dashes: Any


class _Drawing:
    """A layered graph as a picture; subclasses say how nodes, ends and columns look."""

    title = ""
    above = "target"  # names the row of what is explained
    pen = 0.6  # points, of a node's outline
    legend_columns = 8

    def __init__(
        self,
        nodes: Nodes,
        strength: np.ndarray,
        is_image: np.ndarray,
        n_layers: int,
        edges: Sequence[Edges],
        ends: np.ndarray,
    ) -> None:
        if not sum(len(group.sizes) for group in edges):
            raise ValueError("the graph has no edges to draw")
        self.nodes, self.strength, self.edges = nodes, strength, edges
        self.shown = np.unique(np.concatenate([*(part for e in edges for part in (e.sources, e.targets)), ends]))
        self.layout = lay_out(nodes, self.shown, strength, is_image, n_layers)

    @property
    def below(self) -> float:
        """Inches under the graph for the columns' names and the legend."""
        return 1.7

    def paint(self, chosen: np.ndarray) -> tuple[list[str], list[str]]:
        """Face and outline colours of nodes."""
        raise NotImplementedError

    def end_words(self, node: int) -> str:
        """What stands in the box of a node that is explained."""
        raise NotImplementedError

    def draw_columns(self, axes: Axes) -> None:
        """Name the columns under the axes."""
        raise NotImplementedError

    def legend(self) -> list[Line2D]:
        """Entries beside those of the kinds of nodes."""
        raise NotImplementedError

    def legend_face(self, face: str) -> str:
        """The colour of a kind's marker in the legend."""
        return face

    @cached_property
    def strongest(self) -> np.ndarray:
        """The most influential features, the first one first: those that are named by their numbers."""
        return self.strongest_of(NodeKind.FEATURE, _NAMED)

    def strongest_of(self, kind: NodeKind, count: int) -> np.ndarray:
        """The `count` nodes of a kind that are drawn and have most influence."""
        chosen = self.shown[self.nodes.kind[self.shown] == kind]
        return chosen[np.argsort(-self.strength[chosen], kind="stable")][:count]

    def draw(self, path: str | Path, labels: Labels | None) -> Path:
        """Write the picture, 14 inches (2,100 pixels) wide, readable at 1,400; labels of named features stand below."""
        nodes, layout = self.nodes, self.layout
        named = [FeatureId(int(nodes.layer[node]), int(nodes.index[node])) for node in self.strongest]
        key = key_entries(named, labels)
        key_height = _KEY_LINE * ((len(key) + 1) // 2) + 0.15 if key else 0.0
        height = 2.1 + 0.72 * len(layout.rows) + key_height
        bottom = (self.below + key_height) / height
        with drawing(path, _INCHES, height, constrained=False) as figure:
            axes = figure.add_axes((_LEFT, bottom, _ACROSS, 1 - bottom - 0.32 / height))
            self._draw_frame(axes)
            self._draw_edges(axes)
            self._draw_nodes(axes)
            self._name_features(axes)
            self.draw_columns(axes)
            kinds = {NodeKind(int(kind)) for kind in nodes.kind[self.shown]}
            marks = {"linestyle": "none", "markeredgecolor": INK, "markersize": 8}
            handles = [
                Line2D([], [], marker=marker, markerfacecolor=self.legend_face(face), label=words, **marks)
                for kind, (marker, face, words) in MARKS.items()
                if kind in kinds
            ]
            where = {"loc": "lower center", "bbox_to_anchor": (0.5, key_height / height)}
            style = {"ncols": self.legend_columns, "frameon": False, "fontsize": 9}
            figure.legend(handles=[*handles, *self.legend()], **where, **style)
            rows = (len(key) + 1) // 2
            for number, text in enumerate(key):
                column, row = divmod(number, rows)
                y = (key_height - 0.05 - row * _KEY_LINE) / height
                figure.text(0.03 + 0.48 * column, y, text, ha="left", va="top", fontsize=8)
        return Path(path)

    def _draw_frame(self, axes: Axes) -> None:
        """Rows, columns and the names of the layers."""
        slots, rows = self.layout.slots, self.layout.rows
        first, last = slots[min(slots)], slots[max(slots)]
        axes.set_xlim(first[0] - first[1] / 2, last[0] + last[1] / 2)
        axes.set_ylim(-0.5, len(rows) - 0.35)
        axes.grid(False)
        axes.set_xticks([])
        names = {-1: "embedding", max(rows): self.above}
        axes.set_yticks(list(rows.values()), [names.get(layer, str(layer)) for layer in rows])
        axes.set_ylabel("layer")
        axes.yaxis.set_label_coords(-0.058, 0.5)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        for row in rows.values():
            if row % 2:
                axes.axhspan(row - 0.5, row + 0.5, color="#f5f6f8", zorder=0)
        for number, (centre, width) in enumerate(slots.values()):
            if number:
                axes.axvline(centre - width / 2, color="#e4e4e4", linewidth=0.6, zorder=0.5)
        axes.set_title(self.title, loc="left", fontsize=10)

    def _draw_edges(self, axes: Axes) -> None:
        largest = max((edges.sizes.max(initial=0.0) for edges in self.edges), default=0.0) or 1.0
        for edges in self.edges:
            if len(edges.sizes):
                lines = np.stack([self.layout.xy[edges.sources], self.layout.xy[edges.targets]], axis=1)
                # The root keeps weak edges visible beside one that dwarfs them all.
                widths = 0.35 + 3.4 * np.sqrt(edges.sizes / largest)
                look = {"linewidths": widths, "colors": edges.colour, "linestyles": edges.dashes}
                axes.add_collection(LineCollection(list(lines), alpha=0.42, zorder=1, **look))

    def _draw_nodes(self, axes: Axes) -> None:
        nodes, xy = self.nodes, self.layout.xy
        largest = self.strength[self.shown].max() or 1.0
        for kind, (marker, _, _) in MARKS.items():
            chosen = self.shown[nodes.kind[self.shown] == kind]
            if len(chosen):
                sizes = 16 + 130 * np.sqrt(self.strength[chosen] / largest)
                faces, outlines = self.paint(chosen)
                look = {"s": sizes, "c": faces, "edgecolors": outlines, "linewidths": self.pen}
                axes.scatter(*xy[chosen].T, marker=marker, zorder=3, **look)
        for node in self.shown[np.isin(nodes.kind[self.shown], ENDS)].tolist():
            outline = {"edgecolor": self.paint(np.array([node]))[1][0], "linewidth": self.pen + 0.4}
            box = {"boxstyle": "round,pad=0.3", "facecolor": "white", **outline}
            x, y = xy[node].tolist()
            axes.text(x, y, self.end_words(node), ha="center", va="center", fontsize=9, bbox=box, zorder=4)

    def _name_features(self, axes: Axes) -> None:
        """Write the numbers of the strongest features above or below them, where a neighbour's leaves room."""
        named: list[np.ndarray] = []
        room = 0.03 * sum(width for _, width in self.layout.slots.values())
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        for node in self.strongest:
            spot = self.layout.xy[node]
            near = sum(abs(spot[0] - other[0]) < room and abs(spot[1] - other[1]) < 0.3 for other in named)
            named.append(spot)
            if near < 2:
                where = {"xytext": (0, -7), "va": "top"} if near else {"xytext": (0, 7), "va": "bottom"}
                look = {"ha": "center", "fontsize": 7.5, "bbox": back, "zorder": 5}
                axes.annotate(str(self.nodes.index[node]), tuple(spot), textcoords="offset points", **where, **look)


class _PromptDrawing(_Drawing):
    def __init__(
        self, pruned: PrunedGraph, images: Sequence[np.ndarray], groups: Mapping[FeatureId, str], max_edges: int
    ) -> None:
        graph, scores = pruned.graph, pruned.scores
        self.graph, self.images, self.groups = graph, images, groups
        chosen = strongest_edges(pruned, max_edges)
        sources, targets, weights = graph.indices[chosen].astype(int), graph.targets_of(chosen), graph.weights[chosen]
        edges = [
            Edges(sources[sign], targets[sign], np.abs(weights[sign]), colour, dashes)
            for sign, colour, dashes in ((weights >= 0, POSITIVE, "solid"), (weights < 0, NEGATIVE, _DASHED))
        ]
        ends = graph.nodes.ends()
        kept_ends = ends[pruned.node_mask[ends]]
        super().__init__(graph.nodes, pruned.influence, graph.is_image, graph.n_layers, edges, kept_ends)
        self.title = (
            f"the {len(chosen)} strongest of {pruned.n_edges:,} kept edges, {len(self.shown)} of {pruned.n_nodes:,} "
            f"kept nodes; replacement score {scores.replacement:.2f}, completeness score {scores.completeness:.2f}"
        )
        if graph.nodes.kind[-1] == NodeKind.LOGIT:
            self.above = "logits"
        names = list(dict.fromkeys(groups.values()))
        self.colours = {name: pick(COLOURS[1:], number) for number, name in enumerate(names)}

    def _group(self, node: int) -> str | None:
        is_feature = self.nodes.kind[node] == NodeKind.FEATURE
        return self.groups.get(self.graph.nodes.feature_id(node)) if is_feature else None

    def paint(self, chosen: np.ndarray) -> tuple[list[str], list[str]]:
        faces = []
        for node in chosen.tolist():
            group, kind = self._group(node), NodeKind(int(self.nodes.kind[node]))
            face = "white" if kind in ENDS else MARKS[kind][1]
            faces.append(face if group is None else self.colours[group])
        return faces, [INK] * len(chosen)

    def end_words(self, node: int) -> str:
        number = node - int(self.graph.nodes.ends()[0])
        value = f"p={self.graph.logit_probabilities[number]:.3f}"
        if self.nodes.kind[node] == NodeKind.TARGET:
            value = f"{self.graph.nodes.target[node]:+.2f}"
        return "\n".join([*textwrap.wrap(self.graph.logit_tokens[number], 14), value])

    def draw_columns(self, axes: Axes) -> None:
        """Under every position its token, or a thumbnail of its patch with the soft token's number."""
        graph, slots = self.graph, self.layout.slots
        soft = {int(position): number for number, position in enumerate(np.flatnonzero(graph.is_image))}
        inches = _INCHES * _ACROSS / sum(width for _, width in slots.values())
        narrowest = min((slots[position][1] for position in soft if position in slots), default=1.0)
        points = min(0.92 * narrowest * inches * 72, 30.0)
        under = axes.get_xaxis_transform()
        below = {"xycoords": under, "textcoords": "offset points", "annotation_clip": False, "ha": "center"}
        for position, (centre, _) in slots.items():
            box = None if position == _NO_POSITION else graph.patch_boxes[position]
            if box is None or not self.images:
                text = f"soft {soft[position]}" if position in soft else graph.tokens[position]
                text, size = ("no position", 8) if position == _NO_POSITION else (text, 8.5)
                axes.annotate(text, (centre, 0), (0, -6), rotation=90, va="top", fontsize=size, **below)
                continue
            pixels = self.images[int(graph.image_index[position])]
            left, top, right, bottom = PatchBox(*box).pixels(pixels.shape[1], pixels.shape[0])
            patch = Image.fromarray(pixels[top:bottom, left:right]).resize((48, 48), Image.Resampling.NEAREST)
            thumbnail = AnnotationBbox(
                OffsetImage(np.asarray(patch), zoom=points / 48),
                (centre, 0),
                (0, -6),
                xycoords=under,
                boxcoords="offset points",
                box_alignment=(0.5, 1),
                pad=0,
                bboxprops={"edgecolor": MUTED, "linewidth": 0.6},
                annotation_clip=False,
            )
            axes.add_artist(thumbnail)
            axes.annotate(str(soft[position]), (centre, 0), (0, -10 - points), va="top", fontsize=8.5, **below)

    def legend(self) -> list[Line2D]:
        plain = {"linestyle": "none", "markeredgecolor": INK, "markersize": 8, "marker": "o"}
        met = dict.fromkeys(group for node in self.shown.tolist() if (group := self._group(node)) is not None)
        marks = [Line2D([], [], markerfacecolor=self.colours[name], label=f"feature: {name}", **plain) for name in met]
        return [*marks, *_sign_legend("positive edge", "negative edge")]


def _sign_legend(positive: str, negative: str) -> list[Line2D]:
    return [
        Line2D([], [], color=POSITIVE, linewidth=2, label=positive),
        Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=_DASHED, label=negative),
    ]


def attribution_graph(
    pruned: PrunedGraph,
    path: str | Path,
    images: Sequence[np.ndarray] = (),
    groups: Mapping[FeatureId, str] | None = None,
    max_edges: int = 150,
    labels: Labels | None = None,
) -> Path:
    """Draw the pruned graph of one prompt.

    Args:
        pruned: the graph.
        path: of the PNG.
        images: the prompt's pictures (uint8 `[H, W, 3]`), cut into thumbnails under their soft tokens; without them
            soft tokens are named.
        groups: feature -> its supernode, which gets a colour.
        max_edges: how many edges are drawn.
        labels: of features; those of the features that are named by their numbers stand below.
    """
    return _PromptDrawing(pruned, images, groups or {}, max_edges).draw(path, labels)


class _MergedDrawing(_Drawing):
    above = "targets"
    pen = 1.3
    legend_columns = 5

    def __init__(self, merged: MergedGraph, strength: np.ndarray, edges: Sequence[Edges]) -> None:
        self.merged = merged
        ends = np.flatnonzero(np.isin(merged.nodes.kind, ENDS))
        super().__init__(merged.nodes, strength, merged.column_is_image, merged.n_layers, edges, ends)
        self.upright = len(self.layout.slots) <= 8  # so few columns that their names need not be turned
        self.by_role = merged.match in ("role", "feature")  # columns hold the tokens of a whole role

    @property
    def below(self) -> float:
        return 1.2 if self.upright else 1.9

    def legend_face(self, face: str) -> str:
        return "white"

    def end_words(self, node: int) -> str:
        value = self.end_value(node) if self.nodes.kind[node] == NodeKind.LOGIT else ""
        return f"{self.merged.nodes.label[node]}\n{value}".strip()

    def end_value(self, node: int) -> str:
        """The probabilities of a logit."""
        raise NotImplementedError

    def draw_columns(self, axes: Axes) -> None:
        merged = self.merged
        below = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        turn = {"fontsize": 9.5} if self.upright else {"fontsize": 8, "rotation": 90}
        drop = -20 if self.by_role else -6  # below the tokens' slanted names
        for column, (centre, _) in self.layout.slots.items():
            text = "no position" if column == _NO_POSITION else merged.columns[column]
            if column >= 0 and merged.column_is_image[column] and merged.match != "role":
                text = f"soft {text}"
            axes.annotate(text, (centre, 0), (0, drop), ha="center", va="top", **turn, **below)
        if self.by_role:
            words = self.strongest_of(NodeKind.TOKEN, len(self.shown))
            for node in words[merged.nodes.image[words] < 0][:6].tolist():
                word = merged.nodes.label[node].strip('"')
                look = {"ha": "center", "va": "top", "fontsize": 7.5, "rotation": 20}
                axes.annotate(word, tuple(self.layout.xy[node]), (0, -9), textcoords="offset points", **look)


_FIRST, _SECOND, _BOTH = COLOURS[0], COLOURS[1], "#8a8a8a"
_MORE = 2.0  # a node or edge is one graph's when its share there is this many times that in the other


def _side(shares: np.ndarray) -> np.ndarray:
    """1 where the first of `shares [2, n]` is at least twice the second, -1 where the second is, else 0."""
    first, second = shares
    return ((first > 0) & (first >= _MORE * second)).astype(int) - ((second > 0) & (second >= _MORE * first))


class _DifferenceDrawing(_MergedDrawing):
    def __init__(self, found: GraphComparison, max_edges: int) -> None:
        side, edges = _side(found.edge_share), []
        gap, common = np.abs(found.edge_share[0] - found.edge_share[1]), found.edge_share.min(axis=0)
        for mark, sizes, colour, dashes in (
            (1, gap, _FIRST, "solid"),
            (-1, gap, _SECOND, _DASHED),
            (0, common, _BOTH, _DOTTED),
        ):
            of_side = np.flatnonzero(side == mark)
            chosen = of_side[np.argsort(-sizes[of_side], kind="stable")][: max_edges // 3]
            edges.append(Edges(found.sources[chosen], found.targets[chosen], sizes[chosen], colour, dashes))
        super().__init__(found, found.share.max(axis=0), edges)
        # No influence flows through what is explained: it is one graph's by its probability.
        is_end = np.isin(found.nodes.kind, ENDS)
        self.side = np.where(is_end, _side(np.nan_to_num(found.activation)), _side(found.share))
        self.activation = found.activation
        first, second = found.names
        counts = [len(group.sizes) for group in edges]
        self.title = (
            f"{first} against {second}: {counts[0]} edges of {first}, {counts[1]} of {second}, {counts[2]} of both; "
            "line width: share of influence"
        )

    def paint(self, chosen: np.ndarray) -> tuple[list[str], list[str]]:
        faces, outlines = {1: _FIRST, 0: "#d0d0d0", -1: "white"}, {1: _FIRST, 0: _BOTH, -1: _SECOND}
        sides = self.side[chosen].tolist()
        return [faces[side] for side in sides], [outlines[side] for side in sides]

    def end_value(self, node: int) -> str:
        return "p=" + " | ".join("?" if np.isnan(p) else f"{p:.2f}" for p in self.activation[:, node])

    def legend(self) -> list[Line2D]:
        mark = {"marker": "o", "markersize": 8, "linewidth": 2}
        first, second = (f"{name}: at least twice the other's share" for name in self.merged.names)
        return [
            Line2D([], [], color=_FIRST, label=first, **mark),
            Line2D([], [], color=_SECOND, linestyle=_DASHED, markerfacecolor="white", label=second, **mark),
            Line2D([], [], color=_BOTH, linestyle=_DOTTED, markerfacecolor="#d0d0d0", label="both", **mark),
        ]


def difference_graph(
    found: GraphComparison, path: str | Path, max_edges: int = 90, labels: Labels | None = None
) -> Path:
    """Draw the edges whose shares of influence differ most, and the strongest ones that both graphs use."""
    return _DifferenceDrawing(found, max_edges).draw(path, labels)


class _AggregateDrawing(_MergedDrawing):
    def __init__(self, found: AggregateGraph, max_edges: int) -> None:
        top = np.argsort(-found.edge_share, kind="stable")[:max_edges]
        positive = found.weight[top] >= 0
        edges = [
            Edges(found.sources[chosen], found.targets[chosen], found.absolute[chosen], colour, dashes)
            for chosen, colour, dashes in ((top[positive], POSITIVE, "solid"), (top[~positive], NEGATIVE, _DASHED))
        ]
        super().__init__(found, found.share, edges)
        self.count, self.often, self.activation = found.count, found.count / found.n_graphs, found.activation
        self.title = (
            f"{found.n_graphs} graphs: the {len(top)} edges with the largest mean share of influence; line width: mean "
            "|edge|; black nodes are kept in every graph, white ones in few"
        )

    def paint(self, chosen: np.ndarray) -> tuple[list[str], list[str]]:
        return [f"{0.98 - 0.83 * often:.3f}" for often in self.often[chosen].tolist()], [INK] * len(chosen)

    def end_value(self, node: int) -> str:
        return f"p={self.activation[node]:.2f} in {self.count[node]}"

    def legend(self) -> list[Line2D]:
        return _sign_legend("mean edge positive", "mean edge negative")


def aggregate_graph(found: AggregateGraph, path: str | Path, max_edges: int = 90, labels: Labels | None = None) -> Path:
    """Draw the edges with the largest mean share; a node's shade says in how many graphs it was kept."""
    return _AggregateDrawing(found, max_edges).draw(path, labels)


def share_bars(found: GraphComparison, path: str | Path, count: int = 20, labels: Labels | None = None) -> Path:
    """Bars to the left and right: the features whose shares of influence differ most, with their shares in both.

    `labels` stand beside the features.
    """
    nodes = found.nodes
    features = np.flatnonzero(nodes.kind == NodeKind.FEATURE)
    gap = found.share[0] - found.share[1]
    top = features[np.argsort(-np.abs(gap[features]), kind="stable")][:count]
    top = top[np.argsort(gap[top], kind="stable")]
    names = [f"{nodes.name(n)}  {found.where(n)}" for n in top.tolist()]
    if labels:
        ids = [FeatureId(int(nodes.layer[n]), int(nodes.index[n])) for n in top]
        said = [textwrap.shorten(labels.get(one, ""), 56, placeholder="...") for one in ids]
        names = [f"{text}  {name}".strip() for text, name in zip(said, names, strict=True)]
    rows = np.arange(len(top))
    with drawing(path, 10.5 if labels else 7.5, 1.4 + 0.27 * max(len(top), 1)) as figure:
        axes = figure.add_subplot()
        axes.barh(rows, -100 * found.share[0, top], color=_FIRST, edgecolor=INK, linewidth=0.6, label=found.names[0])
        bars = {"color": "white", "edgecolor": _SECOND, "hatch": HATCHES[1], "linewidth": 1.0}
        axes.barh(rows, 100 * found.share[1, top], label=found.names[1], **bars)
        axes.set_yticks(rows, names)
        limit = 105 * max(found.share[:, top].max(initial=0.0), 1e-6)
        axes.set_xlim(-limit, limit)
        axes.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g} %")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("share of the influence on what is explained")
        axes.set_title("features whose shares differ most", loc="left")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, frameon=False)
        tidy(axes, "x")
    return Path(path)
