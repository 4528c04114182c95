"""Pruning a graph to what matters to its logits (Ameisen et al. 2025).

Nodes: the smallest set that reaches a share of the total influence; embeddings and logits stay. Edges: on the matrix
of the kept nodes, normalised anew, an edge scores `A_hat_ij (I_i + w_i)`; the smallest set that reaches a share
stays. Then, until nothing changes, go features, errors, biases and left-out nodes without an outgoing edge, and
features without an incoming one.
"""

import numpy as np

from vlmscope.attribution.influence import absolute_edges, influence, logit_weights, normalise
from vlmscope.attribution.scores import graph_scores
from vlmscope.core.graph import AttributionGraph, NodeKind, PrunedGraph


def smallest_set(values: np.ndarray, share: float) -> np.ndarray:
    """Mask of the fewest `values [n]` (>= 0) whose sum reaches `share` of the total; of equals, the first come
    first.
    """
    mask = np.zeros(len(values), dtype=bool)
    # Zeros never matter; most edges lie outside the kept nodes, so this also keeps the sort short.
    positive = np.flatnonzero(values > 0)
    order = positive[np.argsort(-values[positive], kind="stable")]
    needed = len(order)
    # A share of 1 would stop early by rounding.
    if share < 1.0 and needed:
        cumulative = np.cumsum(values[order])
        needed = int(np.searchsorted(cumulative, share * cumulative[-1])) + 1
    mask[order[:needed]] = True
    return mask


def cumulative_share(values: np.ndarray) -> np.ndarray:
    """For each of `values [n]` the share of the total held by it and all before it in descending order."""
    order = np.argsort(-values, kind="stable")
    sums = np.cumsum(values[order])
    out = np.empty(len(values))
    out[order] = sums / sums[-1] if len(sums) and sums[-1] > 0 else 1.0
    return out


def prune(graph: AttributionGraph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PrunedGraph:
    """Mark the nodes and edges that matter.

    Args:
        graph: the whole graph.
        node_threshold: share of influence that the kept nodes reach.
        edge_threshold: share of edge influence that the kept edges reach.
    """
    absolute, weights = absolute_edges(graph), logit_weights(graph)
    normalised = normalise(graph, absolute)
    flow = influence(graph, normalised, weights)
    always = np.isin(graph.nodes.kind, (NodeKind.TOKEN, NodeKind.LOGIT))
    nodes = smallest_set(flow, node_threshold) | always

    targets = graph.edge_targets()
    inside = nodes[targets] & nodes[graph.indices]
    again = normalise(graph, absolute * inside)
    edge_scores = again * (influence(graph, again, weights) + weights)[targets]
    edges = smallest_set(edge_scores, edge_threshold)
    nodes, edges = _clean(graph, nodes, edges, targets)
    return PrunedGraph(
        graph=graph,
        node_mask=nodes,
        edge_mask=edges,
        influence=flow,
        cumulative=cumulative_share(flow),
        scores=graph_scores(graph, normalised, flow),
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
    )


def _clean(
    graph: AttributionGraph, nodes: np.ndarray, edges: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Drop dead ends until none is left."""
    kind = graph.nodes.kind
    needs_out = ~np.isin(kind, (NodeKind.TOKEN, NodeKind.LOGIT))
    needs_in = kind == NodeKind.FEATURE
    while True:
        has_out = np.bincount(graph.indices[edges], minlength=graph.n_nodes) > 0
        has_in = np.bincount(targets[edges], minlength=graph.n_nodes) > 0
        kept = nodes & (has_out | ~needs_out) & (has_in | ~needs_in)
        if (kept == nodes).all():
            return nodes, edges
        nodes, edges = kept, edges & kept[targets] & kept[graph.indices]


def reaches_image(pruned: PrunedGraph, logit: int) -> bool:
    """Whether kept edges lead back from a logit node to a soft token.

    Args:
        pruned: the pruned graph.
        logit: node number of the logit.

    Raises:
        ValueError: when the node is no logit.
    """
    graph = pruned.graph
    if graph.nodes.kind[logit] != NodeKind.LOGIT:
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
