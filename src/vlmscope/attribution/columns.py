"""Where each source has its column in a row of edges, before nodes are chosen.

Order: T embeddings; then for each layer its bias, its active features (by position, index) and its T errors. A target
of layer t reads the columns before `start[t]` and, for its own biases, `start[t]` itself: rows are prefixes.
"""

from dataclasses import dataclass

import numpy as np

from vlmscope.replacement.model import ReplacementModel


@dataclass(frozen=True)
class Columns:
    """Column numbers of the sources.

    Attributes:
        start: `[L + 1]`; the bias of layer l is column `start[l]`, and `start[L]` is the number of columns.
        n_features: `[L]`, active features of each layer.
        n_positions: T.
    """

    start: np.ndarray
    n_features: np.ndarray
    n_positions: int

    @property
    def total(self) -> int:
        """Number of columns."""
        return int(self.start[-1])

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.n_features)

    def bias(self, layer: int) -> int:
        """Column of a layer's bias."""
        return int(self.start[layer])

    def features(self, layer: int) -> int:
        """First column of a layer's features."""
        return int(self.start[layer]) + 1

    def errors(self, layer: int) -> int:
        """First column of a layer's errors."""
        return self.features(layer) + int(self.n_features[layer])

    def all_features(self) -> np.ndarray:
        """The columns of all features in the order of the feature table, int64."""
        spans = [self.features(layer) + np.arange(self.n_features[layer]) for layer in range(self.n_layers)]
        return np.concatenate(spans).astype(np.int64)


def columns_of(replacement: ReplacementModel) -> Columns:
    """The column layout of a replacement model."""
    counts = np.array([len(features) for features in replacement.features], dtype=np.int64)
    widths = 1 + counts + replacement.n_positions
    start = replacement.n_positions + np.concatenate([[0], np.cumsum(widths)])
    return Columns(start, counts, replacement.n_positions)
