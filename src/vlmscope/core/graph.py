"""Records of attribution graphs: plain numpy, no torch.

Legend: N nodes, E edges, T positions, L decoder layers. Node order is by layer (embeddings, then per layer the bias,
the features by position and index, the errors by position, the left-out features; last the ends, K nodes that the
graph explains: logits, or what else was asked about), so that every source comes before its targets and the adjacency
matrix is strictly lower triangular. A graph of something inside the model ends at its layer.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from vlmscope.core.ids import FeatureId
from vlmscope.core.images import PatchBox


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
    """How much of the logits' influence the graph explains; each 0..1, defined in `vlmscope.attribution.scores`.

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
