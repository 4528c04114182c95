"""Rows of edges as they are computed: compressed in batches, with what influence and completeness need of them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.storage import Memory
from vlmscope.attribution.targets import Targets


@dataclass(frozen=True)
class RowChunk:
    """Rows of one batch of targets of one layer, as CSR over the columns of `vlmscope.attribution.columns`.

    Attributes:
        layer: layer of the targets, L for logits.
        targets: `[B]` int64, rows of the feature table, or numbers of ends.
        counts: `[B]` int64, edges of each row.
        indices: int32, columns, ascending in a row.
        weights: float, edges; exact zeros are not stored.
        absolute: `[B]` float64, sum of |edges| of each row, before any rounding to the stored dtype.
        residual: `[B]` float64, |target - sum of edges| / sum of |edges|.
        values: `[B]` float64, the targets' own affine values.
    """

    layer: int
    targets: np.ndarray
    counts: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    absolute: np.ndarray
    residual: np.ndarray
    values: np.ndarray


def _chunk(layer: int, targets: np.ndarray, rows: torch.Tensor, values: torch.Tensor, dtype: str) -> RowChunk:
    absolute = rows.abs().sum(1, dtype=torch.float64)
    # A row without any edge has nothing to be incomplete of: its residual is its target alone.
    short = (values.double() - rows.sum(1, dtype=torch.float64)).abs()
    residual = short / torch.where(absolute > 0, absolute, 1.0)
    dense = rows.cpu().numpy()
    # Places in the flat rows: a third of the time of a two-dimensional `nonzero`.
    present = dense != 0
    counts = np.count_nonzero(present, axis=1)
    place = np.flatnonzero(present)
    weights = dense.reshape(-1)[place]
    place -= np.repeat(np.arange(len(dense)) * dense.shape[1], counts)
    return RowChunk(
        layer=layer,
        targets=targets,
        counts=counts,
        indices=place.astype(np.int32),
        weights=weights.astype(dtype, copy=False),
        absolute=absolute.cpu().numpy(),
        residual=residual.cpu().numpy(),
        values=values.double().cpu().numpy(),
    )


def feature_chunks(adjoint: Adjoint, targets: np.ndarray, batch_size: int, dtype: str) -> Iterator[RowChunk]:
    """Rows of features, by layer and position so that a batch carries few positions.

    Args:
        adjoint: the adjoint.
        targets: rows of the feature table, in any order.
        batch_size: targets at once.
        dtype: of the stored weights.
    """
    first = np.concatenate([[0], np.cumsum(adjoint.columns.n_features)])
    ordered = np.sort(targets)
    for layer in range(adjoint.columns.n_layers):
        mine = ordered[(ordered >= first[layer]) & (ordered < first[layer + 1])]
        features = adjoint.replacement.features[layer]
        for begin in range(0, len(mine), batch_size):
            batch = mine[begin : begin + batch_size]
            which = torch.from_numpy(batch - first[layer]).to(features.position.device)
            # No name for the rows here: they would stay while the next ones are made.
            yield _chunk(layer, batch, adjoint.feature_rows(layer, which), features.pre_activation[which], dtype)


def target_chunk(adjoint: Adjoint, targets: Targets, dtype: str, batch_size: int | None = None) -> RowChunk:
    """The rows of what the graph explains, `batch_size` swept at once."""
    constants = targets.constants if targets.layer < adjoint.columns.n_layers else None
    size = len(targets) if batch_size is None else batch_size
    chunks = []
    for begin in range(0, len(targets), size):
        some = slice(begin, begin + size)
        position = torch.from_numpy(targets.positions[some]).to(targets.vectors.device)
        rows = adjoint.stream_rows(
            targets.layer,
            targets.vectors[some],
            position,
            None if constants is None else constants[some],
            after_attention=targets.after_attention,
        )
        chunks.append(_chunk(targets.layer, begin + np.arange(len(rows)), rows, targets.values[some], dtype))
    if len(chunks) == 1:
        return chunks[0]
    names = [field.name for field in fields(RowChunk) if field.name != "layer"]
    return RowChunk(targets.layer, **{name: np.concatenate([getattr(c, name) for c in chunks]) for name in names})


class RowStore:
    """Keeps the edges of rows as they come: as they are in memory, or one after another on a disk."""

    def __init__(self, storage: Memory, most_edges: int, dtype: str) -> None:
        """Make room.

        Args:
            storage: where.
            most_edges: so many edges come at most; no room is taken for them in memory.
            dtype: of the weights.
        """
        self._taken = 0
        self._arrays = (
            (storage.zeros(most_edges, "int32"), storage.zeros(most_edges, dtype)) if storage.on_disk else None
        )

    def keep(self, chunk: RowChunk) -> RowChunk:
        """The same rows with their edges where they are kept."""
        if self._arrays is None:
            return chunk
        indices, weights = (array[self._taken : self._taken + len(chunk.indices)] for array in self._arrays)
        indices[:], weights[:] = chunk.indices, chunk.weights
        self._taken += len(indices)
        return replace(chunk, indices=indices, weights=weights)
