"""Records of attribution graphs, of merged graphs and of maps over pictures: plain numpy, no torch.

Legend: N nodes, E edges, T positions, L decoder layers, K ends. Nodes are ordered by layer: embeddings; then per layer
the bias, the features by position and index, the errors by position, the left-out features; last the K ends, which the
graph explains (logits or other targets). With transcoders of the vision tower its bias, patches, features and errors
come before them, at layers from `TOWER - 1` on and at positions from T on, one for each token of the tower. So every
source comes before its targets, and the adjacency matrix is strictly lower triangular. A graph of a target inside the
model ends at its layer.

Legend of a comparison of two graphs: M matched nodes, E matched edges, C columns. Equivalent nodes are merged by the
rule `match` (`attribution/compare.py`). A column is the place of a matched node: a position, a role, or the only column
of graphs matched without positions. The share of a node is its influence over that of all nodes of its graph; the share
of an edge is the influence that it passes on over the same sum. Both refer to the whole graph, so shares are comparable
between graphs of different sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from vlmscope.core.records import TOWER, FeatureId, PatchBox
from vlmscope.core.results import Shown, printable


class NodeKind(IntEnum):
    """What a node stands for."""

    TOKEN = 0  # token or soft-token embedding at a position
    FEATURE = 1  # active feature at (layer, position)
    ERROR = 2  # MLP output minus reconstruction at (layer, position)
    BIAS = 3  # all constants of a layer: decoder, attention and, for its own features, encoder biases
    LOGIT = 4  # logit of a token at a position, the last one but for answers, minus the mean logit
    LEFT_OUT = 5  # active features of a layer without a row of their own, summed
    TARGET = 6  # another explained quantity: a difference of logits, a feature's pre-activation, a side of a score


ENDS = (NodeKind.LOGIT, NodeKind.TARGET)  # the nodes that a graph explains, without outgoing edges


class Source(NamedTuple):
    """A source in a graph or left out of it: fields as in `NodeTable`."""

    kind: NodeKind
    layer: int
    position: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]


@dataclass(frozen=True)
class NodeTable:
    """Attributes of the nodes, one row per node."""

    kind: np.ndarray  # [N] int8, `NodeKind`
    layer: np.ndarray  # [N] int16; -1 for embeddings, L for logits, the layer of another target
    position: np.ndarray  # [N] int32; -1 for nodes without one (bias, left out)
    index: np.ndarray  # [N] int64; feature index (also of a feature as TARGET), token id, or -1
    activation: np.ndarray  # [N] float; a feature's activation, a logit's probability, 1 for a TARGET, else 0
    # [N] float; the affine value that a row's edges sum to: a feature's pre-activation, a logit minus the mean logit,
    # the quantity that a TARGET's label names; 0 for nodes without a row
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def of(self, kind: NodeKind) -> np.ndarray:
        """Node numbers of one kind, ascending, int64."""
        return np.flatnonzero(self.kind == kind)

    def ends(self) -> np.ndarray:
        """Node numbers of the ends, ascending, int64."""
        return np.flatnonzero(np.isin(self.kind, ENDS))

    def source(self, node: int) -> Source:
        """What identifies a node of any kind but TARGET."""
        return Source(
            NodeKind(self.kind[node]), *(int(values[node]) for values in (self.layer, self.position, self.index))
        )

    def activation_of(self, source: Source) -> float | None:
        """The activation of a feature, None where it is no node."""
        same = [getattr(self, name) == value for name, value in source._asdict().items()]
        found = np.flatnonzero(np.all(same, axis=0))
        return float(self.activation[found[0]]) if len(found) else None

    def level_numbers(self, n_levels: int) -> np.ndarray:
        """The column of each node's layer in `left_out_mass`, the vision tower's from the last one back, `[N]`."""
        return np.where(self.layer < 0, n_levels - 1 - (self.layer.astype(np.int64) - TOWER), self.layer)

    def feature_id(self, node: int) -> FeatureId:
        """The feature that a FEATURE node stands for."""
        assert self.kind[node] == NodeKind.FEATURE, f"node {node} is no feature"
        return FeatureId(int(self.layer[node]), int(self.index[node]))


@dataclass(frozen=True)
class AttributionGraph:
    """The unpruned graph of one input; edge weights are target change per unit of the source, times the source."""

    nodes: NodeTable
    indptr: np.ndarray  # [N + 1] int64; the edges into node i are `indptr[i]:indptr[i + 1]`
    indices: np.ndarray  # [E] int32, source nodes, ascending within a row
    weights: np.ndarray  # [E] float32 (float64 if asked), signed
    residual: np.ndarray  # [N] float64, |target - sum of edges| / sum of |edges|; 0 for nodes without a row
    # [N, L] float64 (and a column for each layer of the tower), per row and layer the sum of |edges| from left-out
    # features; [N, 0] when none was left out. The edge from a LEFT_OUT node is their signed sum.
    left_out_mass: np.ndarray
    logit_probabilities: np.ndarray  # [K] float64, in the order of the ends; 1 for a TARGET
    logit_tokens: list[str]  # K labels of the ends: a logit's token, or words
    tokens: list[str]  # T, then as many for the tokens of the vision tower as there are
    is_image: np.ndarray  # [T] bool
    image_index: np.ndarray  # [T] int64, -1 for text
    patch_boxes: list[PatchBox | None]  # T, None for text
    roles: np.ndarray  # [T] strings
    prompt: str  # as the user wrote it
    meta: dict[str, str | int | float | bool] = field(default_factory=dict)  # names, counts, settings
    target_weights: np.ndarray | None = None  # [K] float64, the influence of the ends; None for the probabilities

    @property
    def end_weights(self) -> np.ndarray:
        """Weight of each end, at which influence starts, `[K]` float64."""
        return self.logit_probabilities if self.target_weights is None else self.target_weights

    @property
    def n_nodes(self) -> int:
        return len(self.nodes)

    @property
    def n_edges(self) -> int:
        return len(self.weights)

    @property
    def n_layers(self) -> int:
        return int(self.meta["n_layers"])

    def edge_targets(self) -> np.ndarray:
        """Target node of every edge, `[E]` int64."""
        return np.repeat(np.arange(self.n_nodes), np.diff(self.indptr))

    def targets_of(self, edges: np.ndarray) -> np.ndarray:
        """Target nodes of `edges [n]`, `[n]` int64, without expanding all edges."""
        return np.searchsorted(self.indptr, edges, side="right") - 1

    def absolute_sums(self, inside: np.ndarray | None = None) -> np.ndarray:
        """Sum of |edges| into each node, from the sources `inside [N]` alone if given, `[N]` float64."""
        # In blocks, so that |weights| of a large graph is never copied as a whole.
        rows = np.flatnonzero(np.diff(self.indptr))
        out = np.zeros(self.n_nodes)
        for block in np.array_split(rows, 1 + self.n_edges // (1 << 20)):
            if len(block):
                begin = self.indptr[block[0]]
                edges = slice(begin, self.indptr[block[-1] + 1])
                absolute = np.abs(self.weights[edges])
                if inside is not None:
                    absolute = absolute * inside[self.indices[edges]]
                out[block] = np.add.reduceat(absolute, self.indptr[block] - begin, dtype=np.float64)
        return out

    @property
    def n_patches(self) -> int:
        """Positions after those of the prompt, of the vision tower's tokens."""
        return int(self.meta.get("n_patches", 0))

    def prompt_positions(self) -> np.ndarray:
        """For each position the one of the prompt: a patch has that of the soft token whose box holds its centre."""
        count = len(self.tokens) - self.n_patches
        boxes = {position: box for position, box in enumerate(self.patch_boxes) if box is not None}
        soft = [position for position in boxes if position < count]
        out = np.arange(len(self.tokens))
        for position in range(count, len(self.tokens)):
            mine = [p for p in soft if self.image_index[p] == self.image_index[position]] or soft
            inside = [p for p in mine if position in boxes and boxes[p].holds(*boxes[position].centre)]
            out[position] = (inside or mine)[0]
        return out

    def place(self, position: int) -> str:
        """A position in words: `picture, top left`, `picture 2, centre`, or the token with its number."""
        box = self.patch_boxes[position]
        if box is None:
            return f"{printable(self.tokens[position].strip()) or 'a blank'!r} at {position}"
        down = ("top", "middle", "bottom")[min(int(3 * (box.top + box.bottom) / 2), 2)]
        across = ("left", "middle", "right")[min(int(3 * (box.left + box.right) / 2), 2)]
        number = f" {self.image_index[position] + 1}" if self.image_index.max() > 0 else ""
        return f"picture{number}, " + ("centre" if down == across == "middle" else f"{down} {across}")

    def incoming(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and weights of the edges into a node."""
        row = slice(self.indptr[node], self.indptr[node + 1])
        return self.indices[row], self.weights[row]


@dataclass(frozen=True)
class GraphScores:
    """How much of the logits' influence the graph explains, each 0..1 (`vlmscope.attribution.influence`).

    Shares refer to the influence that ends at sources, so `token + error + bias + left_out` is 1; `image` is the part
    of `token` that ends at soft tokens. The last two scores are without biases, as circuit-tracer computes them.
    """

    replacement: float
    completeness: float
    token_share: float
    error_share: float
    bias_share: float
    left_out_share: float
    image_share: float
    replacement_no_bias: float
    completeness_no_bias: float


@dataclass(frozen=True)
class QueryKeys:
    """Why a head attends: its score before the softmax as a sum of terms of sources (`attribution/heads.py`).

    Listed are the strongest terms, each side fixed at the other's value for `queries` and `keys`.
    """

    node: int  # whose edges the head carries most of; -1 where none is known
    layer: int
    head: int
    query: int  # positions
    key: int
    score: float  # the model's own
    probability: float  # of the pattern there
    total: float  # sum of the terms of all pairs: the score, up to rounding
    sizes: float  # sum of their sizes
    pairs: list[tuple[Source, Source, float]]
    queries: list[tuple[Source, float]]
    keys: list[tuple[Source, float]]


@dataclass(frozen=True)
class EdgeHeads:
    """Kept edges, the strongest first, by the last head on the path from source to target (`attribution/heads.py`)."""

    edges: np.ndarray  # [n] int64, numbers of edges
    strength: np.ndarray  # [n] float64, the influence that the edge hands down
    loadings: np.ndarray  # [n, L, H] float, through each head; with the next two they sum to the edge
    stream: np.ndarray  # [n] float64, without heads: in the residual stream, constants of the target included
    skip: np.ndarray  # [n] float64, without heads, through skip paths of transcoders
    query_keys: list[QueryKeys] = field(default_factory=list)
    seconds: float = 0.0

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """The influence of each edge divided by sizes of its parts: what stays, `[n]`, and by head `[n, L, H]`."""
        stays, heads = np.abs(self.stream) + np.abs(self.skip), np.abs(self.loadings).astype(np.float64)
        total = stays + heads.sum((1, 2))
        each = self.strength / np.where(total > 0, total, 1.0)
        return each * stays, each[:, None, None] * heads

    def ranked(self) -> list[tuple[int, int, float]]:
        """(layer, head, share of the influence of these edges), the largest first."""
        heads, whole = self.parts()[1].sum(0), self.strength.sum()
        order = np.argsort(-heads, axis=None, kind="stable")
        ranked = [divmod(number, heads.shape[1]) for number in order.tolist()]
        return [(layer, head, float(heads[layer, head] / whole)) for layer, head in ranked if heads[layer, head] > 0]

    def residual(self, graph: AttributionGraph) -> float:
        """The largest |edge - sum of its parts| / sum of |edges into its target|."""
        if not len(self.edges):
            return 0.0
        gap = np.abs(graph.weights[self.edges] - self.stream - self.skip - self.loadings.sum((1, 2), dtype=np.float64))
        return float((gap / graph.absolute_sums()[graph.targets_of(self.edges)]).max())


@dataclass(frozen=True)
class PrunedGraph:
    """The part of a graph with most influence on its ends, as masks over the whole graph."""

    graph: AttributionGraph
    node_mask: np.ndarray  # [N] bool, kept nodes
    edge_mask: np.ndarray  # [E] bool, kept edges; both ends of a kept edge are kept
    influence: np.ndarray  # [N] float64, on the ends in the whole graph
    cumulative: np.ndarray  # [N] float64, share of the total influence of all nodes at least as influential as this one
    scores: GraphScores  # of the whole graph
    node_threshold: float  # share of influence that the kept nodes had to reach
    edge_threshold: float  # the same for edges
    bias: str = "node"  # "fold": biases have no influence, and rows are normalised without them
    heads: EdgeHeads | None = None  # None where they were not asked for

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
    """Attributes of matched nodes, one row per node, sources before targets."""

    kind: np.ndarray  # [M] int8, `NodeKind`
    layer: np.ndarray  # [M] int16; -1 for embeddings, L for logits
    position: np.ndarray  # [M] int32, column number; -1 for nodes without a place (bias, left out)
    index: np.ndarray  # [M] int64; feature index, token id, or -1 (also soft tokens, which `image` and `box` identify)
    image: np.ndarray  # [M] int64; the picture of a soft token, else -1
    box: np.ndarray  # [M, 4] float64; its part of the picture, as `PatchBox`; NaN for other nodes
    label: list[str]  # M: the token of an embedding or logit, else a name

    def __len__(self) -> int:
        return len(self.kind)

    def name(self, node: int) -> str:
        """A short name without the column: `L6/512`, `"mars"`, `error L3`."""
        if self.kind[node] == NodeKind.FEATURE:
            return str(FeatureId(int(self.layer[node]), int(self.index[node])))
        if self.kind[node] == NodeKind.LOGIT:
            return f'logit "{self.label[node]}"'
        return self.label[node]


@dataclass(frozen=True)
class ComparisonSummary:
    """Numbers of a comparison; counts are of nodes and edges that pruning kept.

    The weighted Jaccard index is the sum of the smaller shares over the sum of the larger ones, 1 for equal graphs and
    0 for disjoint ones; `feature_jaccard` is of features alone, since biases, errors and tokens are in most graphs.
    `edge_correlation` is Pearson's correlation of the weights of edges that both graphs keep (NaN for fewer than two),
    `sign_agreement` the share of those edges with equal signs (NaN for none).
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
class GraphComparison(Shown):
    """Two matched graphs: the nodes and edges that pruning kept in at least one, with their values in each graph.

    It prints as a table, in notebooks as HTML.
    """

    nodes: MatchedNodes
    columns: list[str]  # C
    column_is_image: np.ndarray  # [C] bool, columns of soft tokens
    sources: np.ndarray  # [E] int32, node numbers; edges are sorted by target, then source
    targets: np.ndarray  # [E] int32
    match: str  # the rule by which nodes were matched
    n_layers: int  # L
    model: str
    names: list[str]  # 2
    prompts: list[str]  # 2

    share: np.ndarray  # [2, M] float64, shares of influence in the first and the second graph
    kept: np.ndarray  # [2, M] bool, whether pruning kept the node
    present: np.ndarray  # [2, M] bool, whether it is in the whole graph
    activation: np.ndarray  # [2, M] float64, a feature's largest activation, a logit's probability; NaN where absent
    weights: np.ndarray  # [2, E] float64, signed, of the whole graphs; sums over merged edges; 0 where absent
    edge_share: np.ndarray  # [2, E] float64
    edge_kept: np.ndarray  # [2, E] bool

    def where(self, node: int) -> str:
        """The column of a node in words; empty if it has none."""
        column = int(self.nodes.position[node])
        return "" if column < 0 else self.columns[column]

    @property
    def difference(self) -> np.ndarray:
        """First minus second weight, `[E]` float64."""
        return self.weights[0] - self.weights[1]

    def only(self, graph: int, kind: NodeKind | None = NodeKind.FEATURE) -> np.ndarray:
        """Nodes of a kind kept only in graph 0 or 1, by how much their share there exceeds the other, int64."""
        alone = self.kept[graph] & ~self.kept[1 - graph]
        if kind is not None:
            alone &= self.nodes.kind == kind
        nodes = np.flatnonzero(alone)
        return nodes[np.argsort(self.share[1 - graph, nodes] - self.share[graph, nodes], kind="stable")]

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

    def _title(self) -> str:
        return f"GraphComparison of {self.names[0]!r} and {self.names[1]!r}, nodes matched by {self.match}"

    def _rows(self) -> list[tuple[str, ...]]:
        numbers = self.summary()
        rows: list[tuple[str, ...]] = [
            ("", "both", f"only {self.names[0]}", f"only {self.names[1]}", "Jaccard, by influence")
        ]
        for what, index, more in (
            ("node", numbers.node_jaccard, f"features alone {numbers.feature_jaccard:.3f}"),
            ("edge", numbers.edge_jaccard, f"correlation of shared weights {numbers.edge_correlation:.3f}"),
        ):
            counts = [getattr(numbers, f"{what}s_{part}") for part in ("both", "first_only", "second_only")]
            rows.append((f"{what}s", *(f"{count:,}" for count in counts), f"{index:.3f} ({more})"))
        tops = [
            ", ".join(
                f"{self.nodes.name(node)} {self.where(node)} {self.share[graph, node]:.1%}"
                for node in self.only(graph)[:3].tolist()
            )
            for graph in (0, 1)
        ]
        return [*rows, ("used most", "", *tops, "features, share of influence")]


def _counts(kept: np.ndarray) -> Sequence[int]:
    """Numbers of elements in both, only in the first, only in the second row of `kept [2, n]`."""
    first, second = kept
    return int((first & second).sum()), int((first & ~second).sum()), int((second & ~first).sum())


def _jaccard(shares: np.ndarray) -> float:
    """Weighted Jaccard index of `shares [2, n]`; NaN if all are 0."""
    larger = shares.max(axis=0, initial=0.0).sum()
    return float(shares.min(axis=0).sum() / larger) if larger > 0 else float("nan")


# Maps of patch contributions to a target or a soft token. In files a map is a small uint8 grid, made coarser if
# necessary, with two numbers to restore the values.

LEVELS = 255


@dataclass(frozen=True)
class Grids:
    """n maps on one grid, with values `low + step * code`.

    The error is at most `step / 2`, (largest - least) / 510 of the map, plus the float32 rounding of `low` and `step`.
    """

    codes: np.ndarray  # [n, rows, columns] uint8
    low: np.ndarray  # [n] float32, the least value of each map
    step: np.ndarray  # [n] float32; 0 where all values are equal


def encode_maps(values: np.ndarray) -> Grids:
    """Round `[n, rows, columns]` finite values to 256 levels between each map's least and largest value."""
    wide = np.asarray(values, np.float64)
    assert np.isfinite(wide).all(), "a map has values that are no numbers"
    axes = (1, 2)
    low = wide.min(axes).astype(np.float32)
    step = ((wide.max(axes) - low.astype(np.float64)) / LEVELS).astype(np.float32)
    safe = np.where(step > 0, step, 1).astype(np.float64)
    codes = (wide - low.astype(np.float64)[:, None, None]) / safe[:, None, None]
    return Grids(np.clip(np.rint(codes), 0, LEVELS).astype(np.uint8), low, step)


def decode_maps(grids: Grids) -> np.ndarray:
    """Values `[n, rows, columns]` in float64."""
    low, step = (part.astype(np.float64)[:, None, None] for part in (grids.low, grids.step))
    return low + step * grids.codes


def coarse_shape(rows: int, columns: int, most: int) -> tuple[int, int]:
    """The largest grid of about the same aspect ratio with at most `most` cells; unchanged if it fits."""
    if rows * columns <= most:
        return rows, columns
    factor = (most / (rows * columns)) ** 0.5
    down = min(max(1, int(rows * factor)), most)
    return down, max(1, min(int(columns * factor), most // down))


def resample(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Spread `[.., h, w]` over another grid of the same area, by overlap: `[.., rows, columns]` with equal sum."""
    down, across = _overlaps(values.shape[-2], rows), _overlaps(values.shape[-1], columns)
    return down @ values @ across.T


def _overlaps(old: int, new: int) -> np.ndarray:
    """`[new, old]`: the share of each old cell that each new one covers; columns sum to 1."""
    edges_old, edges_new = np.arange(old + 1) / old, np.arange(new + 1) / new
    low = np.maximum(edges_old[None, :-1], edges_new[:-1, None])
    high = np.minimum(edges_old[None, 1:], edges_new[1:, None])
    return np.maximum(high - low, 0.0) * old


@dataclass(frozen=True)
class TileMap:
    """Contributions on one grid of patches."""

    boxes: list[PatchBox]  # rows * columns parts of the picture, row by row
    values: np.ndarray  # [rows, columns] float64, signed, in units of the target (logits, say)


@dataclass(frozen=True)
class PictureMap:
    """Contributions of one picture to one target, by patch: `edge = sum of tiles + sum of remainder`.

    The remainder comes from no patch of the picture, by name: "position" embeddings, "class_token", "baseline" (the
    patches of the baseline), "padding" (patches outside the picture), "bias" (all other constants), and for a feature's
    own activation "no_patch" (soft tokens without patches, such as the end of a row).
    """

    target: str
    picture: int  # its number in the prompt
    tiles: list[TileMap]  # in the order of the tower; several for models that divide a picture into tiles
    edge: float  # the sum of the edges from the picture's soft tokens, computed without the patches
    remainder: dict[str, float]

    @property
    def from_patches(self) -> float:
        """Sum over the patches."""
        return float(sum(tile.values.sum() for tile in self.tiles))

    @property
    def residual(self) -> float:
        """|edge - patches - remainder| relative to the sum of the absolute parts."""
        parts = [self.from_patches, *self.remainder.values()]
        scale = sum(np.abs(tile.values).sum() for tile in self.tiles) + sum(map(abs, self.remainder.values()))
        return abs(self.edge - sum(parts)) / scale if scale else abs(self.edge)

    def raster(self, height: int, width: int) -> np.ndarray:
        """`[height, width]` float64: contributions spread evenly over their boxes, summed over tiles.

        The sum is `from_patches`, except for patches of padding alone, whose boxes have no area.
        """
        out = np.zeros((height, width))
        for tile in self.tiles:
            for box, value in zip(tile.boxes, tile.values.ravel(), strict=True):
                if box.right > box.left and box.bottom > box.top:
                    left, top, right, bottom = box.pixels(width, height)
                    out[top:bottom, left:right] += value / ((right - left) * (bottom - top))
        return out


@dataclass(frozen=True)
class TokenTile:
    """Contributions of one grid of patches to soft tokens."""

    boxes: list[PatchBox]  # rows * columns parts of the picture, row by row
    tokens: np.ndarray  # [n] int64, numbers within the picture of the soft tokens that this tile contributes to
    values: np.ndarray  # [n, rows, columns] float64


@dataclass(frozen=True)
class TokenMaps:
    """One map over patches for every soft token of a picture."""

    kind: str  # "rollout" or "similarity"
    picture: int  # its number in the prompt
    tiles: list[TokenTile]  # in the order of the tower
    class_token: np.ndarray  # [S] float64, contributions of class tokens, which have no place in the picture

    def weighted(self, weights: np.ndarray, target: str) -> PictureMap:
        """Sum of the soft tokens' maps weighted by `weights [S]`, such as a feature's activations."""
        tiles = [
            TileMap(tile.boxes, np.tensordot(weights[tile.tokens].astype(np.float64), tile.values, 1))
            for tile in self.tiles
        ]
        rest = float(weights @ self.class_token)
        total = rest + float(sum(tile.values.sum() for tile in tiles))
        return PictureMap(target, self.picture, tiles, total, {"class_token": rest} if self.class_token.any() else {})
