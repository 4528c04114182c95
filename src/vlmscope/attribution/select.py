"""Which features get a row when not all do: the most influential ones, ranked anew as rows come in.

The influence of a feature through the rows known so far is exact for those rows (every column counts in a row's sum);
rows of features that have not been visited are not known yet, so the ranking is refreshed every few batches, as in
circuit-tracer.
"""

import numpy as np

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.columns import Columns
from vlmscope.attribution.rows import RowChunk, feature_chunks


def partial_influence(columns: Columns, ends: RowChunk, chunks: list[RowChunk], end_weights: np.ndarray) -> np.ndarray:
    """Influence of every column on the graph's ends through the known rows, `[columns]` float64.

    A chunk's targets belong to one layer and their sources lie below, so one pass from the top layer down is exact.
    """
    influence = np.zeros(columns.total)
    feature_columns = columns.all_features()
    _spread(influence, ends, end_weights)
    for chunk in sorted(chunks, key=lambda chunk: -chunk.layer):
        _spread(influence, chunk, influence[feature_columns[chunk.targets]])
    return influence


def _spread(influence: np.ndarray, chunk: RowChunk, mass: np.ndarray) -> None:
    """Hand each target's `mass` to its sources in proportion to |edge|."""
    share = mass / np.where(chunk.absolute > 0, chunk.absolute, 1.0)
    spread = np.repeat(share, chunk.counts) * np.abs(chunk.weights)
    influence += np.bincount(chunk.indices, weights=spread, minlength=len(influence))


def select_rows(
    adjoint: Adjoint,
    ends: RowChunk,
    end_weights: np.ndarray,
    max_nodes: int,
    batch_size: int,
    update_every: int,
    dtype: str,
) -> list[RowChunk]:
    """Rows of all features below the ends if they fit into `max_nodes`, else of the `max_nodes` found most
    influential.
    """
    columns = adjoint.columns
    n_features = int(columns.n_features[: ends.layer].sum())
    if n_features <= max_nodes:
        return list(feature_chunks(adjoint, np.arange(n_features), batch_size, dtype))
    chunks: list[RowChunk] = []
    visited = np.zeros(n_features, dtype=bool)
    while (room := max_nodes - int(visited.sum())) > 0:
        influence = partial_influence(columns, ends, chunks, end_weights)[columns.all_features()]
        ranked = np.argsort(-influence[:n_features], kind="stable")
        batch = ranked[~visited[ranked]][: min(room, update_every * batch_size)]
        chunks += feature_chunks(adjoint, batch, batch_size, dtype)
        visited[batch] = True
    return chunks
