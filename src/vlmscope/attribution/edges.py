"""The edges of a graph: storage, rows, the choice of features that get a row, and assembly.

Rows are computed in batches over columns (`vlmscope.attribution.adjoint`), compressed as they come, and kept in memory
or in anonymous temporary files. When not all features get a row, the most influential ones do, by one of two rankings:
`influence`     through the rows known so far, which is exact for those rows (every column counts in a row's sum). Rows
                of features that have not been visited are unknown, so the ranking is refreshed every few rows, as in
                circuit-tracer;
`total_effect`  by what scaling a feature does to the targets when all others respond, known before any row.
Features without a row of their own stay in the graph as one LEFT_OUT source per layer: the edge is their signed sum (so
that rows still sum to their targets), stored with the sum of their |edges| (so that influence is not lost).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from scipy import sparse
from tqdm import tqdm

from vlmscope.attribution.adjoint import Adjoint, Columns, total_effects
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.storage import MEMORY, Memory
from vlmscope.attribution.targets import Targets
from vlmscope.attribution.workers import Workers, broadcast
from vlmscope.core.graph import NodeKind, NodeTable
from vlmscope.core.records import TOWER
from vlmscope.replacement import ReplacementModel


@dataclass(frozen=True)
class RowChunk:
    """Rows of one batch of targets of one layer, as CSR over the columns of `vlmscope.attribution.adjoint`."""

    layer: int  # layer of the targets, L for logits
    targets: np.ndarray  # `[B]` int64, rows of the feature table or numbers of ends
    counts: np.ndarray  # `[B]` int64, edges of each row
    indices: np.ndarray  # int32, columns, ascending in a row
    weights: np.ndarray  # float, edges; exact zeros are not stored
    absolute: np.ndarray  # `[B]` float64, sum of |edges| of each row, before any rounding to the stored dtype
    residual: np.ndarray  # `[B]` float64, |target - sum of edges| / sum of |edges|
    values: np.ndarray  # `[B]` float64, the targets' own affine values


def _compress(layer: int, targets: np.ndarray, rows: torch.Tensor, values: torch.Tensor, dtype: str) -> RowChunk:
    absolute = rows.abs().sum(1, dtype=torch.float64)
    gap = (values.double() - rows.sum(1, dtype=torch.float64)).abs()
    # The residual of a row without edges is its target alone.
    residual = gap / torch.where(absolute > 0, absolute, 1.0)
    dense = rows.cpu().numpy()
    present = dense != 0
    counts = np.count_nonzero(present, axis=1)
    # Columns by way of the flat rows: a third of the time of a two-dimensional `nonzero`.
    columns = np.flatnonzero(present)
    weights = dense.reshape(-1)[columns]
    columns -= np.repeat(np.arange(len(dense)) * dense.shape[1], counts)
    return RowChunk(
        layer=layer,
        targets=targets,
        counts=counts,
        indices=columns.astype(np.int32),
        weights=weights.astype(dtype, copy=False),
        absolute=absolute.cpu().numpy(),
        residual=residual.cpu().numpy(),
        values=values.double().cpu().numpy(),
    )


def feature_chunks(
    adjoint: Adjoint, targets: np.ndarray, batch_size: int, dtype: str, workers: Workers | None = None
) -> Iterator[RowChunk]:
    """Rows of `targets` of the feature table, by layer and position, so that a batch carries few positions.

    They are made by `workers`, by default `adjoint` alone.
    """
    first, ordered = 0, np.sort(targets)
    jobs: list[tuple[int, np.ndarray, int]] = []  # layer, numbers in the layer, first row of the layer
    for level in adjoint.columns.levels:
        numbers = ordered[(ordered >= first) & (ordered < first + level.n_features)] - first
        jobs += [(level.layer, numbers[n : n + batch_size], first) for n in range(0, len(numbers), batch_size)]
        first += level.n_features

    def rows(adjoint: Adjoint, job: tuple[int, np.ndarray, int]) -> RowChunk:
        layer, numbers, first = job
        features = adjoint.replacement.features_of(layer)
        which = torch.from_numpy(numbers).to(features.position.device)
        # The rows have no name here: a name would keep them in memory while the next ones are made.
        pre = features.pre_activation[which]
        return _compress(layer, first + numbers, adjoint.feature_rows(layer, which), pre, dtype)

    def share(job: tuple[int, np.ndarray, int], chunk: RowChunk | None, owner: int) -> RowChunk:
        layer, numbers, first = job
        names = ("counts", "absolute", "residual", "values")
        told = np.zeros((4, len(numbers))) if chunk is None else np.stack([getattr(chunk, name) for name in names])
        told = broadcast(torch.from_numpy(told.astype(np.float64)), owner).numpy()
        counts = told[0].astype(np.int64)
        kinds = {"indices": "int32", "weights": dtype}
        edges = {
            name: broadcast(
                torch.from_numpy(np.zeros(counts.sum(), kind) if chunk is None else getattr(chunk, name)), owner
            )
            for name, kind in kinds.items()
        }
        return RowChunk(layer, first + numbers, counts, edges["indices"].numpy(), edges["weights"].numpy(), *told[1:])

    yield from (workers or Workers(adjoint)).ordered(jobs, rows, share)


def target_chunk(adjoint: Adjoint, targets: Targets, dtype: str, batch_size: int | None = None) -> RowChunk:
    """Rows of the ends, `batch_size` swept at once."""
    size, chunks = batch_size or len(targets), []
    for begin in range(0, len(targets), size):
        batch = slice(begin, begin + size)
        rows = adjoint.target_rows(targets, batch)
        chunks.append(_compress(targets.layer, begin + np.arange(len(rows)), rows, targets.values[batch], dtype))
    names = [field.name for field in fields(RowChunk) if field.name != "layer"]
    return RowChunk(
        targets.layer, **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in names}
    )


class RowStore:
    """Keeps the edges of rows as they come: unchanged in memory, or one after another in files."""

    def __init__(self, storage: Memory, dtype: str) -> None:
        self._storage, self._dtype = storage, dtype
        self._indices, self._weights = np.empty(0, "int32"), np.empty(0, dtype)  # what is left of the last files

    def keep(self, chunk: RowChunk) -> RowChunk:
        """The same rows with their edges in this store."""
        if not self._storage.on_disk:
            return chunk
        count = len(chunk.indices)
        if count > len(self._indices):
            room = max(count, _FILE)
            self._indices, self._weights = self._storage.zeros(room, "int32"), self._storage.zeros(room, self._dtype)
        kept = replace(chunk, indices=self._indices[:count], weights=self._weights[:count])
        kept.indices[:], kept.weights[:] = chunk.indices, chunk.weights
        self._indices, self._weights = self._indices[count:], self._weights[count:]
        return kept


_FILE = 1 << 24  # edges of a file at least, for which room is reserved: 64 MB


def _partial_influence(
    columns: Columns, ends: RowChunk, chunks: Iterable[RowChunk], end_weights: np.ndarray
) -> np.ndarray:
    """Influence of every column on the ends through the known rows, `[columns]` float64.

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
    targets: Targets,
    config: AttributionConfig,
    batch_size: int,
    store: RowStore,
    dtype: str,
    workers: Workers | None = None,
) -> list[RowChunk]:
    """Rows of all features below the ends if `config.max_nodes` allows, else of those ranked highest.

    Up to rounding the choice does not depend on `batch_size`: features are ranked again every `config.update_every`.
    """
    columns = adjoint.columns
    n_features = columns.below(ends.layer)
    bar = tqdm(desc="graph", total=min(n_features, config.max_nodes), unit="row", delay=2.0, leave=False)

    def rows(chosen: np.ndarray) -> list[RowChunk]:
        kept = []
        for chunk in feature_chunks(adjoint, chosen, batch_size, dtype, workers):
            kept.append(store.keep(chunk))
            bar.update(len(chunk.targets))
        return kept

    def ranked(scores: np.ndarray) -> np.ndarray:
        return np.argsort(-scores[columns.all_features()][:n_features], kind="stable")

    with bar:
        if n_features <= config.max_nodes:
            return rows(np.arange(n_features))
        if config.choice == "total_effect":
            # Targets are put on one scale as influence does it, by the sum of what goes into them.
            share = targets.weights / np.where(ends.absolute > 0, ends.absolute, 1.0)
            scores = np.zeros(columns.total)
            for begin in range(0, len(targets), batch_size):
                batch = slice(begin, begin + batch_size)
                scores += share[batch] @ total_effects(adjoint, targets, batch).abs().double().numpy(force=True)
            return rows(ranked(scores)[: config.max_nodes])
        chunks: list[RowChunk] = []
        visited = np.zeros(n_features, dtype=bool)
        while (room := config.max_nodes - int(visited.sum())) > 0:
            order = ranked(_partial_influence(columns, ends, chunks, targets.weights))
            chosen = order[~visited[order]][: min(room, config.update_every)]
            chunks += rows(chosen)
            visited[chosen] = True
        return chunks


@dataclass(frozen=True)
class Edges:
    """Nodes with their rows: fields of `AttributionGraph`."""

    nodes: NodeTable
    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    residual: np.ndarray
    left_out_mass: np.ndarray


def lay_out(
    replacement: ReplacementModel, columns: Columns, kept: np.ndarray, targets: Targets, dtype: str
) -> tuple[np.ndarray, NodeTable]:
    """Number the nodes: the node of each column, `[columns]` int32 (-1 above the targets), and the node table.

    `kept [n]` bool marks the features that have a row; activations and targets are left at 0.
    """
    table = replacement.feature_activations
    node_of_column = np.full(columns.total, -1, dtype=np.int32)
    ids = np.array(replacement.inputs.input_ids, dtype=np.int64)
    none = np.array([-1])
    # Kind, layer, positions and indices of consecutive nodes.
    parts: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    node, first = 0, 0

    def add(kind: NodeKind, layer: int, position: np.ndarray, index: np.ndarray | None, column: int | None) -> None:
        """Nodes whose columns follow each other from `column` on, if they have any of their own."""
        nonlocal node
        parts.append((kind, layer, position, np.full(len(position), -1) if index is None else index))
        if column is not None:
            node_of_column[column : column + len(position)] = node + np.arange(len(position))
        node += len(position)

    if columns.tower:
        tower = columns.tower[0]
        add(NodeKind.BIAS, TOWER - 1, none, None, 0)
        add(NodeKind.TOKEN, TOWER - 1, tower.first_position + np.arange(tower.n_errors), None, 1)
    for level in columns.levels:
        if level.layer == 0:
            add(NodeKind.TOKEN, -1, np.arange(columns.n_positions), ids, columns.first)
        if level.layer >= targets.layer:
            break
        if level.bias is not None:
            add(NodeKind.BIAS, level.layer, none, None, level.bias)
        mine = np.arange(first, first + level.n_features)
        chosen = mine[kept[mine]]
        # Left-out features share the layer's last node.
        rest = node + len(chosen) + level.n_errors
        numbers = np.where(kept[mine], node - 1 + np.cumsum(kept[mine]), rest)
        node_of_column[level.features : level.errors] = numbers
        add(NodeKind.FEATURE, level.layer, table.position[chosen], table.index[chosen], None)
        add(NodeKind.ERROR, level.layer, level.first_position + np.arange(level.n_errors), None, level.errors)
        if len(chosen) < level.n_features:
            add(NodeKind.LEFT_OUT, level.layer, none, None, None)
        first += level.n_features
    if 0 <= targets.layer < columns.n_layers:  # the targets' own layer has only the bias that it adds to them
        add(NodeKind.BIAS, targets.layer, none, None, columns.bias(targets.layer))
    parts.append((targets.kind, targets.layer, targets.positions, targets.token_ids))

    sizes = [len(position) for _, _, position, _ in parts]
    kinds, layers = zip(*((kind, layer) for kind, layer, _, _ in parts), strict=True)
    nodes = NodeTable(
        kind=np.repeat(np.array(kinds, np.int8), sizes),
        layer=np.repeat(np.array(layers, np.int16), sizes),
        position=np.concatenate([position for _, _, position, _ in parts]).astype(np.int32),
        index=np.concatenate([index for _, _, _, index in parts]).astype(np.int64),
        activation=np.zeros(sum(sizes), dtype),
        target=np.zeros(sum(sizes), dtype),
    )
    return node_of_column, nodes


def assemble(
    replacement: ReplacementModel,
    columns: Columns,
    chunks: list[RowChunk],
    ends: RowChunk,
    targets: Targets,
    dtype: str,
    storage: Memory = MEMORY,
) -> Edges:
    """Put the rows in node order, merge left-out columns, and fill the node table.

    `chunks`, the rows of features, is emptied on the way, so that memory does not hold the edges twice.
    """
    table = replacement.feature_activations
    kept = np.zeros(len(table), dtype=bool)
    for chunk in chunks:
        kept[chunk.targets] = True
    node_of_column, nodes = lay_out(replacement, columns, kept, targets, dtype)
    n_nodes = len(nodes)
    end_nodes = np.arange(n_nodes - len(targets.token_ids), n_nodes)
    feature_nodes = node_of_column[columns.all_features()]
    nodes_of = [*(feature_nodes[chunk.targets] for chunk in chunks), end_nodes]
    row_nodes = np.concatenate(nodes_of)
    chunks.append(ends)
    values, residual = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("values", "residual"))
    left_out_mass, counts = _left_out_mass(node_of_column, nodes, chunks, nodes_of, len(columns.levels))
    row_counts = np.zeros(n_nodes, dtype=np.int64)
    row_counts[row_nodes] = counts
    indptr = np.concatenate([[0], np.cumsum(row_counts)])
    indices, weights = storage.zeros(indptr[-1], "int32"), storage.zeros(indptr[-1], dtype)
    for rows in reversed(nodes_of):
        _place(chunks.pop(), node_of_column, nodes, rows, indptr, indices, weights)
    nodes.activation[feature_nodes[kept]] = table.activation[kept]
    nodes.activation[end_nodes] = targets.probabilities
    nodes.target[row_nodes] = values
    residual_of_node = np.zeros(n_nodes)
    residual_of_node[row_nodes] = residual
    return Edges(nodes, indptr, indices, weights, residual_of_node, left_out_mass)


def _place(
    chunk: RowChunk,
    node_of_column: np.ndarray,
    nodes: NodeTable,
    rows: np.ndarray,
    indptr: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray,
) -> None:
    """Write a chunk's edges, with nodes for columns, into the graph's rows of its nodes `rows [B]`."""
    sources, values = node_of_column[chunk.indices], chunk.weights
    begins = np.concatenate([[0], np.cumsum(chunk.counts)])
    if (nodes.kind == NodeKind.LEFT_OUT).any():
        merged = sparse.csr_matrix((values.copy(), sources, begins), shape=(len(rows), len(nodes)))
        merged.sum_duplicates()
        sources, values, begins = merged.indices, merged.data, merged.indptr
    # Rows that are consecutive in the chunk and in the graph are copied at once.
    shift = indptr[rows] - begins[:-1]
    firsts = np.flatnonzero(np.diff(shift, prepend=shift[0] - 1))
    for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        here, there = slice(begins[first], begins[last]), indptr[rows[first]]
        indices[there : there + begins[last] - begins[first]] = sources[here]
        weights[there : there + begins[last] - begins[first]] = values[here]


def _left_out_mass(
    node_of_column: np.ndarray, table: NodeTable, chunks: list[RowChunk], nodes_of: list[np.ndarray], n_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """The sum of |edges| from each layer's left-out features, `[N, L]`, or `[N, 0]` when there are none.

    And the number of edges of each row of the chunks once these are merged.
    """
    n_nodes = len(table)
    counts = np.concatenate([chunk.counts for chunk in chunks])
    is_left_out = (table.kind == NodeKind.LEFT_OUT)[node_of_column]
    if not is_left_out.any():
        return np.zeros((n_nodes, 0)), counts
    layer_of_column = table.level_numbers(n_layers)[node_of_column]
    mass, row = np.zeros((n_nodes, n_layers)), 0
    for chunk, nodes in zip(chunks, nodes_of, strict=True):
        rest = np.flatnonzero(is_left_out[chunk.indices])
        owner = np.searchsorted(np.cumsum(chunk.counts), rest, side="right")
        cell = owner * n_layers + layer_of_column[chunk.indices[rest]]
        sums = np.bincount(cell, weights=np.abs(chunk.weights[rest]), minlength=len(nodes) * n_layers)
        mass[nodes] = sums.reshape(-1, n_layers)
        # Zeros are not stored, so every layer with an edge has mass.
        counts[row : row + len(nodes)] += (mass[nodes] > 0).sum(1) - np.bincount(owner, minlength=len(nodes))
        row += len(nodes)
    return mass, counts
