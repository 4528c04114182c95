"""Influence, scores and pruning of an attribution graph (Ameisen et al. 2025), and rankings by influence.

Influence of nodes on the ends: with `A_hat = |A| / row sum` and w the weights of the ends (mostly the probabilities of
the logits), `I = w A_hat + w A_hat^2 + ...`. A row's sum counts every source: biases, errors, and the features that
were left out of the graph. Sources come before their targets, so a node's influence is complete once all rows above it
have passed theirs down: one sweep over the rows, from the last to the first, gives the whole series. |A| is made a
block of rows at a time and never kept.

Scores treat biases and left-out features apart:
    replacement  = I_tokens / (I_tokens + I_unexplained)
    completeness = sum_i (1 - sum_{s unexplained} A_hat_is) (I_i + w_i) / sum_i (I_i + w_i)
Unexplained are the errors and the features that were left out; soft tokens are tokens. Biases are neither: they are
part of the model and known exactly, but nothing of the input flows through them; the influence that ends in them is a
share of its own, absent from the replacement score and explained in the completeness score. What a source takes of all
rows together, `sum_i A_hat_is (I_i + w_i)`, is its influence I_s, so `completeness = 1 - I_unexplained / sum_i (I_i +
w_i)`.

circuit-tracer has no nodes for biases: its rows are normalised over features, errors and tokens alone, which is the
graph cut to all nodes but the biases (`counted`). The scores `.._no_bias` are of this cut, where nothing is explained
by a bias. With the convention `bias="fold"` influence, pruning and all scores are, and equal circuit-tracer's if no
feature was left out.

Pruning keeps the ends, the tokens, and the smallest set of nodes that reaches a share of the total influence. On the
matrix of these nodes, with rows normalised again, an edge scores `A_hat_ij (I_i + w_i)`; the smallest set of edges that
reaches a share is kept. Then features, errors, biases and left-out nodes without an outgoing edge, and features
without an incoming one, are dropped until nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from vlmscope.attribution.storage import MEMORY, Memory, cumulative_share, find_cut, smallest_set
from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, AttributionGraph, GraphScores, NodeKind, PrunedGraph
from vlmscope.core.records import FeatureId

# Edges of a block: enough that the work on it outweighs making it; its copies take some 20 MB.
BLOCK = 1 << 19


@dataclass(frozen=True)
class Influence:
    """Influence of the nodes on the ends: `nodes` is I, `[N]` float64.

    `per_edge [N]` is `(I_i + w_i) / row sum`; times |edge|, it is the influence that row i passes to a source.
    """

    nodes: np.ndarray
    per_edge: np.ndarray


def logit_weights(graph: AttributionGraph) -> np.ndarray:
    """w, `[N]` float64: the weights of the ends (mostly the logits' probabilities), 0 at other nodes."""
    weights = np.zeros(graph.n_nodes)
    weights[graph.nodes.ends()] = graph.end_weights
    return weights


def influence(graph: AttributionGraph, weights: np.ndarray, inside: np.ndarray | None = None) -> Influence:
    """I from w `[N]`, exact; the graph is cut to the nodes `inside [N]` before its rows are normalised."""
    return influences(graph, weights, [inside])[0]


def influences(
    graph: AttributionGraph, weights: np.ndarray, cuts: Sequence[np.ndarray | None]
) -> tuple[Influence, ...]:
    """`influence` for each of several cuts; |A|, which takes most of the time, is made once."""
    found = tuple(Influence(np.zeros(graph.n_nodes), np.zeros(graph.n_nodes)) for _ in cuts)
    masks = [np.ones(graph.n_nodes) if inside is None else inside.astype(np.float64) for inside in cuts]
    for rows in reversed(list(row_blocks(graph, rows_of(graph, np.any(masks, axis=0)), by_level=True))):
        edges = absolute_rows(graph, rows)
        for flow, mask in zip(found, masks, strict=True):
            sums = edges @ mask
            per_edge = mask[rows] * (flow.nodes[rows] + weights[rows]) / np.where(sums > 0, sums, np.inf)
            flow.per_edge[rows] = per_edge
            flow.nodes[:] += per_edge @ edges
    for flow, mask in zip(found, masks, strict=True):
        flow.nodes[mask == 0] = 0.0
    return found


def rows_of(graph: AttributionGraph, inside: np.ndarray | None = None) -> np.ndarray:
    """The nodes that have edges into them (and are `inside [N]`), ascending, int64."""
    has_edges = np.diff(graph.indptr) > 0
    return np.flatnonzero(has_edges if inside is None else has_edges & inside)


def row_blocks(graph: AttributionGraph, rows: np.ndarray, by_level: bool = False) -> Iterator[np.ndarray]:
    """Cut ascending `rows`, all with edges, into blocks of at most `BLOCK` edges, but at least one row.

    With `by_level` no row is a source of another in its block.
    """
    edges = np.concatenate([[0], np.cumsum(np.diff(graph.indptr)[rows])])
    # Indices ascend in a row, so its last one is its highest source.
    reach = np.maximum.accumulate(graph.indices[graph.indptr[rows + 1] - 1]) if by_level else np.empty(0)
    start = 0
    while start < len(rows):
        stop = int(np.searchsorted(edges, edges[start] + BLOCK, side="right")) - 1
        if by_level:
            level = int(np.searchsorted(reach, rows[start]))
            assert level > start, f"row {rows[start]} has a source that does not come before it: not a graph of layers"
            stop = min(stop, level)
        stop = max(stop, start + 1)
        yield rows[start:stop]
        start = stop


def absolute_rows(graph: AttributionGraph, rows: np.ndarray) -> sparse.csr_matrix:
    """|edge| of some rows, `[rows, N]` float64; for a LEFT_OUT source the sum of its features' |edges|."""
    block = take_rows(graph, graph.weights, rows)
    absolute = np.abs(block.data).astype(np.float64)
    if graph.left_out_mass.shape[1]:
        rest = np.flatnonzero(graph.nodes.kind[block.indices] == NodeKind.LEFT_OUT)
        row = rows[np.searchsorted(block.indptr, rest, side="right") - 1]
        level = graph.nodes.level_numbers(graph.left_out_mass.shape[1])
        absolute[rest] = graph.left_out_mass[row, level[block.indices[rest]]]
    return sparse.csr_matrix((absolute, block.indices, block.indptr), shape=block.shape)


def take_rows(graph: AttributionGraph, values: np.ndarray, rows: np.ndarray) -> sparse.csr_matrix:
    """Ascending rows of the graph with `values [E]` for weights, `[rows, N]`, read-only.

    Only these rows are read, so that edges can be stored in a file.
    """
    first, last = rows[0], rows[-1]
    stretch = slice(graph.indptr[first], graph.indptr[last + 1])
    starts = graph.indptr[rows] - graph.indptr[first]
    counts = graph.indptr[rows + 1] - graph.indptr[rows]
    begins = np.concatenate([[0], np.cumsum(counts)])
    data, indices = values[stretch], graph.indices[stretch]
    if begins[-1] < len(indices):
        # scipy would copy the whole stretch when it is the smaller part of an array.
        places = np.arange(begins[-1]) + np.repeat(starts - begins[:-1], counts)
        data, indices = data[places], indices[places]
    return sparse.csr_matrix((data, indices, begins), shape=(len(rows), graph.n_nodes))


def counted(graph: AttributionGraph, bias: str) -> np.ndarray | None:
    """Mask `[N]` of the nodes that count for influence under a convention, "node" or "fold"; None where all do."""
    return None if bias == "node" else graph.nodes.kind != NodeKind.BIAS


def scores(graph: AttributionGraph, bias: str = "node", flows: Sequence[np.ndarray] = ()) -> GraphScores:
    """Scores of a graph; `flows` is its influence `[N]` under the convention `bias` and under "fold", where known."""
    weights, nodes = logit_weights(graph), graph.nodes
    flow, folded = flows or _both_flows(graph, bias)

    def parts(flow: np.ndarray) -> list[float]:
        kinds = (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.BIAS, NodeKind.LEFT_OUT)
        return [float(flow[nodes.kind == kind].sum()) for kind in kinds]

    def rated(flow: np.ndarray) -> tuple[float, float]:
        """Replacement and completeness."""
        token, error, _, left_out = parts(flow)
        known = token + error + left_out
        return token / known if known else 0.0, 1.0 - (error + left_out) / float(flow.sum() + weights.sum())

    token, error, biases, left_out = parts(flow)
    sources = token + error + biases + left_out
    tokens = nodes.of(NodeKind.TOKEN)
    (replacement, completeness), (replacement_no_bias, completeness_no_bias) = rated(flow), rated(folded)
    return GraphScores(
        replacement=replacement,
        completeness=completeness,
        token_share=token / sources,
        error_share=error / sources,
        bias_share=biases / sources,
        left_out_share=left_out / sources,
        image_share=float(flow[tokens[graph.is_image[nodes.position[tokens]]]].sum()) / sources,
        replacement_no_bias=replacement_no_bias,
        completeness_no_bias=completeness_no_bias,
    )


class SubgraphScores(NamedTuple):
    """`GraphScores` of the part of a graph that someone pinned."""

    replacement: float
    completeness: float


def subgraph_scores(graph: AttributionGraph, pinned: np.ndarray) -> SubgraphScores:
    """Scores of a graph in which all features but the `pinned [N]` count as errors, as in Neuronpedia's viewer.

    Influence goes down from the ends through pinned features alone; what arrives at another feature is unexplained.
    With all features pinned these are the scores of the graph. Biases keep the convention "node".
    """
    weights, kind, flow = logit_weights(graph), graph.nodes.kind, np.zeros(graph.n_nodes)
    inside = np.isin(kind, ENDS) | ((kind == NodeKind.FEATURE) & pinned)
    for rows in reversed(list(row_blocks(graph, rows_of(graph, inside), by_level=True))):
        edges = absolute_rows(graph, rows)
        sums = np.asarray(edges.sum(1)).ravel()
        flow += ((flow[rows] + weights[rows]) / np.where(sums > 0, sums, np.inf)) @ edges
    unknown = np.isin(kind, (NodeKind.ERROR, NodeKind.LEFT_OUT)) | ((kind == NodeKind.FEATURE) & ~inside)
    token, unexplained = float(flow[kind == NodeKind.TOKEN].sum()), float(flow[unknown].sum())
    known, total = token + unexplained, float(flow.sum() + weights.sum())
    return SubgraphScores(token / known if known else 0.0, 1.0 - unexplained / total if total else 0.0)


def _both_flows(graph: AttributionGraph, bias: str) -> tuple[np.ndarray, np.ndarray]:
    """Influence `[N]` under a convention and under "fold"."""
    conventions = dict.fromkeys((bias, "fold"))
    found = influences(graph, logit_weights(graph), [counted(graph, convention) for convention in conventions])
    return found[0].nodes, found[-1].nodes


def prune(
    graph: AttributionGraph,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    storage: Memory = MEMORY,
    bias: str = "node",
) -> PrunedGraph:
    """Mark the nodes and edges whose influence, under the convention `bias`, reaches the thresholds.

    `storage` holds the mask of the edges.
    """
    weights = logit_weights(graph)
    flow, folded = _both_flows(graph, bias)
    nodes = smallest_set(flow, node_threshold) | np.isin(graph.nodes.kind, (NodeKind.TOKEN, *ENDS))
    edges = _edges_of(graph, nodes, influence(graph, weights, nodes), edge_threshold, storage)
    alive = nodes & ~_dead_ends(graph, nodes, edges)
    if (alive != nodes).any():  # drop edges that lost an end
        for block in row_blocks(graph, rows_of(graph, nodes)):
            taken = take_rows(graph, edges, block)
            ends = alive[taken.indices] & np.repeat(alive[block], np.diff(taken.indptr))
            edges[_places(graph, block)] = np.asarray(taken.data, bool) & ends
    return PrunedGraph(
        graph=graph,
        node_mask=alive,
        edge_mask=edges,
        influence=flow,
        cumulative=cumulative_share(flow),
        scores=scores(graph, bias, (flow, folded)),
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        bias=bias,
    )


def _edges_of(graph: AttributionGraph, nodes: np.ndarray, flow: Influence, share: float, storage: Memory) -> np.ndarray:
    """Mask `[E]` of the fewest edges among `nodes` that carry `share` of the influence of all edges among them."""
    rows = rows_of(graph, nodes)
    inside = nodes.astype(np.float64)

    def edge_scores() -> Iterator[np.ndarray]:
        for block in row_blocks(graph, rows):
            edges = absolute_rows(graph, block)
            yield edges.data * inside[edges.indices] * np.repeat(flow.per_edge[block], np.diff(edges.indptr))

    counts = np.diff(graph.indptr)[rows]
    cut = find_cut(edge_scores, int(counts.sum()), share)
    mask, ties = storage.zeros(graph.n_edges, bool), cut.ties
    for block, values in zip(row_blocks(graph, rows), edge_scores(), strict=True):
        kept = values > cut.value
        if ties:
            equal = np.flatnonzero(values == cut.value)[:ties]
            kept[equal] = True
            ties -= len(equal)
        mask[_places(graph, block)] = kept
    return mask


def _places(graph: AttributionGraph, rows: np.ndarray) -> np.ndarray:
    """The edge numbers of `rows`, one row after another, int64."""
    counts = np.diff(graph.indptr)[rows]
    return np.arange(counts.sum()) + np.repeat(graph.indptr[rows] - np.cumsum(counts) + counts, counts)


def _dead_ends(graph: AttributionGraph, nodes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mask `[N]` of the `nodes` to drop when those without a needed edge are dropped until nothing changes.

    Dropping a node that nothing enters takes no edge from a source, and dropping one that nothing leaves none from a
    target. So the two kinds of dead ends are independent, and one sweep upwards and one downwards find them.
    """
    rows = rows_of(graph, nodes)
    blocks = list(row_blocks(graph, rows, by_level=True))
    entered = nodes & (graph.nodes.kind != NodeKind.FEATURE)
    left = nodes & np.isin(graph.nodes.kind, (NodeKind.TOKEN, *ENDS))
    for block in blocks:
        entered[block] |= nodes[block] & (take_rows(graph, edges, block) @ entered)
    for block in reversed(blocks):
        left |= nodes & (left[block] @ take_rows(graph, edges, block))
    return nodes & ~(entered & left)


def edge_strengths(pruned: PrunedGraph) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the kept edges with influence, strongest first, int64, and the strength of each, float64.

    An edge's strength is its share of its target's incoming |weight| times the target's influence on the ends, the
    quantity that pruning ranks by.
    """
    graph = pruned.graph
    total = graph.absolute_sums(counted(graph, pruned.bias))
    importance = pruned.influence.astype(np.float64).copy()
    # Influence starts from the weights of the ends and does not include them.
    importance[graph.nodes.ends()] += graph.end_weights
    kept = np.flatnonzero(pruned.edge_mask)
    targets = graph.targets_of(kept)
    magnitude = np.abs(graph.weights[kept].astype(np.float64))
    strength = magnitude / np.where(total > 0, total, 1.0)[targets] * importance[targets]
    kept, strength = kept[strength > 0], strength[strength > 0]
    order = np.argsort(-strength, kind="stable")
    return kept[order], strength[order]


def reaches_image(pruned: PrunedGraph, logit: int) -> bool:
    """Whether kept edges lead back from a logit, or another end of the graph, to a soft token."""
    graph = pruned.graph
    assert graph.nodes.kind[logit] in ENDS, f"node {logit} is no end of the graph"
    reached = np.zeros(graph.n_nodes, dtype=bool)
    reached[logit] = True
    # Sources come before their targets, so one pass downwards visits every path.
    for node in range(logit, -1, -1):
        if reached[node]:
            row = slice(graph.indptr[node], graph.indptr[node + 1])
            reached[graph.indices[row][pruned.edge_mask[row]]] = True
    tokens = graph.nodes.of(NodeKind.TOKEN)
    return bool((reached[tokens] & graph.is_image[graph.nodes.position[tokens]]).any())


class RankedFeature(NamedTuple):
    """A feature of a graph, with the position where it has most influence on the most probable end."""

    feature: FeatureId
    label: str  # "" where none is known
    influence: float  # summed over the positions where it is active
    share: float  # of the influence of all features
    activation: float  # at `position`, as are the following
    position: int
    place: str  # in words, as `AttributionGraph.place`
    positions: int  # number of positions where it is active


def ranked_features(
    graph: AttributionGraph, count: int, labels: Mapping[FeatureId, str] | None = None
) -> list[RankedFeature]:
    """The features with the most influence on the most probable logit, the strongest first.

    Of the whole graph: a pruned one may keep hardly any feature.
    """
    weights = np.zeros(graph.n_nodes)
    weights[graph.nodes.ends()[int(np.argmax(graph.logit_probabilities))]] = 1.0
    flow = influence(graph, weights).nodes
    nodes_of: dict[FeatureId, list[int]] = {}
    for node in graph.nodes.of(NodeKind.FEATURE).tolist():
        nodes_of.setdefault(graph.nodes.feature_id(node), []).append(node)
    sums = {feature: sum(flow[nodes].tolist()) for feature, nodes in nodes_of.items()}
    ranked = sorted((feature for feature in sums if sums[feature] > 0), key=lambda feature: (-sums[feature], feature))
    whole, rows = sum(sums.values()), []
    for feature in ranked[:count]:
        nodes = nodes_of[feature]
        best = max(nodes, key=lambda node: flow[node])
        position, level = int(graph.nodes.position[best]), float(graph.nodes.activation[best])
        share, label = sums[feature] / whole, (labels or {}).get(feature, "")
        place = graph.place(position)
        rows.append(RankedFeature(feature, label, sums[feature], share, level, position, place, len(nodes)))
    return rows


def top_features(graph: AttributionGraph, count: int) -> dict[FeatureId, float]:
    """Influence of the first `count` of `ranked_features`; a `UserError` where none has any."""
    ranked = ranked_features(graph, count)
    if not ranked:
        raise UserError("no feature of the graph has influence on its answer; name the features instead")
    return {row.feature: row.influence for row in ranked}


def end_sources(graph: AttributionGraph) -> tuple[np.ndarray, np.ndarray]:
    """Influence of the tokens, `[K, T]`, and of all errors, `[K]`, on each of the K ends alone.

    Influence is linear in the weights of the ends, and every row passes all of its influence down. So a graph of a
    whole answer gives the share of each word that comes from each token.
    """
    nodes, ends = graph.nodes, graph.nodes.ends()
    tokens, errors = np.zeros((len(ends), len(graph.tokens))), np.zeros(len(ends))
    token_nodes = nodes.of(NodeKind.TOKEN)
    for row, end in enumerate(ends.tolist()):
        weights = np.zeros(graph.n_nodes)
        weights[end] = 1.0
        flow = influence(graph, weights).nodes
        np.add.at(tokens[row], nodes.position[token_nodes], flow[token_nodes])
        errors[row] = flow[nodes.kind == NodeKind.ERROR].sum()
    return tokens, errors


def graph_indicators(pruned: PrunedGraph) -> dict[str, float]:
    """Numbers by which wrong answers may be told from right ones, the first three those of arXiv 2605.22902.

    With I the influence on the graph's ends, over feature nodes i:

        c_i = I_i / sum_j I_j                               contribution
        entropy   = -sum_i c_i log c_i                      nats
        distance  = sum_i c_i (T - 1 - position_i)          tokens before the last one
        top1      = max_i c_i

    Shares are of the influence that ends at sources. None depends on the scale of the ends' weights, hence not on the
    probability of the answer. Without a feature that has influence, the first three are 0.
    """
    graph, flow, scores = pruned.graph, pruned.influence, pruned.scores
    features = graph.nodes.of(NodeKind.FEATURE)
    share = flow[features]
    share = share / share.sum() if share.sum() > 0 else share
    used = share > 0
    tokens = graph.nodes.of(NodeKind.TOKEN)
    seen = float(flow[tokens].sum())
    image = float(flow[tokens[graph.is_image[graph.nodes.position[tokens]]]].sum())
    return {
        "entropy": float(-(share[used] * np.log(share[used])).sum()),
        "distance": float(share @ (len(graph.tokens) - 1 - graph.nodes.position[features])),
        "top1": float(share.max()) if len(share) else 0.0,
        "image_share": scores.token_share * image / seen if seen else 0.0,
        "text_share": scores.token_share * (1 - image / seen) if seen else 0.0,
        "error_share": scores.error_share,
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "nodes": float(pruned.n_nodes),
    }
