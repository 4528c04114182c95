"""Graphs laid on one another: which nodes and edges there are in all, and what one graph has of them.

Edges are told apart by one integer made of the numbers of their ends. Only the edges between nodes of the union are
looked at, a block of rows at a time, so that whole graphs of many millions of edges need no second copy.
"""

from dataclasses import dataclass

import numpy as np

from vlmscope.attribution.influence import absolute_rows, influence, logit_weights, row_blocks, rows_of, take_rows
from vlmscope.attribution.matching import Columns, NodeKey, node_keys
from vlmscope.core.graph import AttributionGraph, NodeKind, PrunedGraph
from vlmscope.core.merged import MatchedNodes

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
