"""What a graph's file shows first: its strongest nodes pinned, in supernodes.

Pinned are the ends, and of soft tokens, words and features each the fewest nodes with half of their kind's influence,
at most `_MOST`. With groups of features given, as a circuit has them, the members that pruning kept are pinned in place
of the strongest features, and are its supernodes.

Else nodes are joined by one distance, average linkage up to 1/2: infinite between nodes of two kinds or roles, 0 where
both have one label, else 1 minus the mean of two cosines, that of the edges into both and that of the edges out of both
(each over its target's sum of |edges|). Soft tokens have one label, words stay alone. A supernode has at least two
nodes, and is named by the label of its strongest member, or by that feature.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from vlmscope.attribution.influence import SubgraphScores, subgraph_scores
from vlmscope.core.graph import ENDS, NodeKind, PrunedGraph
from vlmscope.core.records import FeatureId

_SCORE = re.compile(r" \([01]\.\d+\)$")  # of a label, which two features with the same words need not share
_HALF, _MOST, _CUT, _APART = 0.5, 24, 0.5, 2.0


@dataclass(frozen=True)
class Pins:
    """Pinned nodes, strongest first, some of them in named supernodes, and the scores of this part of the graph."""

    nodes: np.ndarray
    supernodes: dict[str, np.ndarray]
    scores: SubgraphScores


def pins(pruned: PrunedGraph, labels: Mapping[FeatureId, str], groups: Mapping[FeatureId, str] | None = None) -> Pins:
    """Pins and supernodes of a graph; `groups` names those of features, from a circuit."""
    graph, table = pruned.graph, pruned.graph.nodes
    labels = {feature: _SCORE.sub("", label) for feature, label in labels.items()}
    image = (table.kind == NodeKind.TOKEN) & np.append(graph.is_image, False)[table.position]
    features = np.flatnonzero(pruned.node_mask & (table.kind == NodeKind.FEATURE))
    names = {node: (groups or {}).get(table.feature_id(node), "") for node in features.tolist()}
    members = np.array([node for node in features.tolist() if names[node]], dtype=np.int64)
    if not len(members):
        members = _strongest(pruned, features)
    tokens = [_strongest(pruned, np.flatnonzero(pruned.node_mask & mask & (table.kind == NodeKind.TOKEN)))
              for mask in (image, ~image)]  # fmt: skip
    ends = np.flatnonzero(pruned.node_mask & np.isin(table.kind, ENDS))
    pinned = np.concatenate([ends, *tokens, members])
    pinned = pinned[np.argsort(-pruned.influence[pinned] - np.isin(pinned, ends), kind="stable")]
    found: dict[str, np.ndarray] = {"picture": tokens[0]} if len(tokens[0]) > 1 else {}
    if groups and any(names.values()):
        found |= {name: np.array([node for node in members.tolist() if names[node] == name])
                  for name in dict.fromkeys(groups.values()) if name in names.values()}  # fmt: skip
    else:
        for nodes in _joined(pruned, members, labels):
            feature, role = table.feature_id(int(nodes[0])), str(graph.roles[table.position[nodes[0]]])
            name = labels.get(feature) or str(feature)
            name = f"{name} ({role})" if name in found else name
            found[name if name not in found else f"{name} {len(found)}"] = nodes
    mask = np.zeros(graph.n_nodes, dtype=bool)
    mask[pinned] = True
    return Pins(pinned, found, subgraph_scores(graph, mask))


def _strongest(pruned: PrunedGraph, nodes: np.ndarray) -> np.ndarray:
    """The fewest `nodes` with half of their influence, at most `_MOST`, the strongest first."""
    nodes = nodes[np.argsort(-pruned.influence[nodes], kind="stable")]
    reached = np.cumsum(pruned.influence[nodes])
    return nodes[: min(int((reached < _HALF * reached[-1]).sum()) + 1, _MOST)] if len(nodes) else nodes


def _joined(pruned: PrunedGraph, nodes: np.ndarray, labels: Mapping[FeatureId, str]) -> list[np.ndarray]:
    """Features `nodes` that belong together, the strongest of each first; those alone are left out."""
    if len(nodes) < 2:
        return []
    graph, table = pruned.graph, pruned.graph.nodes
    edges = np.flatnonzero(pruned.edge_mask)
    target, sums = graph.targets_of(edges), graph.absolute_sums()
    size = (graph.n_nodes, graph.n_nodes)
    matrix = sparse.csr_matrix((graph.weights[edges] / sums[target], (target, graph.indices[edges])), shape=size)
    alike = sum(_cosines(part[nodes]) for part in (matrix, matrix.T.tocsr())) / 2
    distance = np.clip(1.0 - alike, 0.0, 1.0)
    words = np.array([labels.get(table.feature_id(node), "") for node in nodes.tolist()])
    distance[(words[:, None] == words) & (words != "")] = 0.0
    roles = graph.roles[table.position[nodes]]
    distance[roles[:, None] != roles] = _APART
    np.fill_diagonal(distance, 0.0)
    found = fcluster(linkage(squareform(distance, checks=False), "average"), _CUT, "distance")
    return [nodes[found == one] for one in dict.fromkeys(found.tolist()) if (found == one).sum() > 1]


def _cosines(rows: sparse.csr_matrix) -> np.ndarray:
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    return (rows @ rows.T).toarray() / np.maximum(np.outer(norms, norms), 1e-30)
