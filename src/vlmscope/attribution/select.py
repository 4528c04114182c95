"""Which features get a row when not all do: the most influential ones, by one of two rankings.

`influence`: through the rows known so far, which is exact for those rows (every column counts in a row's sum). Rows of
features that have not been visited are not known yet, so the ranking is refreshed every few rows, as in circuit-tracer.
`total_effect`: by what scaling a feature does to the targets when all others respond, known from one backward sweep
before any row (`vlmscope.attribution.effects`).
"""

from collections.abc import Iterable

import numpy as np

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.columns import Columns
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.effects import total_effects
from vlmscope.attribution.rows import RowChunk, RowStore, feature_chunks
from vlmscope.attribution.targets import Targets


def partial_influence(
    columns: Columns, ends: RowChunk, chunks: Iterable[RowChunk], end_weights: np.ndarray
) -> np.ndarray:
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


def total_effect_scores(adjoint: Adjoint, ends: RowChunk, targets: Targets, batch_size: int) -> np.ndarray:
    """`sum_t w_t |total effect on t| / sum |edges of t|` of every column, `[columns]` float64.

    Targets are put on one scale as influence does it, by the sum of what goes into them.
    """
    share = targets.weights / np.where(ends.absolute > 0, ends.absolute, 1.0)
    scores = np.zeros(adjoint.columns.total)
    for begin in range(0, len(targets), batch_size):
        effects = total_effects(adjoint, targets, slice(begin, begin + batch_size))
        scores += share[begin : begin + batch_size] @ effects.abs().double().numpy(force=True)
    return scores


def select_rows(
    adjoint: Adjoint,
    ends: RowChunk,
    targets: Targets,
    config: AttributionConfig,
    batch_size: int,
    store: RowStore,
    dtype: str,
) -> list[RowChunk]:
    """Rows of all features below the ends if they fit into `config.max_nodes`, else of those that `config.choice`
    ranks highest.

    Which ones does not depend on `batch_size`, but for rounding: rows are ranked anew after `config.update_every`.
    """
    columns = adjoint.columns
    n_features = int(columns.n_features[: ends.layer].sum())

    def rows(chosen: np.ndarray) -> list[RowChunk]:
        return [store.keep(chunk) for chunk in feature_chunks(adjoint, chosen, batch_size, dtype)]

    def ranked(scores: np.ndarray) -> np.ndarray:
        return np.argsort(-scores[columns.all_features()][:n_features], kind="stable")

    if n_features <= config.max_nodes:
        return rows(np.arange(n_features))
    if config.choice == "total_effect":
        return rows(ranked(total_effect_scores(adjoint, ends, targets, batch_size))[: config.max_nodes])
    chunks: list[RowChunk] = []
    visited = np.zeros(n_features, dtype=bool)
    while (room := config.max_nodes - int(visited.sum())) > 0:
        order = ranked(partial_influence(columns, ends, chunks, targets.weights))
        some = order[~visited[order]][: min(room, config.update_every)]
        chunks += rows(some)
        visited[some] = True
    return chunks
