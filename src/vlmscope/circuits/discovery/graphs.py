"""Scores by attribution graphs: mean influence over the pruned graphs of the pairs' two sides.

Each side is traced with the difference of the two answers' logits as the target. A feature that is active only in the
counterfactual is in no graph of the original, and matters all the same when it is put there: hence both sides. A node's
score is its influence in the pruned graph (0 if pruned), summed over the positions of its role; an edge's is what
influence flows through it, `|A_ts| (I_t + w_t) / sum of |edges of t|` on the pruned nodes (Ameisen et al. 2025).
Influence has no sign, and says what the answer is made of, not what differs between the sides.

Legend: G graphs, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import absolute_rows, influence, logit_weights, prune, rows_of
from vlmscope.attribution.targets import difference_target
from vlmscope.attribution.trace import attribute
from vlmscope.circuits.discovery.nodes import Kind, Nodes
from vlmscope.circuits.discovery.sides import CircuitSubject
from vlmscope.core.graph import NodeKind, NodeTable, PrunedGraph
from vlmscope.replacement.model import build_replacement
from vlmscope.scope import Scope

ANSWER = -1  # stands for the answer where edges name node numbers
_KINDS = {NodeKind.TOKEN: Kind.EMBEDDING, NodeKind.FEATURE: Kind.FEATURE, NodeKind.ERROR: Kind.ERROR}


@dataclass(frozen=True)
class GraphScores:
    """What graphs say.

    Attributes:
        nodes: [G, N] float64, influence of each node in each graph.
        edges: (source, target) node numbers -> mean influence; the target may be `ANSWER`.
    """

    nodes: np.ndarray
    edges: dict[tuple[int, int], float]


def graph_scores(
    scope: Scope,
    subject: CircuitSubject,
    nodes: Nodes,
    count: int,
    config: AttributionConfig,
) -> GraphScores:
    """Trace both sides of the first `count` pairs.

    Args:
        scope: the model and its transcoders.
        subject: the pairs.
        nodes: what gets a score; what is the same on both sides is none of them.
        count: pairs.
        config: nodes and thresholds of the graphs.
    """
    table: list[np.ndarray] = []
    edges: dict[tuple[int, int], float] = {}
    number = nodes.rows()
    roles = {role: place for place, role in enumerate(nodes.roles)}
    graphs = list(_graphs(scope, subject, count, config))
    for pruned in graphs:
        graph = pruned.graph
        role_of = np.array([roles[role] for role in graph.roles.tolist()])
        of = _numbers(graph.nodes, role_of, number)
        table.append(_node_scores(pruned, of, len(nodes)))
        for pair, flow in _edge_scores(pruned, of).items():
            edges[pair] = edges.get(pair, 0.0) + flow / len(graphs)
    return GraphScores(np.stack(table), edges)


def _graphs(scope: Scope, subject: CircuitSubject, count: int, config: AttributionConfig) -> Iterator[PrunedGraph]:
    pairs = subject.pairs
    for row in range(min(count, pairs.size)):
        words = int(pairs.tokens[row]), int(pairs.other_tokens[row])
        for inputs in (subject.originals[row], subject.others[row]):
            replacement = build_replacement(scope, inputs)
            targets = difference_target(replacement, *words, "original - counterfactual")
            graph = attribute(replacement, config, None, targets=targets)
            yield prune(graph, config.node_threshold, config.edge_threshold)


def _numbers(table: NodeTable, role_of: np.ndarray, number: dict[tuple[int, int, int, int], int]) -> np.ndarray:
    """[graph nodes] int64: the number of each, `ANSWER` for ends, -2 for what has none."""
    out = np.full(len(table), -2, dtype=np.int64)
    out[table.ends()] = ANSWER
    for kind, ours in _KINDS.items():
        for place in table.of(kind).tolist():
            index = int(table.index[place]) if ours == Kind.FEATURE else -1
            key = (ours, int(table.layer[place]), int(role_of[table.position[place]]), index)
            out[place] = number.get(key, -2)
    return out


def _node_scores(pruned: PrunedGraph, of: np.ndarray, count: int) -> np.ndarray:
    kept = pruned.node_mask & (of >= 0)
    return np.bincount(of[kept], weights=pruned.influence[kept], minlength=count)


def _edge_scores(pruned: PrunedGraph, of: np.ndarray) -> dict[tuple[int, int], float]:
    graph = pruned.graph
    flow = influence(graph, logit_weights(graph), pruned.node_mask)
    rows = rows_of(graph, pruned.node_mask)
    found: dict[tuple[int, int], float] = {}
    for row in rows[of[rows] > -2].tolist():
        edges = absolute_rows(graph, np.array([row]))
        kept = pruned.edge_mask[graph.indptr[row] : graph.indptr[row + 1]] & (of[edges.indices] >= 0)
        values = edges.data[kept] * flow.per_edge[row]
        for source, value in zip(of[edges.indices[kept]].tolist(), values.tolist(), strict=True):
            pair = (source, int(of[row]))
            found[pair] = found.get(pair, 0.0) + value
    return found
