"""Figures of graphs under the names that every task uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.attribution.trace import Trace


def graph_metrics(traced: Trace, seconds: float) -> dict[str, float]:
    """Size, scores and time of a traced graph as flat metrics."""
    scores = traced.pruned.scores
    return {
        "graph/nodes": float(traced.graph.n_nodes),
        "graph/edges": float(traced.graph.n_edges),
        "graph/pruned_nodes": float(traced.pruned.n_nodes),
        "graph/pruned_edges": float(traced.pruned.n_edges),
        "graph/replacement_score": scores.replacement,
        "graph/completeness_score": scores.completeness,
        "graph/error_share": scores.error_share,
        "graph/bias_share": scores.bias_share,
        "graph/left_out_share": scores.left_out_share,
        "graph/max_residual": float(traced.graph.residual.max()),
        "graph/target_residual": float(traced.graph.residual[traced.graph.nodes.ends()].max()),
        "graph/seconds": seconds,
    }
