"""Numbers that say what kind of graph an answer has: indicators of wrong answers (arXiv 2605.22902 predicts
hallucinations of Gemma-3-4B-it from the first three).

With I the influence on the graph's ends (`attribution.influence`), over feature nodes i

    c_i = I_i / sum_j I_j
    entropy   = -sum_i c_i log c_i                      nats
    distance  = sum_i c_i (T - 1 - position_i)          tokens before the last one
    top1      = max_i c_i

Shares are of the influence that ends at sources. None depends on the scale of the ends' weights, so the probability of
the answer does not slip in by that door; `max_logits = 1` keeps out the number of likely answers too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from vlmscope.core.graph import NodeKind, PrunedGraph

PAPER = ("entropy", "distance", "top1")


@dataclass(frozen=True)
class GraphIndicators:
    """Of one graph.

    Attributes:
        entropy: of the features' contributions, nats.
        distance: mean distance of the contributions from the last position, tokens.
        top1: the largest contribution's share.
        image_share: influence that ends at soft tokens.
        text_share: at other tokens.
        error_share: at errors.
        replacement: score (`attribution.scores`).
        completeness: score.
        nodes: of the pruned graph.
    """

    entropy: float
    distance: float
    top1: float
    image_share: float
    text_share: float
    error_share: float
    replacement: float
    completeness: float
    nodes: float

    def values(self) -> dict[str, float]:
        """By name."""
        return asdict(self)


NAMES = tuple(GraphIndicators.__dataclass_fields__)


def graph_indicators(pruned: PrunedGraph) -> GraphIndicators:
    """The indicators of a graph. Without a feature that has influence, entropy, distance and top1 are 0."""
    graph, flow, scores = pruned.graph, pruned.influence, pruned.scores
    features = graph.nodes.of(NodeKind.FEATURE)
    share = flow[features]
    share = share / share.sum() if share.sum() > 0 else share
    used = share > 0
    tokens = graph.nodes.of(NodeKind.TOKEN)
    seen = float(flow[tokens].sum())
    image = float(flow[tokens[graph.is_image[graph.nodes.position[tokens]]]].sum())
    return GraphIndicators(
        entropy=float(-(share[used] * np.log(share[used])).sum()),
        distance=float(share @ (len(graph.tokens) - 1 - graph.nodes.position[features])),
        top1=float(share.max()) if len(share) else 0.0,
        image_share=scores.token_share * image / seen if seen else 0.0,
        text_share=scores.token_share * (1 - image / seen) if seen else 0.0,
        error_share=scores.error_share,
        replacement=scores.replacement,
        completeness=scores.completeness,
        nodes=float(pruned.n_nodes),
    )
