"""How large one attribution graph gets and what computing it takes, before anything runs.

Counted as `vlmscope.attribution` works: a row of edges for each feature kept and each logit, over the columns of
`vlmscope.attribution.columns`. Exact are the active features, rows, nodes and columns. The edges are those that causal
attention can carry (a graph comes within a tenth of them), with rows taken to lie evenly over layers and positions:
when not all features get one, those chosen lie otherwise, and edges may differ by a factor of two.
Legend: T positions, L layers, d width, H heads, Hkv key/value heads, D head width, k features a position.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmscope.attribution.config import AttributionConfig

_CACHE_BYTES = 1 << 30  # of `vlmscope.attribution.sources`, which needs torch


@dataclass(frozen=True)
class GraphSizes:
    """Sizes of one graph.

    Attributes:
        n_layers: L.
        d_model: d.
        query_width: H * D, the mean over the layers.
        value_width: Hkv * D, the mean over the layers.
        n_tokens: T.
        image: first and last-plus-one position of soft tokens that see each other; equal when there are none.
        k: active features of a position.
        skip: whether the transcoders have a skip path.
        config: settings of the graph.
    """

    n_layers: int
    d_model: int
    query_width: float
    value_width: float
    n_tokens: int
    image: tuple[int, int]
    k: int
    skip: bool
    config: AttributionConfig

    @property
    def active(self) -> int:
        """Active features of all layers and positions."""
        return self.k * self.n_tokens * self.n_layers

    @property
    def rows(self) -> int:
        """Features with a row of their own."""
        return min(self.active, self.config.max_nodes)

    @property
    def batch_size(self) -> int:
        """Targets swept at once."""
        return self.config.targets_at_once(self.n_tokens, self.d_model)

    @property
    def left_out(self) -> bool:
        """Whether some features share a node with others of their layer."""
        return self.rows < self.active

    @property
    def columns(self) -> int:
        """Sources: embeddings, and each layer's bias, features and errors."""
        return self.n_tokens + self.n_layers * (1 + self.n_tokens * (self.k + 1))

    @property
    def nodes(self) -> int:
        """Nodes of the graph when every logit target that may be there is."""
        per_layer = 1 + self.n_tokens + int(self.left_out)
        return self.n_tokens + self.n_layers * per_layer + self.rows + self.config.max_logits

    @property
    def element(self) -> int:
        """Bytes of a number of the sweep."""
        return 8 if self.config.dtype == "float64" else 4

    @cached_property
    def visible(self) -> np.ndarray:
        """`[T]`: how many positions each position sees, itself included."""
        seen = np.arange(1, self.n_tokens + 1)
        seen[self.image[0] : self.image[1]] = self.image[1]
        return seen

    def _edges(self, features: float, shared: int) -> float:
        """Edges of all rows when a source position has `features` columns and a layer `shared` beside its bias."""
        below = np.arange(self.n_layers)[:, None]
        feature_rows = self.visible * (1 + below * (features + 1)) + below * (1 + shared) + 1  # [L, T]
        logit = self.n_tokens + self.n_layers * (self.n_tokens * (features + 1) + 1 + shared)
        return float(feature_rows.mean() * self.rows + logit * self.config.max_logits)

    @property
    def edges_computed(self) -> float:
        """Edges that the sweeps find."""
        return self._edges(self.k, 0)

    @property
    def edges(self) -> float:
        """Edges of the finished graph: features that were left out share a column a layer."""
        if not self.left_out:
            return self.edges_computed
        return self._edges(self.k * self.rows / self.active, 1)

    @property
    def csr_bytes(self) -> float:
        """The finished graph's rows: a weight and a 4-byte column an edge."""
        return self.edges * (self.element + 4)

    @property
    def peak_bytes(self) -> float:
        """Host memory while the rows are assembled: as they came, and in node order."""
        return (self.edges_computed + self.edges) * (self.element + 4)

    @property
    def file_bytes(self) -> float:
        """`graph.safetensors`: edges with their mask, node tables, and the left-out mass of each layer."""
        tables = 52 + (8 * self.n_layers if self.left_out else 0)
        return self.edges * (self.element + 5) + self.nodes * tables

    @property
    def row_buffer_bytes(self) -> float:
        """Dense rows of one batch: as swept, absolute values, a byte for which are there, and int64 places of these."""
        return self.batch_size * self.columns * (2 * self.element + 9)

    @property
    def gradient_bytes(self) -> float:
        """Gradients of one batch at all positions: stream, through the output projection, and through the pattern."""
        per_position = 2 * self.d_model + self.query_width + 2 * self.value_width
        return self.batch_size * self.n_tokens * per_position * self.element

    @property
    def source_bytes(self) -> float:
        """Vectors that sources write: of all layers when they fit the cache, else of one layer at a time."""
        layer = self.n_tokens * (self.k + 2) * self.d_model * self.element
        return layer * self.n_layers if layer * self.n_layers <= _CACHE_BYTES else layer

    def _attention_flops(self, seen: np.ndarray) -> np.ndarray:
        values, queries = self.value_width, self.query_width
        return 2.0 * seen * (self.d_model * (queries + values) + seen * queries)

    def _mlp_flops(self, seen: np.ndarray) -> np.ndarray:
        return 2.0 * seen * self.d_model * (self.k + 2 + (self.d_model if self.skip else 0))

    @property
    def flops(self) -> float:
        """Operations of all sweeps."""
        below = np.arange(self.n_layers)[:, None]
        rows = (below + 1) * self._attention_flops(self.visible) + below * self._mlp_flops(self.visible)  # [L, T]
        whole = np.array(self.n_tokens)
        logit = self.n_layers * (self._attention_flops(whole) + self._mlp_flops(whole))
        return float(rows.mean() * self.rows + logit * self.config.max_logits)

    @property
    def bytes_moved(self) -> float:
        """Memory traffic of all sweeps: each layer reads and writes its gradients and reads weights and sources."""
        batches = self.rows / self.batch_size + self.config.max_logits / self.batch_size
        weights = self.d_model * (self.query_width + self.value_width)
        sources = self.n_tokens * (self.k + 2) * self.d_model
        share = float(self.visible.mean()) / self.n_tokens
        layer = 2 * self.gradient_bytes * share + (weights + sources) * self.element
        return batches * layer * self.n_layers / 2
