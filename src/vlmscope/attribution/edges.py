"""From rows over columns to a graph over nodes.

Features without a row of their own stay in the graph as one LEFT_OUT source a layer: the edge is their signed sum (so
that rows still sum to their targets), and the sum of their |edges| is kept beside it (so that influence is not lost).
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vlmscope.attribution.columns import Columns
from vlmscope.attribution.rows import RowChunk
from vlmscope.attribution.storage import MEMORY, Memory
from vlmscope.attribution.targets import Targets
from vlmscope.core.graph import NodeKind, NodeTable
from vlmscope.replacement.model import ReplacementModel


@dataclass(frozen=True)
class Edges:
    """Nodes with their rows; the arrays of `AttributionGraph` of the same names."""

    nodes: NodeTable
    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray
    residual: np.ndarray
    left_out_mass: np.ndarray


@dataclass(frozen=True)
class _Layout:
    """Which node each column belongs to (`[columns]`), and the nodes' first four fields."""

    node_of_column: np.ndarray  # int32, -1 above the targets
    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray


def _layout(replacement: ReplacementModel, columns: Columns, kept: np.ndarray, targets: Targets) -> _Layout:
    """Number the nodes in the order of `vlmscope.core.graph`; `kept [n]` bool says which features have a row. Columns
    above the targets have no node.
    """
    table, positions = replacement.feature_activations, columns.n_positions
    node_of_column = np.full(columns.total, -1, dtype=np.int32)
    node_of_column[:positions] = np.arange(positions)
    every = np.arange(positions)
    ids = np.array(replacement.inputs.input_ids, dtype=np.int64)
    parts: list[tuple[int, int, np.ndarray, np.ndarray]] = [(NodeKind.TOKEN, -1, every, ids)]
    none = np.array([-1])
    first, node = 0, positions
    for layer in range(targets.layer):
        count = int(columns.n_features[layer])
        mine = np.arange(first, first + count)
        chosen = mine[kept[mine]]
        parts.append((NodeKind.BIAS, layer, none, none))
        parts.append((NodeKind.FEATURE, layer, table.position[chosen], table.index[chosen]))
        parts.append((NodeKind.ERROR, layer, every, np.full(positions, -1)))
        rest = node + 1 + len(chosen) + positions
        node_of_column[columns.bias(layer)] = node
        # Left-out features share the layer's last node.
        numbers = np.where(kept[mine], node + np.cumsum(kept[mine]), rest)
        node_of_column[columns.features(layer) : columns.errors(layer)] = numbers
        node_of_column[columns.errors(layer) : columns.errors(layer) + positions] = node + 1 + len(chosen) + every
        if len(chosen) < count:
            parts.append((NodeKind.LEFT_OUT, layer, none, none))
            rest += 1
        first, node = first + count, rest
    if targets.layer < columns.n_layers:  # of the layer that holds the targets only what it adds to them itself
        parts.append((NodeKind.BIAS, targets.layer, none, none))
        node_of_column[columns.bias(targets.layer)] = node
    parts.append((targets.kind, targets.layer, targets.positions, targets.token_ids))

    def join(values: list[np.ndarray], dtype: type) -> np.ndarray:
        return np.concatenate(values).astype(dtype)

    return _Layout(
        node_of_column,
        join([np.full(len(position), kind) for kind, _, position, _ in parts], np.int8),
        join([np.full(len(position), layer) for _, layer, position, _ in parts], np.int16),
        join([position for _, _, position, _ in parts], np.int32),
        join([index for _, _, _, index in parts], np.int64),
    )


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

    Args:
        replacement: the frozen model.
        columns: its columns.
        chunks: rows of features; used up, so that memory does not hold them twice.
        ends: rows of what the graph explains.
        targets: the same.
        dtype: of the weights.
        storage: where the edges of the graph go.
    """
    table = replacement.feature_activations
    kept = np.zeros(len(table), dtype=bool)
    for chunk in chunks:
        kept[chunk.targets] = True
    layout = _layout(replacement, columns, kept, targets)
    n_nodes = len(layout.kind)
    end_nodes = np.arange(n_nodes - len(targets.token_ids), n_nodes)
    feature_nodes = layout.node_of_column[columns.all_features()]
    nodes_of = [*(feature_nodes[chunk.targets] for chunk in chunks), end_nodes]
    row_nodes = np.concatenate(nodes_of)
    chunks.append(ends)
    values, residual = (np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in ("values", "residual"))
    left_out_mass, counts = _left_out_mass(layout, chunks, nodes_of, columns.n_layers)
    row_counts = np.zeros(n_nodes, dtype=np.int64)
    row_counts[row_nodes] = counts
    indptr = np.concatenate([[0], np.cumsum(row_counts)])
    indices, weights = storage.zeros(indptr[-1], "int32"), storage.zeros(indptr[-1], dtype)
    for rows in reversed(nodes_of):
        _place(chunks.pop(), layout, rows, indptr, indices, weights)
    nodes = NodeTable(
        layout.kind,
        layout.layer,
        layout.position,
        layout.index,
        activation=_per_node(n_nodes, dtype, (feature_nodes[kept], table.activation[kept])),
        target=_per_node(n_nodes, dtype, (row_nodes, values)),
    )
    nodes.activation[end_nodes] = targets.probabilities
    return Edges(nodes, indptr, indices, weights, _per_node(n_nodes, "float64", (row_nodes, residual)), left_out_mass)


def _place(
    chunk: RowChunk, layout: _Layout, rows: np.ndarray, indptr: np.ndarray, indices: np.ndarray, weights: np.ndarray
) -> None:
    """Write a chunk's edges, over nodes, where the rows of its nodes `rows [B]` lie in the graph."""
    sources, values, begins = layout.node_of_column[chunk.indices], chunk.weights, _starts(chunk.counts)
    if (layout.kind == NodeKind.LEFT_OUT).any():
        merged = sparse.csr_matrix((values.copy(), sources, begins), shape=(len(rows), len(layout.kind)))
        merged.sum_duplicates()
        sources, values, begins = merged.indices, merged.data, merged.indptr
    # Runs of rows that follow each other in both are copied at once.
    shift = indptr[rows] - begins[:-1]
    firsts = np.flatnonzero(np.diff(shift, prepend=shift[0] - 1))
    for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        here, there = slice(begins[first], begins[last]), indptr[rows[first]]
        indices[there : there + begins[last] - begins[first]] = sources[here]
        weights[there : there + begins[last] - begins[first]] = values[here]


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where rows of so many edges begin, and the last ends: `[B + 1]`."""
    return np.concatenate([[0], np.cumsum(counts)])


def _per_node(n_nodes: int, dtype: str, pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Zeros `[N]` with values at the given nodes."""
    out = np.zeros(n_nodes, dtype=dtype)
    out[pair[0]] = pair[1]
    return out


def _left_out_mass(
    layout: _Layout, chunks: list[RowChunk], nodes_of: list[np.ndarray], n_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """`[N, L]`: per row the sum of |edges| from each layer's left-out features, `[N, 0]` when there are none; and per
    row of the chunks how many edges are left when these are merged.
    """
    n_nodes = len(layout.kind)
    counts = np.concatenate([chunk.counts for chunk in chunks])
    is_left_out = (layout.kind == NodeKind.LEFT_OUT)[layout.node_of_column]
    if not is_left_out.any():
        return np.zeros((n_nodes, 0)), counts
    layer_of_column = layout.layer[layout.node_of_column]
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
