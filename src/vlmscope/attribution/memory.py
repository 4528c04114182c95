"""What making a graph takes in memory and on disk, before a row is computed, and how to stay within a stated amount.

Counted is what attribution and pruning hold beside the frozen model, on host and device together, from the input
itself: its active features, and what its patterns let each position see. The counts bound what is allocated; they are
no estimates (`tests/unit/attribution/test_memory.py` holds them against what allocators record).
Legend: T positions, L layers, d width, H heads, C columns, N nodes, K ends, B targets swept at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path

import numpy as np
import torch

from vlmscope.attribution.adjoint import CACHE_BYTES, SourceVectors
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.edges import MEMORY, Disk, Memory
from vlmscope.attribution.influence import BLOCK
from vlmscope.attribution.targets import Targets
from vlmscope.core.errors import UserError
from vlmscope.replacement.model import ReplacementModel

_ENOUGH = 16  # so many targets at once are worth more than edges in memory, or sources that are kept
_BLOCK_BYTES = 48  # of an edge in a block that influence and pruning work on
_NODE_BYTES = 400  # of a node's or row's entries in all tables, and while they are joined
_COLUMN_BYTES = 120  # of a column's, rankings included


@dataclass(frozen=True)
class MemoryPlan:
    """How a graph is made.

    Attributes:
        batch_size: B.
        storage: where edges lie.
        cache_bytes: the sources of all layers are kept if they fit into this.
        most_edges: of all rows together, before left-out features share columns; counted when edges go to disk.
    """

    batch_size: int
    storage: Memory = MEMORY
    cache_bytes: float = CACHE_BYTES
    most_edges: int = 0


@dataclass(frozen=True)
class GraphCosts:
    """Bytes of one input's graph; `max_nodes` is the number of features with a row at most."""

    replacement: ReplacementModel
    targets: Targets
    max_nodes: int

    @cached_property
    def _sources(self) -> SourceVectors:
        return SourceVectors(self.replacement)

    @cached_property
    def _edge_counts(self) -> tuple[np.ndarray, int]:
        """At most so many edges into each feature below the ends, largest first, and into all ends."""
        columns, targets = self._sources.columns, self.targets
        seen = visible(self.replacement)
        active = np.array([np.diff(features.offsets) for features in self.replacement.features]) + 1  # and the error
        # [L + 1, T]: sources at a position below a layer, embedding included.
        below = 1 + np.concatenate([np.zeros((1, active.shape[1]), np.int64), np.cumsum(active, 0)])
        rows = below @ seen.T + np.arange(len(below))[:, None] + 1  # biases of the layers up to the row's own
        n_features = int(columns.n_features[: targets.layer].sum())
        table = self.replacement.feature_activations
        of_features = rows[table.layer[:n_features], table.position[:n_features]]
        return -np.sort(-of_features), int(rows[targets.layer, targets.positions].sum())

    @property
    def n_active(self) -> int:
        """Features that could get a row."""
        return len(self._edge_counts[0])

    @property
    def n_rows(self) -> int:
        """Features that get one."""
        return min(self.n_active, self.max_nodes)

    @property
    def element(self) -> int:
        """Bytes of a number of the sweep, and of a weight."""
        return self.replacement.errors.element_size()

    @property
    def most_edges(self) -> int:
        """Edges that the sweeps find, at most."""
        rows, ends = self._edge_counts
        return int(rows[: self.n_rows].sum()) + ends

    @property
    def edge_bytes(self) -> int:
        """All edges in memory, as they come and in node order, and their mask."""
        return self.most_edges * (2 * self.element + 9)

    def disk_bytes(self, n_rows: int) -> int:
        """The same on disk, with graph.safetensors beside them, when so many features have a row."""
        rows, ends = self._edge_counts
        return (int(rows[:n_rows].sum()) + ends) * (3 * self.element + 14)

    @property
    def cache_bytes(self) -> int:
        """Sources of all layers."""
        return sum(self._sources.layer_bytes())

    @property
    def target_bytes(self) -> int:
        """One target of a batch: its gradient and row during a sweep, or its row while it is compressed."""
        columns, (_, positions, width) = self._sources.columns, self.replacement.errors.shape
        queries = max(frozen.output_weight.shape[1] for frozen in self.replacement.layers)
        values = max(frozen.value_weight.shape[0] for frozen in self.replacement.layers)
        gradient = max(2 * width + 2 * queries + 2 * values, 4 * width)
        layer_columns = int(np.diff(columns.start).max())
        sweep = self.element * (positions * gradient + 4 * layer_columns + columns.total)
        return sweep + columns.total * (self.element + 4) + max(0, columns.total * (2 * self.element + 17) - sweep)

    @property
    def table_bytes(self) -> int:
        """What is there all the time: tables of nodes, rows and columns, the ends' rows, the left-out mass."""
        columns, (n_layers, positions, _) = self._sources.columns, self.replacement.errors.shape
        n_nodes = positions * (n_layers + 1) + 2 * n_layers + self.n_rows + len(self.targets)
        left_out = 24 * n_nodes * n_layers if self.n_rows < self.n_active else 0
        ends = 2 * len(self.targets) * columns.total * (self.element + 4)
        return _NODE_BYTES * n_nodes + _COLUMN_BYTES * columns.total + left_out + ends

    @property
    def sweep_bytes(self) -> int:
        """A sweep of no targets: patterns that are cut out of whole ones, and a layer's sources while they are made."""
        n_layers, positions, _ = self.replacement.errors.shape
        patterns = positions**2 * (n_layers + self.replacement.state.patterns.shape[1] * (1 + 2 * self.element))
        return patterns + 3 * max(self._sources.layer_bytes())

    def batch_within(self, budget: float, edges: int, kept: int) -> int:
        """The largest B with so many bytes of edges in memory and of sources that are kept; 0 when nothing fits."""
        room = round(budget) - self.table_bytes - edges
        return (room - kept - self.sweep_bytes) // self.target_bytes if room >= self.block_bytes else 0

    def least_bytes(self, batch_size: int, edges: int = 0, kept: int = 0) -> int:
        """What `batch_within` needs for this batch: the sweeps are over when influence and pruning begin."""
        sweep = kept + self.sweep_bytes + batch_size * self.target_bytes
        return self.table_bytes + edges + max(self.block_bytes, sweep)

    @property
    def block_bytes(self) -> int:
        """Edges that influence and pruning have in hand."""
        return _BLOCK_BYTES * max(min(BLOCK, self.most_edges), self._sources.columns.total)


def visible(replacement: ReplacementModel) -> np.ndarray:
    """`[T, T]` int64, 1 where a position's targets can have sources at another: by any layers' patterns, in any number
    of steps.
    """
    positions = replacement.n_positions
    seen = torch.eye(positions, dtype=torch.bool, device=replacement.errors.device)
    for pattern in replacement.state.patterns:
        for head in pattern:
            seen |= head > 0
    while True:
        further = (seen.float() @ seen.float()) > 0
        if torch.equal(further, seen):
            return seen.long().numpy(force=True)
        seen = further


def plan_memory(
    replacement: ReplacementModel, targets: Targets, config: AttributionConfig, folder: Path | None = None
) -> MemoryPlan:
    """The largest batches, and the fastest place for sources and edges, that `config.memory_gb` has room for.

    Args:
        replacement: the frozen model at its input.
        targets: what the graph explains.
        config: settings; without `memory_gb`, batches are as large as they may be and all edges in memory.
        folder: where edges go that do not fit; the system's folder for temporary files when None.

    Raises:
        UserError: one target at a time with all edges on disk takes more than that, or the disk has no room.
    """
    most = config.targets_at_once(*replacement.errors.shape[1:])
    if config.memory_gb is None:
        return MemoryPlan(most)
    budget, costs = config.memory_gb * 1e9, GraphCosts(replacement, targets, config.max_nodes)
    ways = ((costs.edge_bytes, costs.cache_bytes), (0, costs.cache_bytes), (0, 0))
    sizes = [costs.batch_within(budget, edges, kept) for edges, kept in ways]
    if sizes[-1] < 1:
        raise UserError(_too_little(costs, config.memory_gb))
    enough = min(most, _ENOUGH)
    way = next((number for number, size in enumerate(sizes) if size >= enough), len(ways) - 1)
    batch_size, cache_bytes = min(most, sizes[way]), CACHE_BYTES if ways[way][1] else 0
    if ways[way][0]:
        return MemoryPlan(batch_size, MEMORY, cache_bytes)
    disk = Disk(folder)
    free = disk.free_bytes()
    if costs.disk_bytes(costs.n_rows) > free:
        raise UserError(_no_room(costs, disk, free))
    return MemoryPlan(batch_size, disk, cache_bytes, costs.most_edges)


def _too_little(costs: GraphCosts, memory_gb: float) -> str:
    """What would fit."""
    needed, tokens = costs.least_bytes(1), costs.replacement.n_positions
    # Nearly all grows with the prompt, in proportion or faster.
    share = memory_gb * 1e9 / needed if memory_gb * 1e9 >= costs.block_bytes else 0
    shorter = f", or about {int(share * tokens)} tokens" if int(share * tokens) > 0 else ""
    return (
        f"attribution.memory_gb={memory_gb:g} is too little for {tokens} tokens with {costs.n_active:,} active "
        f"features, one target at a time and edges on disk; give {ceil(needed / 1e6) / 1e3:g} or more{shorter}"
    )


def _no_room(costs: GraphCosts, disk: Disk, free: int) -> str:
    """What would fit."""
    needed, nodes = costs.disk_bytes(costs.n_rows), 0
    while nodes < costs.n_rows and costs.disk_bytes(nodes + 1) <= free:
        nodes += 1
    fewer = f"attribution.max_nodes={nodes}, " if nodes else ""
    more = ceil(costs.least_bytes(_ENOUGH, costs.edge_bytes, costs.cache_bytes) / 1e6) / 1e3
    return (
        f"the edges of {costs.n_rows:,} features take up to {needed / 1e9:.3g} GB in {disk.folder}, which has "
        f"{free / 1e9:.3g} GB free; choose {fewer}attribution.memory_gb={more:g}, or another hydra.run.dir"
    )
