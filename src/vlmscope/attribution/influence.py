"""Influence of nodes on the logits (Ameisen et al. 2025).

With `A_hat = |A| / row sum` and w the probabilities of the logit nodes, `I = w A_hat + w A_hat^2 + ...`. A row's sum
counts every source: biases, errors, and the features that were left out of the graph. Edges only lead upwards through
the layers, so the series ends by itself after at most L + 1 terms.
"""

import numpy as np
from scipy import sparse

from vlmscope.core.graph import AttributionGraph, NodeKind


def absolute_edges(graph: AttributionGraph) -> np.ndarray:
    """|edge| of every edge, `[E]` float64; for a LEFT_OUT source the sum over its features, not that of their sum."""
    absolute = np.abs(graph.weights).astype(np.float64)
    if graph.left_out_mass.shape[1]:
        rest = np.flatnonzero(graph.nodes.kind[graph.indices] == NodeKind.LEFT_OUT)
        layer = graph.nodes.layer[graph.indices[rest]]
        absolute[rest] = graph.left_out_mass[graph.edge_targets()[rest], layer]
    return absolute


def normalise(graph: AttributionGraph, absolute: np.ndarray) -> np.ndarray:
    """`absolute [E]` divided by its row sums; rows of zeros stay zero."""
    target = graph.edge_targets()
    sums = np.bincount(target, weights=absolute, minlength=graph.n_nodes)
    return absolute / np.where(sums > 0, sums, 1.0)[target]


def logit_weights(graph: AttributionGraph) -> np.ndarray:
    """w: `[N]` float64, the logits' probabilities at their nodes, 0 elsewhere."""
    weights = np.zeros(graph.n_nodes)
    weights[graph.nodes.of(NodeKind.LOGIT)] = graph.logit_probabilities
    return weights


def influence(graph: AttributionGraph, normalised: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """I: `[N]` float64, from normalised edges `[E]` and w `[N]`; exact, not cut off."""
    shape = (graph.n_nodes, graph.n_nodes)
    upwards = sparse.csr_matrix((normalised, graph.indices, graph.indptr), shape=shape)
    total, term = np.zeros(graph.n_nodes), weights
    for _ in range(graph.n_layers + 2):
        term = term @ upwards
        if not term.any():
            return total
        total += term
    raise AssertionError("edges do not lead upwards through the layers: the graph has a cycle")
