"""The edges between the supernodes of a circuit in one attribution graph."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from vlmscope.circuits.spec_config import SOFT, TEXT
from vlmscope.core.graph import NodeKind, PrunedGraph
from vlmscope.core.records import FeatureId


def circuit_edges(
    pruned: PrunedGraph, members: Mapping[str, Set[FeatureId]], min_share: float = 0.02
) -> list[tuple[str, str, float]]:
    """Sum the kept edges between inputs, supernodes and the most probable answer.

    Edges into a feature are in units of its pre-activation and edges into a logit in logits, so they cannot be added
    as they are. Each is turned into the influence that flows through it: its share of its target's incoming |weight|,
    times the target's own influence on the answers, with the edge's sign.

    A feature of two supernodes counts for the first. Edges inside a supernode and below `min_share` of the strongest
    are left out, and of two opposite directions only the stronger is kept, so that the result has no cycle of two.

    Returns:
        (source, target, weight) with 'soft tokens', 'question', the supernodes' names and 'answer: <word>'.
    """
    graph = pruned.graph
    names = np.full(graph.n_nodes, "", dtype=object)
    for node in graph.nodes.of(NodeKind.TOKEN).tolist():
        names[node] = SOFT if graph.is_image[graph.nodes.position[node]] else TEXT
    for node in graph.nodes.of(NodeKind.FEATURE).tolist():
        feature = graph.nodes.feature_id(node)
        names[node] = next((name for name, found in members.items() if feature in found), "")
    ends = graph.nodes.ends()
    logit = int(ends[0])
    names[logit] = f"answer: {graph.logit_tokens[0]}"
    sums: dict[tuple[str, str], float] = {}
    edges = np.flatnonzero(pruned.edge_mask)
    targets = graph.targets_of(edges)
    incoming = graph.absolute_sums()
    reach = pruned.influence.copy()
    reach[ends] = graph.end_weights / graph.end_weights.sum()
    for edge, target in zip(edges.tolist(), targets.tolist(), strict=True):
        source, goal = str(names[graph.indices[edge]]), str(names[target])
        if source and goal and source != goal:
            flow = float(graph.weights[edge] / incoming[target] * reach[target])
            sums[source, goal] = sums.get((source, goal), 0.0) + flow
    sums = {pair: w for pair, w in sums.items() if abs(w) >= abs(sums.get((pair[1], pair[0]), 0.0))}
    strongest = max((abs(w) for w in sums.values()), default=0.0)
    return [(s, t, w) for (s, t), w in sums.items() if abs(w) >= min_share * strongest]
