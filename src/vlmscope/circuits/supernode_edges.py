"""Direct edges between the supernodes of a circuit: sums of the edges of attribution graphs.

    W[s, t] = sum over members i of s and j of t, at their positions, of A[j, i]

A being the whole graph, unpruned. Scaling all members of s by 1 + x in the frozen model moves the sum of the
pre-activations of t's members by x W[s, t], directly. Edges into features have units of their pre-activations and edges
into answers are in logits, so for comparison each is also given as its share of |edges| into the target:

    share[s, t] = W[s, t] / sum over j of t and all sources i of |A[j, i]|

Legend: N nodes, G groups (supernodes, and what is around them).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vlmscope.circuits.spec_config import ANSWER_PREFIX, BIASES, ERRORS, OTHER, SOFT, TEXT
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.intervention import CircuitEdge, Supernode
from vlmscope.core.records import Places


@dataclass(frozen=True)
class Groups:
    """Nodes of a graph by group: `mask[name]` [N] bool. Supernodes may share nodes; all other groups are disjoint."""

    supernodes: dict[str, np.ndarray]
    around: dict[str, np.ndarray]
    answers: dict[str, np.ndarray]


def supernode_mask(graph: AttributionGraph, node: Supernode) -> np.ndarray:
    """[N] bool, the graph's nodes that are members of a supernode at its positions."""
    nodes = graph.nodes
    mask = np.zeros(graph.n_nodes, dtype=bool)
    wanted = {member.feature for member in node.features}
    for at in nodes.of(NodeKind.FEATURE).tolist():
        mask[at] = nodes.feature_id(at) in wanted
    if node.positions is not None:
        there = node.positions.mask(Places(graph.roles, graph.patch_boxes))
        mask[mask] = there[nodes.position[mask]]
    return mask


def groups_of(graph: AttributionGraph, supernodes: Sequence[Supernode], answers: int) -> Groups:
    """The groups of a graph, with at most so many of the answers that it explains, the most probable first."""
    kind = graph.nodes.kind
    inside = {node.name: supernode_mask(graph, node) for node in supernodes}
    claimed = np.any([*inside.values(), np.zeros(graph.n_nodes, dtype=bool)], axis=0)
    token = kind == NodeKind.TOKEN
    soft = token.copy()
    soft[token] = graph.is_image[graph.nodes.position[token]]
    around = {
        SOFT: soft,
        TEXT: token & ~soft,
        OTHER: ((kind == NodeKind.FEATURE) | (kind == NodeKind.LEFT_OUT)) & ~claimed,
        ERRORS: kind == NodeKind.ERROR,
        BIASES: kind == NodeKind.BIAS,
    }
    ends = graph.nodes.ends()
    said: dict[str, np.ndarray] = {}
    for number in np.argsort(-graph.end_weights, kind="stable")[:answers].tolist():
        word = graph.logit_tokens[number].strip()
        name = f"{ANSWER_PREFIX}{word}" if kind[ends[number]] == NodeKind.LOGIT else word
        if name in said:  # tokens that read alike are answers of their own
            name += f" (token {graph.nodes.index[ends[number]]})"
        said[name] = np.arange(graph.n_nodes) == ends[number]
    return Groups(inside, around, said)


def direct_edges(
    graphs: Iterable[AttributionGraph], supernodes: Sequence[Supernode], answers: int = 1
) -> tuple[CircuitEdge, ...]:
    """All edges into supernodes and answers, also from what is around the circuit; means over graphs.

    A graph in which a target is not active adds nothing to its sums, and counts for the mean all the same. Edges of no
    weight are left out; edges among a supernode's own members are there, from its name to itself.

    Args:
        graphs: of one model, at least one.
        supernodes: of the circuit; a feature of several counts for each.
        answers: how many answers of each graph count.
    """
    weights: dict[tuple[str, str], float] = {}
    totals: dict[str, float] = {}
    seen: dict[str, int] = {}
    count = 0
    for graph in graphs:
        count += 1
        groups = groups_of(graph, supernodes, answers)
        sources, targets = groups.supernodes | groups.around, groups.supernodes | groups.answers
        table = summed(graph, list(sources.values()), list(targets.values()))
        incoming = graph.absolute_sums()
        for column, (target, mask) in enumerate(targets.items()):
            totals[target] = totals.get(target, 0.0) + float(incoming[mask].sum())
            seen[target] = seen.get(target, 0) + int(mask.any())
            for row, source in enumerate(sources):
                if table[row, column] != 0:
                    weights[source, target] = weights.get((source, target), 0.0) + float(table[row, column])
    assert count, "edges need a graph"
    return tuple(
        CircuitEdge(source, target, weight / count, weight / (totals[target] or 1.0), seen[target])
        for (source, target), weight in weights.items()
    )


def summed(graph: AttributionGraph, sources: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> np.ndarray:
    """`[sources, targets]` float64, sums of the graph's edges between groups of nodes, masks [N] each."""
    edges = sparse.csr_matrix(
        (graph.weights.astype(np.float64), graph.indices, graph.indptr), shape=(graph.n_nodes, graph.n_nodes)
    )
    into = np.stack([edges[np.flatnonzero(mask)].sum(0).A1 for mask in targets], axis=1)  # [N, targets]
    return np.stack([into[mask].sum(0) for mask in sources])
