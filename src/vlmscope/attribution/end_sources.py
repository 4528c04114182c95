"""What each end of a graph is made of: where its influence ends, position by position.

Influence is linear in what the ends are worth, and every row hands all of its influence down. So a graph of a whole
answer says of each word by itself how much of it comes from each token, from constants, errors and left-out features.
"""

from dataclasses import dataclass

import numpy as np

from vlmscope.attribution.influence import influence
from vlmscope.core.graph import AttributionGraph, NodeKind


@dataclass(frozen=True)
class EndSources:
    """Shares of the influence on each of K ends, by where it ends; those of an end sum to 1.

    Attributes:
        tokens: [K, T], at the embedding (or soft token) of each position.
        bias, error, left_out: [K].
    """

    tokens: np.ndarray
    bias: np.ndarray
    error: np.ndarray
    left_out: np.ndarray

    def of_tokens(self, groups: np.ndarray, count: int) -> np.ndarray:
        """[K, count], shares of the influence that ends at tokens, by the group 0 .. count - 1 of each position [T]."""
        member = np.eye(count)[groups]
        total = self.tokens.sum(1, keepdims=True)
        return (self.tokens @ member) / np.where(total > 0, total, 1.0)


def end_sources(graph: AttributionGraph) -> EndSources:
    """Follow each end of a graph down to the sources."""
    nodes, ends = graph.nodes, graph.nodes.ends()
    tokens = nodes.of(NodeKind.TOKEN)
    found = np.zeros((len(ends), len(graph.tokens)))
    rest = {kind: np.zeros(len(ends)) for kind in (NodeKind.BIAS, NodeKind.ERROR, NodeKind.LEFT_OUT)}
    for row, end in enumerate(ends.tolist()):
        weights = np.zeros(graph.n_nodes)
        weights[end] = 1.0
        flow = influence(graph, weights).nodes
        np.add.at(found[row], nodes.position[tokens], flow[tokens])
        for kind, values in rest.items():
            values[row] = flow[nodes.kind == kind].sum()
    return EndSources(found, rest[NodeKind.BIAS], rest[NodeKind.ERROR], rest[NodeKind.LEFT_OUT])
