"""The features of a graph that matter most to its most probable answer, to be steered or patched."""

import numpy as np

from vlmscope.attribution.influence import influence
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.ids import FeatureId


def top_features(graph: AttributionGraph, count: int) -> dict[FeatureId, float]:
    """The features with the most influence on the most probable logit, the strongest first.

    A feature's influence is the sum over the positions where it is active, in the whole graph: a pruned one, which is
    for reading, may keep hardly any feature.

    Args:
        graph: of one prompt.
        count: at most so many features.

    Raises:
        UserError: no feature has any influence.
    """
    weights = np.zeros(graph.n_nodes)
    weights[graph.nodes.ends()[int(np.argmax(graph.logit_probabilities))]] = 1.0
    flow = influence(graph, weights).nodes
    sums: dict[FeatureId, float] = {}
    for node in graph.nodes.of(NodeKind.FEATURE).tolist():
        feature = graph.nodes.feature_id(node)
        sums[feature] = sums.get(feature, 0.0) + float(flow[node])
    ranked = sorted((f for f in sums if sums[f] > 0), key=lambda feature: (-sums[feature], feature))
    if not ranked:
        raise UserError("no feature of the graph has influence on its answer; name the features instead")
    return {feature: sums[feature] for feature in ranked[:count]}
