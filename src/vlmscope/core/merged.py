"""Records of graphs laid on one another: a comparison of two, an aggregate of many. Plain numpy, no torch.

Legend: M matched nodes, E matched edges, C columns, G graphs. Nodes that mean the same have become one; `match` says by
which rule (`vlmscope.attribution.matching`). A column is where a matched node stands: a position, a role, or the one
column of graphs that were matched without positions. A node's share is its influence over that of all nodes of
its graph, an edge's the influence that it hands down over the same sum, both of the whole graph, so that shares of
graphs of different sizes compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlmscope.core.graph import NodeKind
from vlmscope.core.ids import FeatureId
from vlmscope.core.tables import html_table, text_table


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
