"""How much of the logits' influence a graph explains (Ameisen et al. 2025), with biases and left-out features told
apart.

    replacement  = I_tokens / (I_tokens + I_unexplained)
    completeness = sum_i (1 - sum_{s unexplained} A_hat_is) (I_i + w_i) / sum_i (I_i + w_i)
Unexplained are the errors and the features that were left out. Soft tokens are tokens. Biases are neither: they are
part of the model and known exactly, so they are no error, but nothing of the input flows through them; the influence
that ends in them is a share of its own, absent from the replacement score and explained in the completeness score.
What a source takes of all rows together, `sum_i A_hat_is (I_i + w_i)`, is its influence I_s, so no edge is read again:
    completeness = 1 - I_unexplained / sum_i (I_i + w_i)
"""

import numpy as np

from vlmscope.attribution.influence import influence, logit_weights
from vlmscope.core.graph import AttributionGraph, GraphScores, NodeKind


def graph_scores(graph: AttributionGraph, flow: np.ndarray) -> GraphScores:
    """Scores from the influence `[N]` of the same graph."""
    kind = graph.nodes.kind

    def share(which: NodeKind) -> float:
        return float(flow[kind == which].sum())

    token, error = share(NodeKind.TOKEN), share(NodeKind.ERROR)
    bias, left_out = share(NodeKind.BIAS), share(NodeKind.LEFT_OUT)
    ends = token + error + bias + left_out
    output = float(flow.sum() + logit_weights(graph).sum())
    known = token + error + left_out
    return GraphScores(
        replacement=token / known if known else 0.0,
        completeness=1.0 - (error + left_out) / output,
        token_share=token / ends,
        error_share=error / ends,
        bias_share=bias / ends,
        left_out_share=left_out / ends,
    )


def scores(graph: AttributionGraph) -> GraphScores:
    """Scores of a graph."""
    return graph_scores(graph, influence(graph, logit_weights(graph)).nodes)
