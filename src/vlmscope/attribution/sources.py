"""What is written into the stream at each layer's MLP, position by position, and which column each edge goes to.

Legend: T positions, d width, K features of one position that write to a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.attribution.columns import Columns, columns_of
from vlmscope.replacement.features import LayerFeatures
from vlmscope.replacement.model import ReplacementModel

# Vectors of all layers are kept when they fit into this many bytes, else gathered anew for each batch.
CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class LayerSources:
    """Sources of one layer.

    Attributes:
        vectors: `[T, K + 2, d]`: features (zero where a position has fewer), error, decoder bias, all write-scaled.
        columns: `[T, K + 1]`: of features and error; padding points at the scratch column after the last.
    """

    vectors: Tensor
    columns: Tensor


class SourceVectors:
    """The sources of all layers, kept once they were gathered if that takes at most `cache_bytes`."""

    def __init__(self, replacement: ReplacementModel, cache_bytes: float = CACHE_BYTES) -> None:
        self.replacement = replacement
        self.columns: Columns = columns_of(replacement)
        self._cache: dict[int, LayerSources] | None = {} if sum(self.layer_bytes()) <= cache_bytes else None

    @property
    def cached(self) -> bool:
        """Whether they are kept."""
        return self._cache is not None

    def layer_bytes(self) -> list[int]:
        """Memory of each layer's sources."""
        errors = self.replacement.errors
        element, (n_layers, positions, width) = errors.element_size(), errors.shape
        writers = [self._writers_at_a_position(layer) for layer in range(n_layers)]
        return [positions * ((most + 2) * width * element + (most + 1) * 8) for most in writers]

    def of(self, layer: int) -> LayerSources:
        """One layer's sources."""
        if self._cache is None:
            return self._gather(layer)
        if layer not in self._cache:
            self._cache[layer] = self._gather(layer)
        return self._cache[layer]

    def _gather(self, layer: int) -> LayerSources:
        replacement = self.replacement
        positions, width = replacement.errors.shape[1:]
        most = self._writers_at_a_position(layer)
        vectors = replacement.errors.new_zeros(positions, most + 2, width)
        columns = torch.full((positions, most + 1), -1, dtype=torch.int64, device=vectors.device)
        first = 0
        for lower in self._writers(layer):
            features = replacement.features[lower]
            number, slot = numbers_and_slots(features)
            vectors[features.position, first + slot] = features.vectors(layer - lower)
            columns[features.position, first + slot] = self.columns.features(lower) + number
            first += most_at_a_position(features)
        vectors[:, -2] = replacement.errors[layer]
        vectors[:, -1] = replacement.features[layer].b_dec
        vectors *= replacement.layers[layer].write_scale[:, None]
        columns[:, -1] = self.columns.errors(layer) + torch.arange(positions, device=vectors.device)
        return LayerSources(vectors, columns)

    def _writers(self, layer: int) -> list[int]:
        """The layers whose features write at a layer's MLP: itself, and lower ones of a cross-layer set."""
        return [low for low in range(layer + 1) if self.replacement.features[low].reaches(layer - low)]

    def _writers_at_a_position(self, layer: int) -> int:
        """K of a layer."""
        return sum(most_at_a_position(self.replacement.features[low]) for low in self._writers(layer))


def most_at_a_position(features: LayerFeatures) -> int:
    """The largest number of active features at one position."""
    return max(after - before for before, after in zip(features.offsets[:-1], features.offsets[1:], strict=True))


def numbers_and_slots(features: LayerFeatures) -> tuple[Tensor, Tensor]:
    """`[n]` int64 each: the numbers of a layer's active features, and their places among those of their position."""
    offsets = torch.tensor(features.offsets, device=features.position.device)
    number = torch.arange(len(features), device=features.position.device)
    return number, number - offsets[features.position]
