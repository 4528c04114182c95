"""From rows over columns to a graph over nodes.

Features without a row of their own stay in the graph as one LEFT_OUT source a layer: the edge is their signed sum (so
that rows still sum to their targets), and the sum of their |edges| is kept beside it (so that influence is not lost).
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from vlmscope.attribution.columns import Columns
from vlmscope.attribution.rows import RowChunk
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

    node_of_column: np.ndarray
    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray


def _layout(replacement: ReplacementModel, columns: Columns, kept: np.ndarray, targets: Targets) -> _Layout:
    """Number the nodes in the order of `vlmscope.core.graph`; `kept [n]` bool says which features have a row. Columns
    above the targets have no node.
    """
    table, positions = replacement.feature_activations, columns.n_positions
    node_of_column = np.full(columns.total, -1, dtype=np.int64)
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
) -> Edges:
    """Put the rows in node order, merge left-out columns, and fill the node table."""
    table = replacement.feature_activations
    kept = np.zeros(len(table), dtype=bool)
    for chunk in chunks:
        kept[chunk.targets] = True
    layout = _layout(replacement, columns, kept, targets)
    n_nodes = len(layout.kind)
    end_nodes = np.arange(n_nodes - len(targets.token_ids), n_nodes)
    feature_nodes = layout.node_of_column[columns.all_features()]
    all_chunks = [*chunks, ends]
    row_nodes = np.concatenate([*(feature_nodes[chunk.targets] for chunk in chunks), end_nodes])
    counts = np.concatenate([chunk.counts for chunk in all_chunks])
    weights = np.concatenate([chunk.weights for chunk in all_chunks])
    source = np.empty(len(weights), dtype=np.int32)
    node_of_column = layout.node_of_column.astype(np.int32)
    stops = np.cumsum([len(chunk.indices) for chunk in all_chunks])
    for stop, chunk in zip(stops, all_chunks, strict=True):
        source[stop - len(chunk.indices) : stop] = node_of_column[chunk.indices]
    left_out_mass = _left_out_mass(layout, source, row_nodes, counts, weights, columns.n_layers)
    rows = sparse.csr_matrix((weights, source, np.concatenate([[0], np.cumsum(counts)])), shape=(len(counts), n_nodes))
    in_order = np.argsort(row_nodes)
    if left_out_mass.shape[1]:
        rows = rows[in_order]
        rows.sum_duplicates()
    row_counts = np.zeros(n_nodes, dtype=np.int64)
    row_counts[row_nodes[in_order]] = np.diff(rows.indptr)
    indptr = np.concatenate([[0], np.cumsum(row_counts)])
    nodes = NodeTable(
        layout.kind,
        layout.layer,
        layout.position,
        layout.index,
        activation=_per_node(n_nodes, dtype, (feature_nodes[kept], table.activation[kept])),
        target=_per_node(n_nodes, dtype, (row_nodes, np.concatenate([chunk.values for chunk in all_chunks]))),
    )
    nodes.activation[end_nodes] = targets.probabilities
    residual = _per_node(n_nodes, "float64", (row_nodes, np.concatenate([chunk.residual for chunk in all_chunks])))
    return Edges(nodes, indptr, rows.indices.astype(np.int32, copy=False), rows.data, residual, left_out_mass)


def _per_node(n_nodes: int, dtype: str, pair: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Zeros `[N]` with values at the given nodes."""
    out = np.zeros(n_nodes, dtype=dtype)
    out[pair[0]] = pair[1]
    return out


def _left_out_mass(
    layout: _Layout, source: np.ndarray, row_nodes: np.ndarray, counts: np.ndarray, weights: np.ndarray, n_layers: int
) -> np.ndarray:
    """`[N, L]`: per row the sum of |edges| from each layer's left-out features; `[N, 0]` when there are none."""
    n_nodes = len(layout.kind)
    if not (layout.kind == NodeKind.LEFT_OUT).any():
        return np.zeros((n_nodes, 0))
    rest = np.flatnonzero(layout.kind[source] == NodeKind.LEFT_OUT)
    target = row_nodes[np.searchsorted(np.cumsum(counts), rest, side="right")]
    cell = target * n_layers + layout.layer[source[rest]]
    mass = np.bincount(cell, weights=np.abs(weights[rest]), minlength=n_nodes * n_layers)
    return mass.reshape(n_nodes, n_layers)
