"""Pruning a graph to what matters to its logits (Ameisen et al. 2025).

Nodes: the smallest set that reaches a share of the total influence; embeddings and logits stay. Edges: on the matrix
of the kept nodes, normalised anew, an edge scores `A_hat_ij (I_i + w_i)`; the smallest set that reaches a share
stays. Then, until nothing changes, go features, errors, biases and left-out nodes without an outgoing edge, and
features without an incoming one.
"""

from collections.abc import Iterator

import numpy as np

from vlmscope.attribution.influence import (
    Influence,
    absolute_rows,
    influence,
    logit_weights,
    row_blocks,
    rows_of,
    take_rows,
)
from vlmscope.attribution.scores import graph_scores
from vlmscope.attribution.shares import cumulative_share, find_cut, smallest_set
from vlmscope.attribution.storage import MEMORY, Memory
from vlmscope.core.graph import ENDS, AttributionGraph, NodeKind, PrunedGraph


def prune(
    graph: AttributionGraph, node_threshold: float = 0.8, edge_threshold: float = 0.98, storage: Memory = MEMORY
) -> PrunedGraph:
    """Mark the nodes and edges that matter.

    Args:
        graph: the whole graph.
        node_threshold: share of influence that the kept nodes reach.
        edge_threshold: share of edge influence that the kept edges reach.
        storage: where the mask of the edges goes.
    """
    weights = logit_weights(graph)
    flow = influence(graph, weights).nodes
    nodes = smallest_set(flow, node_threshold) | np.isin(graph.nodes.kind, (NodeKind.TOKEN, *ENDS))
    edges = _edges_of(graph, nodes, influence(graph, weights, nodes), edge_threshold, storage)
    alive = nodes & ~_dead_ends(graph, nodes, edges)
    _drop_edges(graph, nodes, alive, edges)
    return PrunedGraph(
        graph=graph,
        node_mask=alive,
        edge_mask=edges,
        influence=flow,
        cumulative=cumulative_share(flow),
        scores=graph_scores(graph, flow),
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
    )


def _edges_of(graph: AttributionGraph, nodes: np.ndarray, flow: Influence, share: float, storage: Memory) -> np.ndarray:
    """`[E]` bool: the fewest edges among `nodes` that carry `share` of what all edges among them carry."""
    rows = rows_of(graph, nodes)
    inside = nodes.astype(np.float64)

    def scores() -> Iterator[np.ndarray]:
        for block in row_blocks(graph, rows):
            edges = absolute_rows(graph, block)
            yield edges.data * inside[edges.indices] * np.repeat(flow.per_edge[block], np.diff(edges.indptr))

    counts = np.diff(graph.indptr)[rows]
    cut = find_cut(scores, int(counts.sum()), share)
    mask, ties = storage.zeros(graph.n_edges, bool), cut.ties
    for block, values in zip(row_blocks(graph, rows), scores(), strict=True):
        kept = values > cut.value
        if ties:
            equal = np.flatnonzero(values == cut.value)[:ties]
            kept[equal] = True
            ties -= len(equal)
        mask[_places(graph, block)] = kept
    return mask


def _places(graph: AttributionGraph, rows: np.ndarray) -> np.ndarray:
    """The edge numbers of some rows, one after another, int64."""
    counts = np.diff(graph.indptr)[rows]
    return np.arange(counts.sum()) + np.repeat(graph.indptr[rows] - np.cumsum(counts) + counts, counts)


def _dead_ends(graph: AttributionGraph, nodes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """`[N]` bool: which `nodes` go when those without a needed edge go until nothing changes.

    A node that went because nothing enters it leaves no source with an edge less, and one that went because nothing
    leaves it no target. So the two kinds of dead ends do not meet, and one sweep upwards and one downwards find them.
    """
    rows = rows_of(graph, nodes)
    blocks = list(row_blocks(graph, rows, by_level=True))
    entered = nodes & (graph.nodes.kind != NodeKind.FEATURE)
    left = nodes & np.isin(graph.nodes.kind, (NodeKind.TOKEN, *ENDS))
    for block in blocks:
        entered[block] |= nodes[block] & (take_rows(graph, edges, block) @ entered)
    for block in reversed(blocks):
        left |= nodes & (left[block] @ take_rows(graph, edges, block))
    return nodes & ~(entered & left)


def _drop_edges(graph: AttributionGraph, nodes: np.ndarray, alive: np.ndarray, edges: np.ndarray) -> None:
    """Clear in `edges [E]` those that lost an end, in place."""
    if (alive == nodes).all():
        return
    for block in row_blocks(graph, rows_of(graph, nodes)):
        taken = take_rows(graph, edges, block)
        edges[_places(graph, block)] = (
            taken.data & alive[taken.indices] & np.repeat(alive[block], np.diff(taken.indptr))
        )


def reaches_image(pruned: PrunedGraph, logit: int) -> bool:
    """Whether kept edges lead back from a logit, or what else the graph explains, to a soft token.

    Args:
        pruned: the pruned graph.
        logit: its node number.

    Raises:
        ValueError: when the node is none that the graph explains.
    """
    graph = pruned.graph
    if graph.nodes.kind[logit] not in ENDS:
        raise ValueError(f"node {logit} is no logit")
    reached = np.zeros(graph.n_nodes, dtype=bool)
    reached[logit] = True
    # Sources come before their targets, so one pass downwards visits every path.
    for node in range(logit, -1, -1):
        if reached[node]:
            row = slice(graph.indptr[node], graph.indptr[node + 1])
            reached[graph.indices[row][pruned.edge_mask[row]]] = True
    tokens = graph.nodes.of(NodeKind.TOKEN)
    return bool((reached[tokens] & graph.is_image[graph.nodes.position[tokens]]).any())
