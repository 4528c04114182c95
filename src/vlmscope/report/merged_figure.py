"""Pictures of merged graphs: the difference of two, the shares behind it, and the mean of many.

What is the first graph's is blue, filled and drawn in full lines; what is the second's is orange, hollow and dashed;
what both use is grey: so the pictures can be read without colours too.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from vlmscope.core.graph import ENDS, AggregateGraph, GraphComparison, MergedGraph, NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.report.graph_figure import (
    ACROSS,
    INCHES,
    LEFT,
    MARKS,
    Layout,
    draw_edges,
    draw_key,
    edge_widths,
    frame,
    key_entries,
    key_height,
    lay_out,
)
from vlmscope.report.style import COLOURS, HATCHES, INK, NEGATIVE, POSITIVE, drawing, tidy

_FIRST, _SECOND, _BOTH = COLOURS[0], COLOURS[1], "#8a8a8a"
_DASHED = (0, (3, 1.5))
_MORE = 2.0  # a node or edge is one graph's when its share there is this many times that in the other


def difference_graph(
    found: GraphComparison, path: str | Path, max_edges: int = 90, labels: Mapping[FeatureId, str] | None = None
) -> Path:
    """Draw the edges whose shares of influence differ most, and the strongest ones that both graphs use.

    What `labels` calls the features that are named by their numbers stands below.

    Raises:
        ValueError: the graphs have no edges.
    """
    if len(found.sources) == 0:
        raise ValueError("the graphs have no edges to draw")
    side = _side(found.edge_share)
    gap, common = np.abs(found.edge_share[0] - found.edge_share[1]), found.edge_share.min(axis=0)
    ranked = ((1, gap), (-1, gap), (0, common))
    groups = [_first_of(np.flatnonzero(side == mark), values, max_edges // 3) for mark, values in ranked]
    sizes = np.where(side == 0, common, gap)
    first, second = found.names
    title = (
        f"{first} against {second}: {len(groups[0])} edges of {first}, {len(groups[1])} of {second}, {len(groups[2])}"
        " of both; line width: share of influence"
    )
    styles = ((_FIRST, "solid"), (_SECOND, _DASHED), (_BOTH, (0, (1, 1))))
    # No influence flows through what is explained: it is one graph's by its probability.
    ends = np.isin(found.nodes.kind, ENDS)
    node_side = np.where(ends, _side(np.nan_to_num(found.activation)), _side(found.share))
    legend = _side_legend(found.names)
    return _draw(found, path, groups, sizes, styles, title, found.share.max(axis=0), node_side, legend, labels)


def _side(shares: np.ndarray) -> np.ndarray:
    """1 where the first of `shares [2, n]` is at least twice the second, -1 where the second is, else 0."""
    first, second = shares
    return ((first > 0) & (first >= _MORE * second)).astype(int) - ((second > 0) & (second >= _MORE * first))


def _first_of(edges: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """The `count` of `edges` with the largest of `values [E]`."""
    return edges[np.argsort(-values[edges], kind="stable")][:count]


def aggregate_graph(
    found: AggregateGraph, path: str | Path, max_edges: int = 90, labels: Mapping[FeatureId, str] | None = None
) -> Path:
    """Draw the edges with the largest mean share; a node's shade says in how many graphs it was kept.

    `labels` as in `difference_graph`.

    Raises:
        ValueError: the graphs have no edges.
    """
    if len(found.sources) == 0:
        raise ValueError("the graphs have no edges to draw")
    top = np.argsort(-found.edge_share, kind="stable")[:max_edges]
    signs = [top[found.weight[top] >= 0], top[found.weight[top] < 0]]
    title = (
        f"{found.n_graphs} graphs: the {len(top)} edges with the largest mean share of influence; line width: mean"
        " |edge|; black nodes are kept in every graph, white ones in few"
    )
    legend = [
        Line2D([], [], color=POSITIVE, linewidth=2, label="mean edge positive"),
        Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=_DASHED, label="mean edge negative"),
    ]
    styles = ((POSITIVE, "solid"), (NEGATIVE, _DASHED))
    often = found.count / found.n_graphs
    return _draw(found, path, signs, found.absolute, styles, title, found.share, often, legend, labels)


def _draw(
    found: GraphComparison | AggregateGraph,
    path: str | Path,
    groups: Sequence[np.ndarray],
    sizes: np.ndarray,
    styles: Sequence[tuple[str, object]],
    title: str,
    strength: np.ndarray,
    shade: np.ndarray,
    legend: Sequence[Line2D],
    labels: Mapping[FeatureId, str] | None,
) -> Path:
    """Edges in groups, each of one style; `sizes [E]` are widths, `strength [M]` and `shade [M]` are of nodes."""
    chosen = np.concatenate(groups)
    ends = np.flatnonzero(np.isin(found.nodes.kind, ENDS))
    shown = np.unique(np.concatenate([found.sources[chosen], found.targets[chosen], ends]))
    layout = lay_out(found.nodes, shown, strength, found.column_is_image, found.n_layers)
    key = key_entries([_id(found, node) for node in _strongest(found, shown, strength)], labels)
    height = 2.1 + 0.72 * len(layout.rows) + key_height(key)
    below = ((1.2 if _upright(layout) else 1.9) + key_height(key)) / height
    widths = np.zeros(len(sizes))
    widths[chosen] = edge_widths(sizes[chosen])
    with drawing(path, INCHES, height, constrained=False) as figure:
        axes = figure.add_axes((LEFT, below, ACROSS, 1 - below - 0.32 / height))
        frame(axes, layout, "targets", title)
        for edges, style in zip(groups, styles, strict=True):
            draw_edges(axes, layout, (found.sources[edges], found.targets[edges]), widths[edges], style)
        _nodes(axes, found, layout, shown, strength, shade)
        _columns(axes, found, layout)
        if found.match in ("role", "feature"):
            _name_tokens(axes, found, layout, shown, strength)
        kinds = {NodeKind(int(kind)) for kind in found.nodes.kind[shown]}
        handles = [
            Line2D([], [], marker=mark, color="white", markeredgecolor=INK, markersize=8, label=words)
            for kind, (mark, _, words) in MARKS.items()
            if kind in kinds
        ]
        style = {"ncols": 5, "frameon": False, "fontsize": 9, "bbox_to_anchor": (0.5, key_height(key) / height)}
        figure.legend(handles=[*handles, *legend], loc="lower center", **style)
        draw_key(figure, key)
    return Path(path)


def _strongest(found: MergedGraph, shown: np.ndarray, strength: np.ndarray, count: int = 14) -> list[int]:
    """The features that are named by their numbers."""
    features = shown[found.nodes.kind[shown] == NodeKind.FEATURE]
    return features[np.argsort(-strength[features], kind="stable")][:count].tolist()


def _id(found: MergedGraph, node: int) -> FeatureId:
    return FeatureId(int(found.nodes.layer[node]), int(found.nodes.index[node]))


def _nodes(
    axes: Axes,
    found: GraphComparison | AggregateGraph,
    layout: Layout,
    shown: np.ndarray,
    strength: np.ndarray,
    shade: np.ndarray,
) -> None:
    """`shade [M]` is 1, 0 or -1 in a comparison (`_side`), the share of graphs in an aggregate."""
    nodes, largest = found.nodes, strength[shown].max() or 1.0
    compared = isinstance(found, GraphComparison)
    for kind, (marker, _, _) in MARKS.items():
        chosen = shown[nodes.kind[shown] == kind]
        if len(chosen) == 0:
            continue
        sizes = 16 + 130 * np.sqrt(strength[chosen] / largest)
        faces, edges = _paint(shade[chosen], compared)
        axes.scatter(*layout.xy[chosen].T, s=sizes, c=faces, marker=marker, edgecolors=edges, linewidths=1.3, zorder=3)
    for node in shown[np.isin(nodes.kind[shown], ENDS)].tolist():
        faces, edges = _paint(shade[[node]], compared)
        box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": edges[0], "linewidth": 1.6}
        words = f"{nodes.label[node]}\n{_values(found, node)}".strip()
        axes.text(*layout.xy[node], words, ha="center", va="center", fontsize=9, bbox=box, zorder=4)  # pyright: ignore[reportCallIssue]
    named: list[np.ndarray] = []
    room = 0.034 * sum(width for _, width in layout.slots.values())
    for node in _strongest(found, shown, strength):
        spot = layout.xy[node]
        near = sum(abs(spot[0] - other[0]) < room and abs(spot[1] - other[1]) < 0.3 for other in named)
        named.append(spot)
        if near > 1:  # no room above or below
            continue
        style = {"ha": "center", "va": "top" if near else "bottom", "fontsize": 7.5, "zorder": 5}
        back = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        at = (float(spot[0]), float(spot[1]))
        axes.annotate(
            str(nodes.index[node]), at, (0, -7 if near else 7), textcoords="offset points", bbox=back, **style
        )


def _name_tokens(axes: Axes, found: MergedGraph, layout: Layout, shown: np.ndarray, strength: np.ndarray) -> None:
    """Where a column holds the tokens of a whole role, write the strongest ones beside their squares."""
    nodes = found.nodes
    tokens = shown[(nodes.kind[shown] == NodeKind.TOKEN) & (nodes.image[shown] < 0)]
    for node in tokens[np.argsort(-strength[tokens], kind="stable")][:6].tolist():
        at = (float(layout.xy[node][0]), float(layout.xy[node][1]))
        word = nodes.label[node].strip('"')
        axes.annotate(word, at, (0, -9), textcoords="offset points", ha="center", va="top", fontsize=7.5, rotation=20)


def _paint(shade: np.ndarray, compared: bool) -> tuple[list[str], list[str]]:
    """Face and edge colours."""
    if not compared:
        return [f"{0.98 - 0.83 * float(often):.3f}" for often in shade], [INK] * len(shade)
    faces = {1: _FIRST, 0: "#d0d0d0", -1: "white"}
    edges = {1: _FIRST, 0: _BOTH, -1: _SECOND}
    return [faces[int(side)] for side in shade], [edges[int(side)] for side in shade]


def _values(found: GraphComparison | AggregateGraph, node: int) -> str:
    """What stands in a logit's box below its token."""
    if found.nodes.kind[node] != NodeKind.LOGIT:
        return ""
    if isinstance(found, AggregateGraph):
        return f"p={found.activation[node]:.2f} in {found.count[node]}"
    return "p=" + " | ".join("?" if np.isnan(p) else f"{p:.2f}" for p in found.activation[:, node])


def _upright(layout: Layout) -> bool:
    """Whether the columns are few enough that their names need not be turned."""
    return len(layout.slots) <= 8


def _columns(axes: Axes, found: MergedGraph, layout: Layout) -> None:
    below = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
    wide = _upright(layout)
    drop = -20 if found.match in ("role", "feature") else -6  # below the tokens' slanted names
    for column, (centre, _) in layout.slots.items():
        text = "no position" if column < 0 else found.columns[column]
        text = f"soft {text}" if column >= 0 and found.column_is_image[column] and found.match != "role" else text
        turn = {"rotation": 0 if wide else 90, "ha": "center", "va": "top", "fontsize": 9.5 if wide else 8}
        axes.annotate(text, (centre, 0), (0, drop), **turn, **below)


def _side_legend(names: Sequence[str]) -> list[Line2D]:
    round_mark = {"marker": "o", "markersize": 8, "linewidth": 2}
    return [
        Line2D([], [], color=_FIRST, label=f"{names[0]}: at least twice the other's share", **round_mark),
        Line2D(
            [],
            [],
            color=_SECOND,
            linestyle=_DASHED,
            markerfacecolor="white",
            label=f"{names[1]}: at least twice the other's share",
            **round_mark,
        ),
        Line2D([], [], color=_BOTH, linestyle=(0, (1, 1)), markerfacecolor="#d0d0d0", label="both", **round_mark),
    ]


def share_bars(
    found: GraphComparison, path: str | Path, count: int = 20, labels: Mapping[FeatureId, str] | None = None
) -> Path:
    """Bars to the left and right: the features whose shares of influence differ most, with their shares in both.

    `labels` stand beside the features.
    """
    features = np.flatnonzero(found.nodes.kind == NodeKind.FEATURE)
    gap = found.share[0, features] - found.share[1, features]
    top = features[np.argsort(-np.abs(gap), kind="stable")][:count]
    top = top[np.argsort(found.share[0, top] - found.share[1, top], kind="stable")]
    rows = np.arange(len(top))
    names = [f"{found.nodes.name(n)}  {found.where(n)}" for n in top.tolist()]
    if labels:
        said = [textwrap.shorten(labels.get(_id(found, n), ""), 56, placeholder="...") for n in top.tolist()]
        names = [f"{label}  {name}".strip() for label, name in zip(said, names, strict=True)]
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
