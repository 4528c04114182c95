"""Several graphs of one model laid on one another: matching nodes, merging, comparing, averaging.

When nodes of two graphs of one model are the same node.

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

Graphs laid on one another: which nodes and edges there are in all, and what one graph has of them.

An edge is one integer made of the numbers of its two ends. Only the edges between nodes of the union are
looked at, a block of rows at a time, so that whole graphs of many millions of edges need no second copy.

Intersection and difference of two graphs, and the mean of many (rules of matching: `vlmscope.attribution.compare`).

What counts is what pruning kept in at least one graph; its weights and shares are read from the whole graphs, so that a
node which just missed the cut of one is not taken for absent there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlmscope.attribution.export import load_graph
from vlmscope.attribution.influence import absolute_rows, influence, logit_weights, row_blocks, rows_of, take_rows
from vlmscope.core.errors import UserError
from vlmscope.core.graph import (
    ENDS,
    AggregateGraph,
    AttributionGraph,
    GraphComparison,
    MatchedNodes,
    NodeKind,
    PrunedGraph,
)

MATCHES = ("position", "from_end", "role", "feature")
_ANYWHERE = "any position"
_ORDER = {kind: at for at, kind in enumerate((0, 3, 1, 2, 5, 4, 6))}  # of the node table of one graph


class NodeKey(NamedTuple):
    """What makes a node the same; `place` is a position, a role, or None for a node that stands nowhere.

    `token` is a feature's index or a token's id, `image` and `box` are of a soft token, `label` of an end.
    """

    layer: int
    kind: int
    place: int | str | None
    token: int
    image: int
    box: tuple[float, ...]
    label: str


def choose_match(match: str, graphs: Sequence[AttributionGraph]) -> str:
    """`match`, or what `auto` stands for with these graphs.

    Raises:
        UserError: no such rule.
    """
    if match not in ("auto", *MATCHES):
        raise UserError(f"match={match}: no such rule; choose one of auto, {', '.join(MATCHES)}")
    if match != "auto":
        return match
    first = graphs[0].is_image
    same = all(len(g.is_image) == len(first) and (g.is_image == first).all() for g in graphs)
    return "position" if same else "role"


def check_same_model(graphs: Sequence[AttributionGraph], names: Sequence[str]) -> None:
    """Refuse graphs of different models: their features have nothing in common.

    Raises:
        UserError: which two graphs, and of which models.
    """
    first = _model(graphs[0])
    for graph, name in zip(graphs, names, strict=True):
        if _model(graph) != first:
            raise UserError(
                f"{names[0]} is a graph of {_words(graphs[0])}, {name} of {_words(graph)}: "
                "features of two models are not the same; give graphs of one"
            )


def _model(graph: AttributionGraph) -> tuple[str, int]:
    return str(graph.meta.get("model", "")), graph.n_layers


def _words(graph: AttributionGraph) -> str:
    return f"{graph.meta.get('model') or 'a model without a name'} ({graph.n_layers} layers)"


def node_keys(graph: AttributionGraph, match: str) -> list[NodeKey]:
    """The key of every node, in order."""
    nodes, places = graph.nodes, _places(graph, match)
    ends = nodes.ends()
    names = {int(node): text for node, text in zip(ends, graph.logit_tokens, strict=True)}
    spread = len(np.unique(nodes.position[ends])) > 1
    columns = (nodes.kind.tolist(), nodes.layer.tolist(), nodes.position.tolist(), nodes.index.tolist())
    return [
        _key(graph, places, NodeKind(kind), layer, position, index, names.get(node, ""), spread)
        for node, (kind, layer, position, index) in enumerate(zip(*columns, strict=True))
    ]


def _key(
    graph: AttributionGraph,
    places: list[int | str],
    kind: NodeKind,
    layer: int,
    position: int,
    index: int,
    name: str,
    spread: bool,
) -> NodeKey:
    place = places[position] if position >= 0 else None
    match kind:
        case NodeKind.TOKEN:
            box = graph.patch_boxes[position]
            if box is not None:
                # A soft token's place only says where it is drawn: equal cells match wherever the picture stands.
                rounded = tuple(round(float(edge), 6) for edge in box)
                return NodeKey(layer, kind, None, -1, int(graph.image_index[position]), rounded, "")
            return NodeKey(layer, kind, place, index, -1, (), "")
        case NodeKind.FEATURE:
            return NodeKey(layer, kind, place, index, -1, (), "")
        case NodeKind.ERROR:
            return NodeKey(layer, kind, place, -1, -1, (), "")
        case NodeKind.LOGIT:
            return NodeKey(layer, kind, place if spread else None, index, -1, (), name)
        case NodeKind.TARGET:
            # The name of a feature that is explained says where it fires; that may differ between prompts.
            return NodeKey(layer, kind, None, index, -1, (), name if index < 0 else "")
        case _:
            return NodeKey(layer, kind, None, -1, -1, (), "")


def _places(graph: AttributionGraph, match: str) -> list[int | str]:
    count = len(graph.tokens)
    match match:
        case "position":
            return list(range(count))
        case "from_end":
            return list(range(-count, 0))
        case "role":
            return [str(role) for role in graph.roles]
        case _:
            return [_ANYWHERE] * count


class Columns:
    """The places of several graphs in order, with what stands there; soft tokens and logits stand where first seen."""

    def __init__(self, match: str) -> None:
        self.match = match
        self.texts: dict[int | str, list[str]] = {}
        self.image: dict[int | str, bool] = {}
        self.soft: dict[tuple[int, tuple[float, ...]], int | str] = {}
        self.ends: dict[tuple[int, str], int | str] = {}
        self.names: dict[int, str] = {}  # of features that are explained, by index
        self.words: dict[int, str] = {}  # token id -> string

    def add(self, graph: AttributionGraph) -> None:
        """Take in the places of a graph."""
        places = _places(graph, self.match)
        for position, place in enumerate(places):
            box = graph.patch_boxes[position]
            text = graph.tokens[position] if box is None else soft_name(graph, position)
            seen = self.texts.setdefault(place, [])
            if text not in seen and isinstance(place, int):
                seen.append(text)
            self.image[place] = self.image.get(place, True) and bool(graph.is_image[position])
            if box is not None:
                where = int(graph.image_index[position]), tuple(round(float(edge), 6) for edge in box)
                self.soft.setdefault(where, place)
        nodes = graph.nodes
        for node, text in zip(nodes.ends(), graph.logit_tokens, strict=True):
            index, named = int(nodes.index[node]), nodes.kind[node] == NodeKind.LOGIT or nodes.index[node] < 0
            self.ends.setdefault((index, text if named else ""), places[int(nodes.position[node])])
            if not named:
                self.names.setdefault(index, text)
        for node in nodes.of(NodeKind.TOKEN):
            self.words.setdefault(int(nodes.index[node]), graph.tokens[int(nodes.position[node])])

    def order(self) -> list[int | str]:
        """The places from left to right: positions by number, roles as first met."""
        return sorted(self.texts) if self.match in ("position", "from_end") else list(self.texts)  # type: ignore[type-var]

    def labels(self) -> list[str]:
        """What is written at each place: the tokens of the graphs, or the role."""
        return [" | ".join(self.texts[place]) if isinstance(place, int) else place for place in self.order()]

    def is_image(self) -> np.ndarray:
        """`[C]` bool, places where only soft tokens stand."""
        return np.array([self.image[place] for place in self.order()], dtype=bool)

    def place(self, key: NodeKey) -> int | str | None:
        """Where a node is drawn."""
        if key.kind in ENDS and key.place is None:
            return self.ends[key.token, key.label]
        return self.soft[key.image, key.box] if key.image >= 0 else key.place

    def table(self, keys: Iterable[NodeKey]) -> tuple[MatchedNodes, np.ndarray]:
        """The node table of some keys, sources before targets, and the order: row i is the `order[i]`-th key."""
        number: dict[int | str | None, int] = {place: at for at, place in enumerate(self.order())} | {None: -1}
        given = list(keys)
        at = [number[self.place(key)] for key in given]
        rank = [
            (key.layer, _ORDER[key.kind], at[i], key.token, key.image, _row_major(key.box), key.label)
            for i, key in enumerate(given)
        ]
        order = np.array(sorted(range(len(given)), key=rank.__getitem__), dtype=np.int64)
        chosen = [given[i] for i in order]
        nodes = MatchedNodes(
            kind=np.array([key.kind for key in chosen], np.int8),
            layer=np.array([key.layer for key in chosen], np.int16),
            position=np.array([at[i] for i in order], np.int32),
            index=np.array([key.token for key in chosen], np.int64),
            image=np.array([key.image for key in chosen], np.int64),
            box=np.array([key.box or (np.nan,) * 4 for key in chosen], np.float64).reshape(-1, 4),
            label=[self._label(key) for key in chosen],
        )
        return nodes, order

    def _label(self, key: NodeKey) -> str:
        match NodeKind(key.kind):
            case NodeKind.TOKEN if key.image >= 0:
                left, top, right, bottom = key.box
                return f"picture {key.image + 1} at {(left + right) / 2:.0%}, {(top + bottom) / 2:.0%}"
            case NodeKind.TOKEN:
                return f'"{self.words[key.token]}"'
            case NodeKind.FEATURE:
                return f"feature {key.token} of layer {key.layer}"
            case NodeKind.ERROR:
                return f"error L{key.layer}"
            case NodeKind.BIAS:
                return f"bias L{key.layer}"
            case NodeKind.LEFT_OUT:
                return f"left out L{key.layer}"
            case _:
                return key.label or self.names[key.token]


def _row_major(box: tuple[float, ...]) -> tuple[float, ...]:
    return (box[1], box[0]) if box else ()


def soft_name(graph: AttributionGraph, position: int) -> str:
    """`1: 2,3` for the soft token of picture 1 in row 2 and column 3, all from 1."""
    picture, box = int(graph.image_index[position]), graph.patch_boxes[position]
    assert box is not None, f"position {position} is no soft token"
    boxes = [b for b, at in zip(graph.patch_boxes, graph.image_index, strict=True) if b is not None and at == picture]
    row = sorted({b.top for b in boxes}).index(box.top) + 1
    column = sorted({b.left for b in boxes}).index(box.left) + 1
    return f"{picture + 1}: {row},{column}"


_SHIFT = 32  # an edge is `target << 32 | source`


@dataclass(frozen=True)
class Layout:
    """The nodes and edges that remain; `numbers` gives a node's row, `edges [E]` the sorted edge integers."""

    match: str
    nodes: MatchedNodes
    numbers: dict[NodeKey, int]
    edges: np.ndarray
    columns: list[str]
    column_is_image: np.ndarray

    @property
    def sources(self) -> np.ndarray:
        """`[E]` int32."""
        return (self.edges & ((1 << _SHIFT) - 1)).astype(np.int32)

    @property
    def targets(self) -> np.ndarray:
        """`[E]` int32."""
        return (self.edges >> _SHIFT).astype(np.int32)


class Union:
    """The kept nodes and edges of graphs that are added one after another, and how many graphs keep each."""

    def __init__(self, match: str) -> None:
        self.match = match
        self._columns = Columns(match)
        self._numbers: dict[NodeKey, int] = {}
        self._counts: list[int] = []
        self._edges = np.empty(0, np.int64)
        self._edge_counts = np.empty(0, np.int64)
        self.n_graphs = 0

    def add(self, pruned: PrunedGraph) -> None:
        """Take in what pruning kept of a graph."""
        graph = pruned.graph
        self.n_graphs += 1
        self._columns.add(graph)
        keys = node_keys(graph, self.match)
        number = np.full(graph.n_nodes, -1, np.int64)
        for node in np.flatnonzero(pruned.node_mask).tolist():
            number[node] = self._numbers.setdefault(keys[node], len(self._numbers))
        self._counts += [0] * (len(self._numbers) - len(self._counts))
        for node in set(number[number >= 0].tolist()):
            self._counts[node] += 1
        kept = np.flatnonzero(pruned.edge_mask)
        found = np.unique(number[graph.targets_of(kept)] << _SHIFT | number[graph.indices[kept]])
        edges, inverse = np.unique(np.concatenate([self._edges, found]), return_inverse=True)
        counted = np.concatenate([self._edge_counts, np.ones(len(found), np.int64)])
        self._edges, self._edge_counts = edges, np.bincount(inverse, counted, len(edges)).astype(np.int64)

    def layout(self, min_count: int = 1) -> Layout:
        """What at least `min_count` graphs keep; an edge needs both of its ends."""
        keys = [key for key, number in self._numbers.items() if self._counts[number] >= min_count]
        nodes, order = self._columns.table(keys)
        numbers = {keys[old]: new for new, old in enumerate(order.tolist())}
        renamed = np.full(len(self._numbers), -1, np.int64)
        for key, new in numbers.items():
            renamed[self._numbers[key]] = new
        often = self._edges[self._edge_counts >= min_count]
        targets, sources = renamed[often >> _SHIFT], renamed[often & ((1 << _SHIFT) - 1)]
        inside = (targets >= 0) & (sources >= 0)
        edges = np.sort(targets[inside] << _SHIFT | sources[inside])
        return Layout(self.match, nodes, numbers, edges, self._columns.labels(), self._columns.is_image())


@dataclass(frozen=True)
class Projection:
    """What one graph has of a layout's M nodes and E edges.

    `share [M]`, `weight [E]` and `edge_share [E]` are float64 and of the whole graph; `kept [M]`, `edge_kept [E]` and
    `present [M]` bool; `activation [M]` float64, NaN where absent.
    """

    share: np.ndarray
    kept: np.ndarray
    present: np.ndarray
    activation: np.ndarray
    weight: np.ndarray
    edge_share: np.ndarray
    edge_kept: np.ndarray


def project(pruned: PrunedGraph, layout: Layout) -> Projection:
    """Find a graph's part of a layout."""
    graph = pruned.graph
    number = np.array([layout.numbers.get(key, -1) for key in node_keys(graph, layout.match)], np.int64)
    flow = influence(graph, logit_weights(graph))
    total = flow.nodes.sum() or 1.0
    inside = np.flatnonzero(number >= 0)
    count = len(layout.nodes)
    share = np.bincount(number[inside], flow.nodes[inside], count) / total
    kept, present = np.zeros(count, bool), np.zeros(count, bool)
    present[number[inside]] = True
    kept[number[inside[pruned.node_mask[inside]]]] = True
    weight, edge_share = _edges(graph, layout, number, flow.per_edge / total)
    edges = np.flatnonzero(pruned.edge_mask)
    targets, sources = number[graph.targets_of(edges)], number[graph.indices[edges]]
    at, hit = _find(layout.edges, targets, sources)
    edge_kept = np.zeros(len(layout.edges), bool)
    edge_kept[at[hit]] = True
    return Projection(share, kept, present, _activations(graph, number, count), weight, edge_share, edge_kept)


def _find(edges: np.ndarray, targets: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where edges between numbered nodes stand among `edges`, and which are there; a number of -1 is nowhere."""
    wanted = targets << _SHIFT | np.maximum(sources, 0)
    at = np.minimum(np.searchsorted(edges, wanted), max(len(edges) - 1, 0))
    if len(edges) == 0:
        return at, np.zeros(len(wanted), bool)
    return at, (edges[at] == wanted) & (targets >= 0) & (sources >= 0)


def _edges(
    graph: AttributionGraph, layout: Layout, number: np.ndarray, per_edge: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and share of the layout's edges in a whole graph, `[E]` each."""
    weight, share = np.zeros(len(layout.edges)), np.zeros(len(layout.edges))
    for rows in row_blocks(graph, rows_of(graph, number >= 0)):
        signed, absolute = take_rows(graph, graph.weights, rows), absolute_rows(graph, rows)
        row = np.repeat(rows, np.diff(signed.indptr))
        at, hit = _find(layout.edges, number[row], number[signed.indices])
        weight += np.bincount(at[hit], signed.data[hit], len(layout.edges))
        share += np.bincount(at[hit], absolute.data[hit] * per_edge[row[hit]], len(layout.edges))
    return weight, share


def _activations(graph: AttributionGraph, number: np.ndarray, count: int) -> np.ndarray:
    out = np.full(count, np.nan)
    shown = np.flatnonzero((number >= 0) & np.isin(graph.nodes.kind, (NodeKind.FEATURE, NodeKind.LOGIT)))
    np.fmax.at(out, number[shown], graph.nodes.activation[shown].astype(np.float64))
    return out


GRAPH_FILE = "graph.safetensors"


def graph_file(place: str | Path) -> Path:
    """The graph's file in a run folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    found = path / GRAPH_FILE if path.is_dir() else path
    if not found.is_file():
        what = f"holds no {GRAPH_FILE}" if path.is_dir() else "is neither a run folder nor a file"
        raise UserError(f"{path} {what}; give the folder of a task=trace run")
    return found


def compare(
    first: PrunedGraph, second: PrunedGraph, names: Sequence[str] = ("first", "second"), match: str = "auto"
) -> GraphComparison:
    """Match two graphs and set them against each other.

    Args:
        first: the graph whose weights count as positive in the difference.
        second: the other.
        names: what to call them.
        match: when nodes are the same: auto, position, from_end, role or feature.

    Raises:
        UserError: the graphs are of different models, or there is no such rule.
    """
    both = (first, second)
    check_same_model([pruned.graph for pruned in both], names)
    union = Union(choose_match(match, [pruned.graph for pruned in both]))
    for pruned in both:
        union.add(pruned)
    layout = union.layout()
    a, b = (project(pruned, layout) for pruned in both)
    return GraphComparison(
        **_common(layout, first, list(names), [pruned.graph.prompt for pruned in both]),
        share=np.stack([a.share, b.share]),
        kept=np.stack([a.kept, b.kept]),
        present=np.stack([a.present, b.present]),
        activation=np.stack([a.activation, b.activation]),
        weights=np.stack([a.weight, b.weight]),
        edge_share=np.stack([a.edge_share, b.edge_share]),
        edge_kept=np.stack([a.edge_kept, b.edge_kept]),
    )


def aggregate(
    graphs: Sequence[PrunedGraph | str | Path],
    names: Sequence[str] | None = None,
    match: str = "role",
    min_present: float = 0.0,
    each: Callable[[Iterator[PrunedGraph]], Iterator[PrunedGraph]] = iter,
) -> AggregateGraph:
    """Mean of many graphs. They are read twice, one at a time, so that memory holds one and the result.

    Args:
        graphs: graphs, files or run folders.
        names: of the graphs; those of files' folders, else numbers.
        match: when nodes are the same: position, from_end, role or feature; auto looks at the first two.
        min_present: nodes and edges that pruning kept in a smaller share of the graphs are left out.
        each: wraps each of the two passes, for a progress bar.

    Raises:
        UserError: no graphs, graphs of different models, a file that is none, or a setting that makes no sense.
    """
    if not graphs:
        raise UserError("no graphs to aggregate; give the folders of task=trace runs")
    if not 0.0 <= min_present <= 1.0:
        raise UserError(f"min_present={min_present}: it is a share of the graphs; choose a number between 0 and 1")
    names = list(names) if names is not None else [_name(place, at) for at, place in enumerate(graphs)]
    head = [_loaded(place) for place in graphs[:2]]
    union, prompts = Union(choose_match(match, [pruned.graph for pruned in head])), []
    for pruned, name in zip(each(map(_loaded, graphs)), names, strict=True):
        check_same_model([head[0].graph, pruned.graph], [names[0], name])
        union.add(pruned)
        prompts.append(pruned.graph.prompt)
    layout = union.layout(max(1, int(np.ceil(min_present * len(graphs) - 1e-9))))
    sums = _Sums(layout)
    for pruned in each(map(_loaded, graphs)):
        sums.add(project(pruned, layout))
    return sums.mean(_common(layout, head[0], names, prompts))


class _Sums:
    """Running sums of projections onto one layout."""

    def __init__(self, layout: Layout) -> None:
        nodes, edges = len(layout.nodes), len(layout.edges)
        self.share, self.activation = np.zeros(nodes), np.zeros(nodes)
        self.count, self.present = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
        self.weight, self.absolute, self.edge_share = np.zeros(edges), np.zeros(edges), np.zeros(edges)
        self.edge_count = np.zeros(edges, np.int64)

    def add(self, one: Projection) -> None:
        self.share += one.share
        self.count += one.kept
        self.present += one.present
        self.activation += np.nan_to_num(one.activation)
        self.weight += one.weight
        self.absolute += np.abs(one.weight)
        self.edge_share += one.edge_share
        self.edge_count += one.edge_kept

    def mean(self, common: dict) -> AggregateGraph:
        n_graphs = len(common["names"])
        return AggregateGraph(
            **common,
            share=self.share / n_graphs,
            count=self.count,
            present=self.present,
            activation=self.activation / np.maximum(self.present, 1),
            weight=self.weight / n_graphs,
            absolute=self.absolute / n_graphs,
            edge_share=self.edge_share / n_graphs,
            edge_count=self.edge_count,
        )


def _common(layout: Layout, first: PrunedGraph, names: list[str], prompts: list[str]) -> dict:
    return {
        "nodes": layout.nodes,
        "columns": layout.columns,
        "column_is_image": layout.column_is_image,
        "sources": layout.sources,
        "targets": layout.targets,
        "match": layout.match,
        "n_layers": first.graph.n_layers,
        "model": str(first.graph.meta.get("model", "")),
        "names": names,
        "prompts": prompts,
    }


def _loaded(place: PrunedGraph | str | Path) -> PrunedGraph:
    return place if isinstance(place, PrunedGraph) else load_graph(graph_file(place))


def _name(place: PrunedGraph | str | Path, number: int) -> str:
    return f"graph {number + 1}" if isinstance(place, PrunedGraph) else graph_file(place).parent.name
