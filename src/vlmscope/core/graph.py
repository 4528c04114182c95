"""Records of attribution graphs and of graphs laid on one another: plain numpy, no torch.

Records of attribution graphs: plain numpy, no torch.

Legend: N nodes, E edges, T positions, L decoder layers. Node order is by layer (embeddings, then per layer the bias,
the features by position and index, the errors by position, the left-out features; last the ends, K nodes that the
graph explains: logits, or what else was asked about), so that every source comes before its targets and the adjacency
matrix is strictly lower triangular. A graph of something inside the model ends at its layer.

Records of graphs laid on one another: a comparison of two, an aggregate of many. Plain numpy, no torch.

Legend: M matched nodes, E matched edges, C columns, G graphs. Nodes that mean the same have become one; `match` says by
which rule (`vlmscope.attribution.compare`). A column is where a matched node stands: a position, a role, or the one
column of graphs that were matched without positions. A node's share is its influence over that of all nodes of
its graph, an edge's the influence that it hands down over the same sum, both of the whole graph, so that shares of
graphs of different sizes compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.core.runs import html_table, text_table


class NodeKind(IntEnum):
    """What a node stands for."""

    TOKEN = 0  # token or soft-token embedding at a position
    FEATURE = 1  # active feature at (layer, position)
    ERROR = 2  # MLP output minus reconstruction at (layer, position)
    BIAS = 3  # all constants of a layer: decoder, attention and, for its own features, encoder biases
    LOGIT = 4  # logit of a token at a position, the last one but for answers, minus the mean logit
    LEFT_OUT = 5  # active features of a layer that got no row of their own, summed
    TARGET = 6  # what else is explained: a difference of logits, a feature's pre-activation, a side of a score


# Nodes that a graph explains; it has no edges out of them.
ENDS = (NodeKind.LOGIT, NodeKind.TARGET)


@dataclass(frozen=True)
class NodeTable:
    """One row a node.

    Attributes:
        kind: `[N]` int8, `NodeKind`.
        layer: `[N]` int16; -1 for embeddings, L for logits, its own for another target.
        position: `[N]` int32; -1 for nodes without one (bias, left out).
        index: `[N]` int64; feature index (of a target that is a feature, too), token id, or -1.
        activation: `[N]` float; a feature's activation, a logit's probability, 1 for a TARGET, else 0.
        target: `[N]` float; the affine value that a row's edges sum to: a feature's pre-activation, a logit minus the
            mean logit, what a TARGET's label says; 0 for nodes without a row.
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    activation: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def of(self, kind: NodeKind) -> np.ndarray:
        """The node numbers of one kind, ascending, int64."""
        return np.flatnonzero(self.kind == kind)

    def ends(self) -> np.ndarray:
        """The node numbers of what the graph explains, ascending, int64."""
        return np.flatnonzero(np.isin(self.kind, ENDS))

    def feature_id(self, node: int) -> FeatureId:
        """The feature that a FEATURE node stands for."""
        assert self.kind[node] == NodeKind.FEATURE, f"node {node} is no feature"
        return FeatureId(int(self.layer[node]), int(self.index[node]))


@dataclass(frozen=True)
class AttributionGraph:
    """The whole graph at one input, unpruned. Edge `weights[e]` is target change per unit source times the source.

    Attributes:
        nodes: the node table.
        indptr: `[N + 1]` int64; row i (a target) owns edges `indptr[i]:indptr[i + 1]`.
        indices: `[E]` int32, source nodes, ascending in a row.
        weights: `[E]` float32 (float64 if asked), signed.
        residual: `[N]` float64, per row |target - sum of edges| / sum of |edges|; 0 for nodes without a row.
        left_out_mass: `[N, L]` float64, per row and layer the sum of |edges| from left-out features; `[N, 0]` when no
            feature was left out. The edge from a LEFT_OUT node is their signed sum.
        logit_probabilities: `[K]` float64, in the order of the ends; 1 for a TARGET.
        logit_tokens: K strings, the ends' labels: a logit's token, or words.
        tokens: T strings.
        is_image: `[T]` bool.
        image_index: `[T]` int64, -1 for text.
        patch_boxes: T entries, None for text.
        roles: `[T]` strings.
        prompt: the prompt as the user wrote it.
        meta: what it was made with (names, counts, settings).
        target_weights: `[K]` float64, what each end is worth where influence starts; the probabilities when None.
    """

    nodes: NodeTable
    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    residual: np.ndarray
    left_out_mass: np.ndarray
    logit_probabilities: np.ndarray
    logit_tokens: list[str]
    tokens: list[str]
    is_image: np.ndarray
    image_index: np.ndarray
    patch_boxes: list[PatchBox | None]
    roles: np.ndarray
    prompt: str
    meta: dict[str, str | int | float | bool] = field(default_factory=dict)
    target_weights: np.ndarray | None = None

    @property
    def end_weights(self) -> np.ndarray:
        """What each end is worth, `[K]` float64."""
        return self.logit_probabilities if self.target_weights is None else self.target_weights

    @property
    def n_nodes(self) -> int:
        """N."""
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        """E."""
        return len(self.weights)

    @property
    def n_layers(self) -> int:
        """L, of the model."""
        return int(self.meta["n_layers"])

    def edge_targets(self) -> np.ndarray:
        """The target node of every edge, `[E]` int64."""
        return np.repeat(np.arange(self.n_nodes), np.diff(self.indptr))

    def targets_of(self, edges: np.ndarray) -> np.ndarray:
        """The target nodes of some `edges [n]`, `[n]` int64, without a list of all."""
        return np.searchsorted(self.indptr, edges, side="right") - 1

    def absolute_sums(self) -> np.ndarray:
        """Sum of |edges| into each node, `[N]` float64, without a copy of all edges."""
        rows = np.flatnonzero(np.diff(self.indptr))
        out = np.zeros(self.n_nodes)
        for block in np.array_split(rows, 1 + self.n_edges // (1 << 20)):
            if len(block):
                begin = self.indptr[block[0]]
                absolute = np.abs(self.weights[begin : self.indptr[block[-1] + 1]])
                out[block] = np.add.reduceat(absolute, self.indptr[block] - begin, dtype=np.float64)
        return out

    def incoming(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and weights of the edges into a node."""
        row = slice(self.indptr[node], self.indptr[node + 1])
        return self.indices[row], self.weights[row]


@dataclass(frozen=True)
class GraphScores:
    """How much of the logits' influence the graph explains; each 0..1, defined in `vlmscope.attribution.influence`.

    Shares are of the influence that ends at sources, so `token + error + bias + left_out` is 1.
    """

    replacement: float
    completeness: float
    token_share: float
    error_share: float
    bias_share: float
    left_out_share: float


@dataclass(frozen=True)
class PrunedGraph:
    """The part of a graph that matters to its logits, as masks over the whole.

    Attributes:
        graph: the whole graph.
        node_mask: `[N]` bool, kept nodes.
        edge_mask: `[E]` bool, kept edges; both ends of a kept edge are kept.
        influence: `[N]` float64, influence on the logits in the whole graph.
        cumulative: `[N]` float64, share of the total influence of all nodes at least as influential as this one.
        scores: of the whole graph.
        node_threshold: share of influence that the kept nodes had to reach.
        edge_threshold: share of edge influence that the kept edges had to reach.
    """

    graph: AttributionGraph
    node_mask: np.ndarray
    edge_mask: np.ndarray
    influence: np.ndarray
    cumulative: np.ndarray
    scores: GraphScores
    node_threshold: float
    edge_threshold: float

    @property
    def n_nodes(self) -> int:
        """Number of kept nodes."""
        return int(self.node_mask.sum())

    @property
    def n_edges(self) -> int:
        """Number of kept edges."""
        return int(self.edge_mask.sum())


@dataclass(frozen=True, eq=False)
class MatchedNodes:
    """One row a matched node, sources before targets.

    Attributes:
        kind: `[M]` int8, `NodeKind`.
        layer: `[M]` int16; -1 for embeddings, L for logits.
        position: `[M]` int32, the number of its column; -1 for nodes that stand nowhere (bias, left out).
        index: `[M]` int64; feature index, token id, or -1 (soft tokens too: picture and box tell them apart).
        image: `[M]` int64; the picture of a soft token, else -1.
        box: `[M, 4]` float64; where in it, as `PatchBox`; NaN for all others.
        label: M strings: the token of an embedding or logit, else what the node is.
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    image: np.ndarray
    box: np.ndarray
    label: list[str]

    def __len__(self) -> int:
        return len(self.kind)

    def name(self, node: int) -> str:
        """A short name without the column: `L6/512`, `"mars"`, `error L3`."""
        if self.kind[node] == NodeKind.FEATURE:
            return str(FeatureId(int(self.layer[node]), int(self.index[node])))
        if self.kind[node] == NodeKind.LOGIT:
            return f'logit "{self.label[node]}"'
        return self.label[node]


@dataclass(frozen=True, eq=False)
class MergedGraph:
    """What comparisons and aggregates have in common.

    Attributes:
        nodes: the matched nodes.
        columns: C strings.
        column_is_image: `[C]` bool, whether soft tokens stand there.
        sources: `[E]` int32, node numbers; edges are sorted by target, then source.
        targets: `[E]` int32.
        match: the rule by which nodes were matched.
        n_layers: L, of the model.
        model: its name.
        names: G names of the graphs.
        prompts: G prompts.
    """

    nodes: MatchedNodes
    columns: list[str]
    column_is_image: np.ndarray
    sources: np.ndarray
    targets: np.ndarray
    match: str
    n_layers: int
    model: str
    names: list[str]
    prompts: list[str]

    def where(self, node: int) -> str:
        """The column of a node in words, empty where it has none."""
        at = int(self.nodes.position[node])
        return "" if at < 0 else self.columns[at]


@dataclass(frozen=True)
class ComparisonSummary:
    """A comparison in numbers.

    A node or edge counts where pruning kept it. The weighted Jaccard index is the sum of the smaller shares over the
    sum of the larger ones, 1 for equal graphs and 0 for disjoint ones; `feature_jaccard` looks at features alone, since
    biases, errors and tokens are in most graphs. `edge_correlation` is Pearson's, of the weights of the edges that both
    keep, `sign_agreement` the share of them with the same sign; NaN where there are fewer than two (none).
    """

    nodes_both: int
    nodes_first_only: int
    nodes_second_only: int
    edges_both: int
    edges_first_only: int
    edges_second_only: int
    node_jaccard: float
    feature_jaccard: float
    edge_jaccard: float
    edge_correlation: float
    sign_agreement: float


@dataclass(frozen=True, eq=False, repr=False)
class GraphComparison(MergedGraph):
    """Two graphs, matched: their nodes and edges that pruning kept in at least one, with what each has of them.

    Attributes:
        share: `[2, M]` float64, shares of influence in the first and the second graph.
        kept: `[2, M]` bool, whether pruning kept it there.
        present: `[2, M]` bool, whether it is in the whole graph.
        activation: `[2, M]` float64: a feature's largest activation, a logit's probability; NaN where it is absent.
        weights: `[2, E]` float64, signed, of the whole graphs; summed over the edges that became one; 0 where none is.
        edge_share: `[2, E]` float64.
        edge_kept: `[2, E]` bool.
    """

    share: np.ndarray
    kept: np.ndarray
    present: np.ndarray
    activation: np.ndarray
    weights: np.ndarray
    edge_share: np.ndarray
    edge_kept: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """First minus second weight, `[E]` float64."""
        return self.weights[0] - self.weights[1]

    def only(self, graph: int, kind: NodeKind | None = NodeKind.FEATURE) -> np.ndarray:
        """Nodes that pruning kept in one graph alone, those it uses most before the other first, int64.

        Args:
            graph: 0 for the first, 1 for the second.
            kind: nodes of this kind; all if None.
        """
        alone = self.kept[graph] & ~self.kept[1 - graph]
        if kind is not None:
            alone &= self.nodes.kind == kind
        found = np.flatnonzero(alone)
        return found[np.argsort(self.share[1 - graph, found] - self.share[graph, found], kind="stable")]

    def summary(self) -> ComparisonSummary:
        """The comparison in numbers."""
        features = self.nodes.kind == NodeKind.FEATURE
        both = self.edge_kept.all(axis=0)
        first, second = self.weights[:, both]
        varied = both.sum() > 1 and np.ptp(first) > 0 and np.ptp(second) > 0
        return ComparisonSummary(
            *_counts(self.kept),
            *_counts(self.edge_kept),
            node_jaccard=_jaccard(self.share),
            feature_jaccard=_jaccard(self.share[:, features]),
            edge_jaccard=_jaccard(self.edge_share),
            edge_correlation=float(np.corrcoef(first, second)[0, 1]) if varied else float("nan"),
            sign_agreement=float((np.sign(first) == np.sign(second)).mean()) if both.any() else float("nan"),
        )

    def _rows(self) -> list[tuple[str, ...]]:
        numbers = self.summary()
        counts = [("", "both", f"only {self.names[0]}", f"only {self.names[1]}", "Jaccard, by influence")]
        counts += [
            ("nodes", f"{numbers.nodes_both:,}", f"{numbers.nodes_first_only:,}", f"{numbers.nodes_second_only:,}")
            + (f"{numbers.node_jaccard:.3f} (features alone {numbers.feature_jaccard:.3f})",),
            ("edges", f"{numbers.edges_both:,}", f"{numbers.edges_first_only:,}", f"{numbers.edges_second_only:,}")
            + (f"{numbers.edge_jaccard:.3f} (correlation of shared weights {numbers.edge_correlation:.3f})",),
        ]
        tops = [self._tops(graph) for graph in (0, 1)]
        return [*counts, ("used most", "", *tops, "features, share of influence")]

    def _tops(self, graph: int, count: int = 3) -> str:
        return ", ".join(
            f"{self.nodes.name(int(n))} {self.where(int(n))} {self.share[graph, n]:.1%}"
            for n in self.only(graph)[:count]
        )

    def __repr__(self) -> str:
        title = f"GraphComparison of {self.names[0]!r} and {self.names[1]!r}, nodes matched by {self.match}"
        return f"{title}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), f"{self.names[0]} and {self.names[1]}, nodes matched by {self.match}")


@dataclass(frozen=True, eq=False, repr=False)
class AggregateGraph(MergedGraph):
    """Many graphs, matched: means over all of them, 0 counted where a graph lacks a node or edge.

    Attributes:
        share: `[M]` float64, mean share of influence.
        count: `[M]` int64, in how many graphs pruning kept it.
        present: `[M]` int64, in how many whole graphs it is.
        activation: `[M]` float64, mean over the graphs where it is present: of a feature's largest activation, of a
            logit's probability.
        weight: `[E]` float64, mean signed weight in the whole graphs.
        absolute: `[E]` float64, mean |weight|; larger than |weight| where signs differ between graphs.
        edge_share: `[E]` float64, mean share.
        edge_count: `[E]` int64, in how many graphs pruning kept it.
    """

    share: np.ndarray
    count: np.ndarray
    present: np.ndarray
    activation: np.ndarray
    weight: np.ndarray
    absolute: np.ndarray
    edge_share: np.ndarray
    edge_count: np.ndarray

    @property
    def n_graphs(self) -> int:
        """G."""
        return len(self.names)

    def top_features(self, count: int = 8) -> np.ndarray:
        """The features with the largest mean share, largest first, int64."""
        found = np.flatnonzero(self.nodes.kind == NodeKind.FEATURE)
        return found[np.argsort(-self.share[found], kind="stable")][:count]

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("feature", "where", "kept in", "mean share", "mean activation")]
        for node in self.top_features().tolist():
            often, share = f"{self.count[node]} of {self.n_graphs}", f"{self.share[node]:.2%}"
            rows.append((self.nodes.name(node), self.where(node), often, share, f"{self.activation[node]:.3g}"))
        return rows

    def _title(self) -> str:
        size = f"{len(self.nodes):,} nodes, {len(self.sources):,} edges"
        return f"{self.n_graphs} graphs, {size}, nodes matched by {self.match}"

    def __repr__(self) -> str:
        return f"AggregateGraph of {self._title()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), self._title())


def _counts(kept: np.ndarray) -> Sequence[int]:
    """In both, only in the first, only in the second."""
    first, second = kept
    return int((first & second).sum()), int((first & ~second).sum()), int((second & ~first).sum())


def _jaccard(shares: np.ndarray) -> float:
    """Sum of the smaller of `shares [2, n]` over that of the larger; NaN of nothing."""
    larger = shares.max(axis=0, initial=0.0).sum()
    return float(shares.min(axis=0).sum() / larger) if larger > 0 else float("nan")
