"""Influence of nodes on the logits (Ameisen et al. 2025).

With `A_hat = |A| / row sum` and w the probabilities of the logit nodes, `I = w A_hat + w A_hat^2 + ...`. A row's sum
counts every source: biases, errors, and the features that were left out of the graph. Sources come before their
targets, so a node's influence is complete once all rows above it have handed theirs down: one sweep over the rows,
from the last to the first, gives the whole series. |A| is made a block of rows at a time and never kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vlmscope.core.graph import AttributionGraph, NodeKind

# Edges at once: enough that the work on a block outweighs making it; copies of it take some 20 MB.
BLOCK = 1 << 19


@dataclass(frozen=True)
class Influence:
    """What reaches the nodes from the logits.

    Attributes:
        nodes: I, `[N]` float64.
        per_edge: `[N]` float64, `(I_i + w_i) / row sum`: times |edge|, the influence that row i hands to a source;
            0 for rows that hand down nothing.
    """

    nodes: np.ndarray
    per_edge: np.ndarray


def logit_weights(graph: AttributionGraph) -> np.ndarray:
    """w: `[N]` float64, what the ends are worth (the logits' probabilities, mostly) at their nodes, 0 elsewhere."""
    weights = np.zeros(graph.n_nodes)
    weights[graph.nodes.ends()] = graph.end_weights
    return weights


def influence(graph: AttributionGraph, weights: np.ndarray, inside: np.ndarray | None = None) -> Influence:
    """I from w `[N]`, exact, not cut off.

    Args:
        graph: the graph.
        weights: what each node is worth to begin with.
        inside: `[N]` bool, the nodes to which the graph is cut before its rows are normalised; all if not given.

    Raises:
        AssertionError: a row has a source that does not come before it.
    """
    nodes, per_edge = np.zeros(graph.n_nodes), np.zeros(graph.n_nodes)
    for rows in reversed(list(row_blocks(graph, rows_of(graph, inside), by_level=True))):
        edges = absolute_rows(graph, rows)
        sums = edges @ (np.ones(graph.n_nodes) if inside is None else inside.astype(np.float64))
        per_edge[rows] = (nodes[rows] + weights[rows]) / np.where(sums > 0, sums, np.inf)
        nodes += per_edge[rows] @ edges
    if inside is not None:
        nodes[~inside] = 0.0
    return Influence(nodes, per_edge)


def rows_of(graph: AttributionGraph, inside: np.ndarray | None = None) -> np.ndarray:
    """The nodes that have edges into them (and are `inside [N]`), ascending, int64."""
    owns = np.diff(graph.indptr) > 0
    return np.flatnonzero(owns if inside is None else owns & inside)


def row_blocks(graph: AttributionGraph, rows: np.ndarray, by_level: bool = False) -> Iterator[np.ndarray]:
    """Cut ascending `rows`, all with edges, into blocks of limited size, at least a row each.

    Args:
        graph: the graph.
        rows: the rows.
        by_level: also cut so that no row is a source of another in its block.

    Raises:
        AssertionError: `by_level`, and a row has a source that does not come before it.
    """
    edges = np.concatenate([[0], np.cumsum(np.diff(graph.indptr)[rows])])
    # Indices ascend in a row, so its last one says how high its sources reach.
    reach = np.maximum.accumulate(graph.indices[graph.indptr[rows + 1] - 1]) if by_level else np.empty(0)
    start = 0
    while start < len(rows):
        stop = int(np.searchsorted(edges, edges[start] + BLOCK, side="right")) - 1
        if by_level:
            level = int(np.searchsorted(reach, rows[start]))
            assert level > start, f"row {rows[start]} has a source that does not come before it: not a graph of layers"
            stop = min(stop, level)
        stop = max(stop, start + 1)
        yield rows[start:stop]
        start = stop


def absolute_rows(graph: AttributionGraph, rows: np.ndarray) -> sparse.csr_matrix:
    """|edge| of some rows, `[rows, N]` float64; for a LEFT_OUT source the sum over its features, not that of their
    sum.
    """
    block = take_rows(graph, graph.weights, rows)
    absolute = np.abs(block.data).astype(np.float64)
    if graph.left_out_mass.shape[1]:
        rest = np.flatnonzero(graph.nodes.kind[block.indices] == NodeKind.LEFT_OUT)
        row = rows[np.searchsorted(block.indptr, rest, side="right") - 1]
        absolute[rest] = graph.left_out_mass[row, graph.nodes.layer[block.indices[rest]]]
    return sparse.csr_matrix((absolute, block.indices, block.indptr), shape=block.shape)


def take_rows(graph: AttributionGraph, values: np.ndarray, rows: np.ndarray) -> sparse.csr_matrix:
    """Some ascending rows of the graph with `values [E]` for weights, `[rows, N]`; to be read only.

    Nothing but these rows is read, so that edges may lie in a file.
    """
    first, last = rows[0], rows[-1]
    stretch = slice(graph.indptr[first], graph.indptr[last + 1])
    starts = graph.indptr[rows] - graph.indptr[first]
    counts = graph.indptr[rows + 1] - graph.indptr[rows]
    begins = np.concatenate([[0], np.cumsum(counts)])
    data, indices = values[stretch], graph.indices[stretch]
    if begins[-1] < len(indices):
        # Not by scipy, which copies a stretch whole when it is the smaller part of an array.
        places = np.arange(begins[-1]) + np.repeat(starts - begins[:-1], counts)
        data, indices = data[places], indices[places]
    return sparse.csr_matrix((data, indices, begins), shape=(len(rows), graph.n_nodes))
