"""Comparison of two graphs of one model, and the mean of many (docs/graphs.md).

Nodes of two graphs are the same node by these rules:

| kind | same when |
| --- | --- |
| feature | same layer and index, and same place |
| token | same token id, and same place |
| soft token | same picture and same box in it, wherever it stands in the prompt |
| error | same layer and same place |
| bias, left out | same layer |
| logit | same token id and string, and same place in graphs that explain several positions |
| other target | a feature: same layer and index; else same name |

The place is, by `match`: `position` the position; `from_end` the position counted from the end of the prompt; `role`
the position's role (image, question, special, last), so that the nodes of a role become one; `feature` nothing, so
that those at all positions become one. `auto` is `position` for prompts of the same length whose soft tokens stand at
the same positions, else `role`. A node made of several has the sum of their influence, an edge the sum of the weights.

What counts is what pruning kept in at least one graph; its weights and shares are read from the whole graphs, so that a
node which just missed the cut of one is not taken for absent there. Only the edges between nodes of the union are
read, a block of rows at a time, so that graphs of many millions of edges need no second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmscope.attribution.export import GRAPH_FILE, Merged, load_graph
from vlmscope.attribution.influence import (
    absolute_rows,
    counted,
    influence,
    logit_weights,
    row_blocks,
    rows_of,
    take_rows,
)
from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AggregateGraph, AttributionGraph, GraphComparison, MatchedNodes, NodeKind, PrunedGraph
from vlmscope.core.records import FeatureId

MATCHES = ("position", "from_end", "role", "feature")
# The order of kinds within a layer, that of the node table of one graph.
_RANK = [NodeKind[kind] for kind in ("TOKEN", "BIAS", "FEATURE", "ERROR", "LEFT_OUT", "LOGIT", "TARGET")]
_SHIFT = 32  # an edge is the integer `target << 32 | source`


class NodeKey(NamedTuple):
    """Key that equal nodes share; `place` is a position, a role, or None for a node without a position.

    `token` is a feature's index or a token's id; `image` and `box` belong to a soft token, `name` to an end.
    """

    layer: int
    kind: int
    place: int | str | None
    token: int = -1
    image: int = -1
    box: tuple[float, ...] = ()
    name: str = ""


def choose_match(match: str, graphs: Sequence[AttributionGraph]) -> str:
    """`match`, or what `auto` stands for with these graphs."""
    if match not in ("auto", *MATCHES):
        raise UserError(f"match={match}: no such rule; choose one of auto, {', '.join(MATCHES)}")
    if match != "auto":
        return match
    same = all(np.array_equal(graph.is_image, graphs[0].is_image) for graph in graphs)
    return "position" if same else "role"


def _check_alike(first: PrunedGraph, second: PrunedGraph, names: Sequence[str]) -> None:
    """Raise a `UserError` for graphs of two models or with two conventions for biases."""
    graphs = first.graph, second.graph
    models = [f"{graph.meta.get('model') or 'a model without a name'} ({graph.n_layers} layers)" for graph in graphs]
    if models[0] != models[1]:
        raise UserError(
            f"{names[0]} is a graph of {models[0]}, {names[1]} of {models[1]}: "
            "features of two models are not the same; give graphs of one"
        )
    if first.bias != second.bias:
        raise UserError(
            f"{names[0]} was traced with attribution.bias={first.bias}, {names[1]} with {second.bias}: shares of their "
            "influence do not compare; trace one of them again"
        )


def places(graph: AttributionGraph, match: str) -> list[int | str]:
    """The place of each position under the rule `match`."""
    count = len(graph.tokens)
    match match:
        case "position":
            return list(range(count))
        case "from_end":
            return list(range(-count, 0))
        case "role":
            return [str(role) for role in graph.roles]
        case _:
            return ["any position"] * count


def node_keys(graph: AttributionGraph, match: str) -> list[NodeKey]:
    """The key of every node, in order."""
    nodes, place_of = graph.nodes, places(graph, match)
    ends = nodes.ends()
    names = dict(zip(ends.tolist(), graph.logit_tokens, strict=True))
    spread = len(np.unique(nodes.position[ends])) > 1
    keys = []
    table = zip(nodes.kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), nodes.index.tolist(), strict=True)
    for node, (kind, layer, position, index) in enumerate(table):
        key = NodeKey(layer, kind, place_of[position] if position >= 0 else None)
        match NodeKind(kind):
            case NodeKind.TOKEN if (box := graph.patch_boxes[position]) is not None:
                rounded = tuple(round(float(edge), 6) for edge in box)
                key = key._replace(place=None, image=int(graph.image_index[position]), box=rounded)
            case NodeKind.TOKEN | NodeKind.FEATURE:
                key = key._replace(token=index)
            case NodeKind.LOGIT:
                key = key._replace(place=key.place if spread else None, token=index, name=names[node])
            case NodeKind.TARGET:
                # A feature's name says where it fires, which may differ between prompts.
                key = key._replace(place=None, token=index, name=names[node] if index < 0 else "")
        keys.append(key)
    return keys


@dataclass(frozen=True)
class Layout:
    """The nodes and edges of a union; `numbers` gives a node's row, `edges [E]` the sorted edge integers."""

    match: str
    numbers: dict[NodeKey, int]
    edges: np.ndarray
    nodes: MatchedNodes
    columns: list[str]
    column_is_image: np.ndarray

    def common(self, first: AttributionGraph, names: Sequence[str], prompts: Sequence[str]) -> dict[str, Any]:
        """The fields that comparisons and aggregates share."""
        return {
            "nodes": self.nodes,
            "columns": self.columns,
            "column_is_image": self.column_is_image,
            "sources": (self.edges & ((1 << _SHIFT) - 1)).astype(np.int32),
            "targets": (self.edges >> _SHIFT).astype(np.int32),
            "match": self.match,
            "n_layers": first.n_layers,
            "model": str(first.meta.get("model", "")),
            "names": list(names),
            "prompts": list(prompts),
        }


class Union:
    """The kept nodes and edges of graphs that are added one after another, and how many graphs keep each.

    A soft token or an end has the place and the label of the first graph that keeps it.
    """

    def __init__(self, match: str) -> None:
        self.match = match
        self._numbers: dict[NodeKey, int] = {}
        self._drawn: list[tuple[int | str | None, str]] = []  # place and label of each number
        self._counts: list[int] = []
        self._edges = np.empty(0, np.int64)
        self._edge_counts = np.empty(0, np.int64)
        self._texts: dict[int | str, list[str]] = {}  # the tokens at each place
        self._image: dict[int | str, bool] = {}  # whether only soft tokens do

    def add(self, pruned: PrunedGraph) -> None:
        """Add what pruning kept of a graph."""
        graph = pruned.graph
        place_of = places(graph, self.match)
        for position, place in enumerate(place_of):
            text = graph.tokens[position] if graph.patch_boxes[position] is None else _cell(graph, position)
            texts = self._texts.setdefault(place, [])
            if text not in texts:
                texts.append(text)
            self._image[place] = self._image.get(place, True) and bool(graph.is_image[position])
        keys = node_keys(graph, self.match)
        number = np.full(graph.n_nodes, -1, np.int64)
        for node in np.flatnonzero(pruned.node_mask).tolist():
            key = keys[node]
            number[node] = self._numbers.setdefault(key, len(self._numbers))
            if number[node] == len(self._drawn):
                position = int(graph.nodes.position[node])
                self._drawn.append((place_of[position] if position >= 0 else None, _label(graph, node, key)))
                self._counts.append(0)
        for kept_number in set(number[number >= 0].tolist()):  # several nodes of a graph may share a number
            self._counts[kept_number] += 1
        kept = np.flatnonzero(pruned.edge_mask)
        new = np.unique(number[graph.targets_of(kept)] << _SHIFT | number[graph.indices[kept]])
        edges, inverse = np.unique(np.concatenate([self._edges, new]), return_inverse=True)
        counted = np.concatenate([self._edge_counts, np.ones(len(new), np.int64)])
        self._edges, self._edge_counts = edges, np.bincount(inverse, counted, len(edges)).astype(np.int64)

    def layout(self, min_count: int = 1) -> Layout:
        """Nodes and edges that at least `min_count` graphs keep, sources before targets; an edge needs both ends."""
        order = sorted(self._texts) if self.match in ("position", "from_end") else list(self._texts)
        column = {place: number for number, place in enumerate(order)} | {None: -1}

        def rank(key: NodeKey) -> tuple[Any, ...]:
            left_top = (key.box[1], key.box[0]) if key.box else ()
            place, _ = self._drawn[self._numbers[key]]
            return key.layer, _RANK.index(NodeKind(key.kind)), column[place], key.token, key.image, left_top, key.name

        chosen = sorted((key for key, number in self._numbers.items() if self._counts[number] >= min_count), key=rank)
        old = np.array([self._numbers[key] for key in chosen], np.int64)
        drawn = [self._drawn[number] for number in old]
        nodes = MatchedNodes(
            kind=np.array([key.kind for key in chosen], np.int8),
            layer=np.array([key.layer for key in chosen], np.int16),
            position=np.array([column[place] for place, _ in drawn], np.int32),
            index=np.array([key.token for key in chosen], np.int64),
            image=np.array([key.image for key in chosen], np.int64),
            box=np.array([key.box or (np.nan,) * 4 for key in chosen], np.float64).reshape(-1, 4),
            label=[label for _, label in drawn],
        )
        renamed = np.full(len(self._numbers), -1, np.int64)
        renamed[old] = np.arange(len(old))
        frequent = self._edges[self._edge_counts >= min_count]
        targets, sources = renamed[frequent >> _SHIFT], renamed[frequent & ((1 << _SHIFT) - 1)]
        inside = (targets >= 0) & (sources >= 0)
        edges = np.sort(targets[inside] << _SHIFT | sources[inside])
        numbers = {key: number for number, key in enumerate(chosen)}
        columns = [" | ".join(self._texts[place]) if isinstance(place, int) else place for place in order]
        return Layout(self.match, numbers, edges, nodes, columns, np.array([self._image[place] for place in order]))


def _label(graph: AttributionGraph, node: int, key: NodeKey) -> str:
    match NodeKind(key.kind):
        case NodeKind.TOKEN if key.box:
            left, top, right, bottom = key.box
            return f"picture {key.image + 1} at {(left + right) / 2:.0%}, {(top + bottom) / 2:.0%}"
        case NodeKind.TOKEN:
            return f'"{graph.tokens[int(graph.nodes.position[node])]}"'
        case NodeKind.FEATURE:
            return f"feature {key.token} of layer {key.layer}"
        case NodeKind.ERROR | NodeKind.BIAS | NodeKind.LEFT_OUT as kind:
            return f"{kind.name.lower().replace('_', ' ')} L{key.layer}"
        case _:
            return graph.logit_tokens[node - int(graph.nodes.ends()[0])]


def _cell(graph: AttributionGraph, position: int) -> str:
    """`1: 2,3` for the soft token of picture 1 in row 2 and column 3, all from 1."""
    picture, box = int(graph.image_index[position]), graph.patch_boxes[position]
    assert box is not None, f"position {position} is no soft token"
    images = zip(graph.patch_boxes, graph.image_index, strict=True)
    boxes = [patch for patch, image in images if patch is not None and image == picture]
    row = sorted({patch.top for patch in boxes}).index(box.top) + 1
    column = sorted({patch.left for patch in boxes}).index(box.left) + 1
    return f"{picture + 1}: {row},{column}"


def project(pruned: PrunedGraph, layout: Layout) -> dict[str, np.ndarray]:
    """Values of one graph at a layout's M nodes and E edges.

    From the whole graph `share`, `activation` (NaN where absent) `[M]`, `weights` and `edge_share` `[E]`, float64; from
    it and its pruning bool `present`, `kept` `[M]` and `edge_kept` `[E]`.
    """
    graph = pruned.graph
    number = np.array([layout.numbers.get(key, -1) for key in node_keys(graph, layout.match)], np.int64)
    flow = influence(graph, logit_weights(graph), counted(graph, pruned.bias))
    total = flow.nodes.sum() or 1.0
    inside = np.flatnonzero(number >= 0)
    m, e = len(layout.nodes), len(layout.edges)
    kept, present, edge_kept = np.zeros(m, bool), np.zeros(m, bool), np.zeros(e, bool)
    present[number[inside]] = True
    kept[number[inside[pruned.node_mask[inside]]]] = True
    activation = np.full(m, np.nan)
    shown = np.flatnonzero((number >= 0) & np.isin(graph.nodes.kind, (NodeKind.FEATURE, NodeKind.LOGIT)))
    np.fmax.at(activation, number[shown], graph.nodes.activation[shown].astype(np.float64))

    def find(targets: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the layout of edges between numbered nodes (-1: none), and a mask of the edges that it has."""
        codes = targets << _SHIFT | np.maximum(sources, 0)
        place = np.minimum(np.searchsorted(layout.edges, codes), max(e - 1, 0))
        return place, (targets >= 0) & (sources >= 0) & (layout.edges[place] == codes if e else False)

    weights, edge_share, per_edge = np.zeros(e), np.zeros(e), flow.per_edge / total
    for rows in row_blocks(graph, rows_of(graph, number >= 0)):
        signed, absolute = take_rows(graph, graph.weights, rows), absolute_rows(graph, rows)
        row = np.repeat(rows, np.diff(signed.indptr))
        place, hit = find(number[row], number[signed.indices])
        weights += np.bincount(place[hit], signed.data[hit], e)
        edge_share += np.bincount(place[hit], absolute.data[hit] * per_edge[row[hit]], e)
    edges = np.flatnonzero(pruned.edge_mask)
    place, hit = find(number[graph.targets_of(edges)], number[graph.indices[edges]])
    edge_kept[place[hit]] = True
    return {
        "share": np.bincount(number[inside], flow.nodes[inside], m) / total,
        "kept": kept,
        "present": present,
        "activation": activation,
        "weights": weights,
        "edge_share": edge_share,
        "edge_kept": edge_kept,
    }


def compare(
    first: PrunedGraph, second: PrunedGraph, names: Sequence[str] = ("first", "second"), match: str = "auto"
) -> GraphComparison:
    """Match two graphs by a rule; the weights of the first count as positive in the difference."""
    graphs = [first.graph, second.graph]
    _check_alike(first, second, names)
    union = Union(choose_match(match, graphs))
    union.add(first)
    union.add(second)
    layout = union.layout()
    parts = project(first, layout), project(second, layout)
    both: dict[str, Any] = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return GraphComparison(**layout.common(first.graph, names, [graph.prompt for graph in graphs]), **both)


def aggregate(
    graphs: Sequence[PrunedGraph | str | Path],
    names: Sequence[str] | None = None,
    match: str = "role",
    min_present: float = 0.0,
    each: Callable[[Iterator[PrunedGraph]], Iterator[PrunedGraph]] = iter,
) -> AggregateGraph:
    """Mean of many graphs, files or run folders.

    Graphs are read twice, one at a time, so that memory holds one and the result. What pruning kept in a smaller share
    of the graphs than `min_present` is left out. `each` wraps each of the two passes, for a progress bar; match=auto
    depends on the first two graphs.
    """
    if not graphs:
        raise UserError("no graphs to aggregate; give the folders of task=trace runs")
    if not 0.0 <= min_present <= 1.0:
        raise UserError(f"min_present={min_present}: it is a share of the graphs; choose a number between 0 and 1")

    def loaded(graph: PrunedGraph | str | Path) -> PrunedGraph:
        return graph if isinstance(graph, PrunedGraph) else load_graph(graph_file(graph))

    if names is None:
        numbered = enumerate(graphs, 1)
        names = [f"graph {n}" if isinstance(g, PrunedGraph) else graph_file(g).parent.name for n, g in numbered]
    head = [loaded(graph) for graph in graphs[:2]]
    union, prompts = Union(choose_match(match, [pruned.graph for pruned in head])), []
    for pruned, name in zip(each(map(loaded, graphs)), names, strict=True):
        _check_alike(head[0], pruned, (names[0], name))
        union.add(pruned)
        prompts.append(pruned.graph.prompt)
    # 0.07 * 100 is a little above 7 in floating point.
    layout = union.layout(max(1, int(np.ceil(min_present * len(graphs) - 1e-9))))
    sums: dict[str, Any] = {}
    for pruned in each(map(loaded, graphs)):
        part = project(pruned, layout)
        part |= {"activation": np.nan_to_num(part["activation"]), "absolute": np.abs(part["weights"])}
        sums = {name: values + sums.get(name, 0) for name, values in part.items()}
    return AggregateGraph(
        **layout.common(head[0].graph, names, prompts),
        share=sums["share"] / len(graphs),
        count=sums["kept"],
        present=sums["present"],
        activation=sums["activation"] / np.maximum(sums["present"], 1),
        weight=sums["weights"] / len(graphs),
        absolute=sums["absolute"] / len(graphs),
        edge_share=sums["edge_share"] / len(graphs),
        edge_count=sums["edge_kept"],
    )


def graph_file(place: str | Path) -> Path:
    """The graph file of a run folder, or the file itself."""
    path = Path(place)
    file = path / GRAPH_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"holds no {GRAPH_FILE}" if path.is_dir() else "is neither a run folder nor a file"
        raise UserError(f"{path} {what}; give the folder of a task=trace run")
    return file


def kept_by(merged: GraphComparison, kept: np.ndarray) -> str:
    """Which of the two graphs keeps a node or edge, from `kept [2]`."""
    return "both" if kept.all() else merged.names[0] if kept[0] else merged.names[1] if kept[1] else "neither"


def write_tables(folder: str | Path, merged: Merged, labels: Mapping[FeatureId, str] | None = None) -> None:
    """Write `nodes.csv` and `edges.csv`, the largest difference (of a comparison) or share (of a mean) first.

    With `labels` nodes have a last column `label`.
    """
    import pandas as pd

    table, where = merged.nodes, list(map(merged.where, range(len(merged.nodes))))
    names = list(map(table.name, range(len(table))))
    nodes: dict[str, Any] = {
        "node": names,
        "kind": [NodeKind(int(kind)).name.lower() for kind in table.kind],
        "where": where,
    }
    edges: dict[str, Any] = {
        "source": [names[node] for node in merged.sources],
        "source_where": [where[node] for node in merged.sources],
        "target": [names[node] for node in merged.targets],
        "target_where": [where[node] for node in merged.targets],
    }
    if isinstance(merged, GraphComparison):
        share, edge_share = merged.share[0] - merged.share[1], merged.edge_share[0] - merged.edge_share[1]
        nodes |= {"share_first": merged.share[0], "share_second": merged.share[1], "share_difference": share}
        nodes |= {"activation_first": merged.activation[0], "activation_second": merged.activation[1]}
        nodes["kept_by"] = [kept_by(merged, kept) for kept in merged.kept.T]
        edges |= {"weight_first": merged.weights[0], "weight_second": merged.weights[1]}
        edges |= {"difference": merged.difference}
        edges |= {"share_first": merged.edge_share[0], "share_second": merged.edge_share[1]}
        edges["kept_by"] = [kept_by(merged, kept) for kept in merged.edge_kept.T]
    else:
        share, edge_share, count = merged.share, merged.edge_share, merged.n_graphs
        nodes |= {"mean_share": share, "kept_in": merged.count, "present_in": merged.present, "graphs": count}
        nodes |= {"mean_activation": merged.activation}
        edges |= {"mean_weight": merged.weight, "mean_absolute": merged.absolute, "mean_share": edge_share}
        edges |= {"kept_in": merged.edge_count, "graphs": count}
    if labels:
        ids = map(FeatureId, table.layer.tolist(), table.index.tolist())
        is_feature = table.kind == NodeKind.FEATURE
        nodes["label"] = [labels.get(name, "") if known else "" for name, known in zip(ids, is_feature, strict=True)]
    for name, columns, size in (("nodes", nodes, share), ("edges", edges, edge_share)):
        rows = pd.DataFrame(columns).iloc[np.argsort(-np.abs(size), kind="stable")]
        write_text(Path(folder) / f"{name}.csv", rows.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
