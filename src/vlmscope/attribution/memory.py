"""Memory and disk space that a graph takes, known before a row is computed, and a plan that stays within a budget.

The counts cover what attribution and pruning hold next to the frozen model, on host and device together. They follow
from the input: its active features, and what its patterns let each position see. They are upper bounds of what is
allocated, not estimates (`tests/unit/attribution/test_memory.py` compares them with what allocators record).
Legend: T positions, L layers, d width, H heads, K ends, B targets swept at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np

from vlmscope.attribution.adjoint import CACHE_BYTES, TOWER_BYTES, SourceVectors
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import BLOCK
from vlmscope.attribution.storage import MEMORY, Disk, Memory
from vlmscope.attribution.targets import Targets
from vlmscope.core.errors import UserError
from vlmscope.models.attention import QUERIES
from vlmscope.replacement import ReplacementModel

_ENOUGH = 16  # batches of fewer targets cost more time than edges on disk, or sources gathered again
_BLOCK_BYTES = 48  # per edge of a block that influence and pruning work on
_NODE_BYTES = 400  # per node or row, in all tables and while they are joined
_COLUMN_BYTES = 120  # per column, rankings included


@dataclass(frozen=True)
class MemoryPlan:
    """How a graph is made: B targets at once, storage of the edges, and the bytes that kept sources may take."""

    batch_size: int
    storage: Memory = MEMORY
    cache_bytes: float = CACHE_BYTES


@dataclass(frozen=True)
class GraphCosts:
    """Bytes of one input's graph."""

    row_edges: np.ndarray  # at most so many edges into each feature that could get a row, largest first
    end_edges: int  # into all ends
    n_rows: int  # features that get a row
    n_columns: int  # of a row
    n_nodes: int
    element: int  # bytes of a number of the sweep, and of a weight
    sources: int  # of all layers
    sweep: int  # of a sweep without targets: parts of patterns, and a layer's sources while they are gathered
    target: int  # per target of a batch: its gradient and row in a sweep, or its row while it is compressed
    tables: int  # all the time: tables of nodes, rows and columns, the ends' rows, the left-out mass

    def most_edges(self, n_rows: int) -> np.ndarray:
        """Upper bounds of the number of edges of these rows: as they come, and once left-out features share nodes."""
        most = int(self.row_edges[:n_rows].sum())
        return np.array([most, min(most, n_rows * self.n_nodes)]) + self.end_edges

    @property
    def edge_bytes(self) -> int:
        """Bytes of all edges in memory, as they come and in node order, with their mask."""
        return int(self.most_edges(self.n_rows) @ (self.element + 4, self.element + 5))

    def disk_bytes(self, n_rows: int) -> int:
        """Bytes of all edges on disk, with graph.safetensors, when `n_rows` features have a row."""
        return int(self.most_edges(n_rows) @ (self.element + 4, 2 * self.element + 10))

    @property
    def block_bytes(self) -> int:
        """Bytes of the block of edges that influence and pruning work on."""
        return _BLOCK_BYTES * max(min(BLOCK, int(self.most_edges(self.n_rows)[1])), self.n_columns)

    def batch_within(self, budget: float, edges: int, kept: int) -> int:
        """The largest B with `edges` and `kept` bytes of edges and sources in memory; 0 or less when none fits."""
        room = round(budget) - self.tables - edges
        return (room - kept - self.sweep) // self.target if room >= self.block_bytes else 0

    def least_bytes(self, batch_size: int, edges: int = 0, kept: int = 0) -> int:
        """The budget that `batch_within` needs for this batch."""
        # Sweeps and pruning do not overlap in time.
        return self.tables + edges + max(self.block_bytes, kept + self.sweep + batch_size * self.target)


def graph_costs(replacement: ReplacementModel, targets: Targets, max_nodes: int) -> GraphCosts:
    """Count the bytes of a graph in which at most `max_nodes` features get a row."""
    sources = SourceVectors(replacement)
    columns, layer_bytes = sources.columns, sources.layer_bytes()
    (n_layers, positions, width), element = replacement.errors.shape, replacement.errors.element_size()

    active = np.array([np.diff(features.offsets) for features in replacement.features]) + 1  # and the error
    # [L + 1, T]: sources at a position below a layer, embedding included, and then the sources up to each position.
    below = 1 + np.concatenate([np.zeros((1, positions), np.int64), np.cumsum(active, 0)])
    (first, last), before = visible(replacement), np.pad(np.cumsum(below, 1), ((0, 0), (1, 0)))
    edges = before[:, last + 1] - before[:, first]
    edges += np.arange(len(below))[:, None] + 1  # biases up to the row's own layer
    table, n_active = replacement.feature_activations, columns.below(targets.layer)
    n_below = sum(level.n_features for level in columns.tower)
    own = slice(n_below, max(n_active, n_below))
    in_tower = np.repeat([level.features for level in columns.tower], [level.n_features for level in columns.tower])
    row_edges = np.concatenate(
        [columns.first + edges[table.layer[own], table.position[own]], in_tower[:n_active].astype(np.int64)]
    )
    row_edges = -np.sort(-row_edges)
    n_rows = min(n_active, max_nodes)

    queries = max(frozen.output_weight.shape[1] for frozen in replacement.layers)
    values = max(frozen.value_weight.shape[0] for frozen in replacement.layers)
    n_heads = replacement.state.patterns[0].n_heads
    gradient = max(2 * width + 2 * queries + 2 * values, 4 * width)
    swept = element * (positions * gradient + 4 * int(np.diff(columns.start).max()) + columns.total)
    compressed = columns.total * (2 * element + 17)

    n_nodes = positions * (n_layers + 1) + 2 * n_layers + n_rows + len(targets) + columns.first
    left_out = 24 * n_nodes * len(columns.levels) if n_rows < n_active else 0
    ends = 2 * len(targets) * columns.total * (element + 4)
    return GraphCosts(
        row_edges=row_edges,
        end_edges=(0 if targets.layer < 0 else int(edges[targets.layer, targets.positions].sum()))
        + columns.first * len(targets),
        n_rows=n_rows,
        n_columns=columns.total,
        n_nodes=n_nodes,
        element=element,
        sources=sum(layer_bytes),
        # A tower's gradients are made for a part of a batch.
        sweep=(2 * TOWER_BYTES if columns.tower else 0)
        + positions * min(positions, QUERIES) * (24 + n_heads * (1 + 2 * element))
        + 3 * max(layer_bytes),
        target=columns.total * (element + 4) + max(swept, compressed),
        tables=_NODE_BYTES * n_nodes + _COLUMN_BYTES * columns.total + left_out + ends,
    )


def visible(replacement: ReplacementModel) -> np.ndarray:
    """Between which positions the sources of each one's targets lie, in any number of attention steps, `[2, T]` int64.

    An upper bound: a position counts as seeing as far back as any later one, and as far ahead as any earlier one.
    """
    reach = np.stack([pattern.reach().numpy(force=True) for pattern in replacement.state.patterns])
    first = np.minimum.accumulate(reach[:, 0].min(0)[::-1])[::-1]
    last = np.maximum.accumulate(reach[:, 1].max(0))
    while (first[first] < first).any() or (last[last] > last).any():
        first, last = first[first], last[last]
    return np.stack([first, last])


def plan_memory(
    replacement: ReplacementModel, targets: Targets, config: AttributionConfig, folder: Path | None = None
) -> MemoryPlan:
    """The largest batches, and the fastest storage of sources and edges, within `config.memory_gb`.

    Edges that do not fit go to `folder`, by default the system's for temporary files.

    Raises:
        UserError: not even one target at a time fits, or the disk has no room for the edges.
    """
    most = config.targets_at_once(*replacement.errors.shape[1:])
    if config.memory_gb is None:
        return MemoryPlan(most)
    budget, costs = config.memory_gb * 1e9, graph_costs(replacement, targets, config.max_nodes)
    # Edges in memory are given up first, then kept sources, each only for batches that would be too small.
    for edges, kept in ((costs.edge_bytes, costs.sources), (0, costs.sources), (0, 0)):
        batch_size = min(most, costs.batch_within(budget, edges, kept))
        if batch_size >= min(most, _ENOUGH):
            break
    if batch_size < 1:
        raise UserError(_too_little(costs, config.memory_gb, replacement.n_positions))
    cache_bytes = CACHE_BYTES if kept else 0
    if edges:
        return MemoryPlan(batch_size, MEMORY, cache_bytes)
    disk = Disk(folder)
    if costs.disk_bytes(costs.n_rows) > disk.free_bytes():
        raise UserError(_no_room(costs, disk, disk.free_bytes()))
    return MemoryPlan(batch_size, disk, cache_bytes)


def _too_little(costs: GraphCosts, memory_gb: float, tokens: int) -> str:
    """The message for a budget that is too small, with what would fit."""
    needed = costs.least_bytes(1)
    # Nearly everything grows with the prompt, linearly or faster.
    fitting = int(memory_gb * 1e9 / needed * tokens) if memory_gb * 1e9 >= costs.block_bytes else 0
    shorter = f", or about {fitting} tokens" if fitting else ""
    return (
        f"attribution.memory_gb={memory_gb:g} is too little for {tokens} tokens with {len(costs.row_edges):,} active "
        f"features, one target at a time and edges on disk; give {ceil(needed / 1e6) / 1e3:g} or more{shorter}"
    )


def _no_room(costs: GraphCosts, disk: Disk, free: int) -> str:
    """The message for a disk that is too full, with what would fit."""
    nodes = 0
    while nodes < costs.n_rows and costs.disk_bytes(nodes + 1) <= free:
        nodes += 1
    fewer = f"attribution.max_nodes={nodes}, " if nodes else ""
    more = ceil(costs.least_bytes(_ENOUGH, costs.edge_bytes, costs.sources) / 1e6) / 1e3
    return (
        f"the edges of {costs.n_rows:,} features take up to {costs.disk_bytes(costs.n_rows) / 1e9:.3g} GB in "
        f"{disk.folder}, which has {free / 1e9:.3g} GB free; choose {fewer}attribution.memory_gb={more:g}, or another "
        "hydra.run.dir"
    )
