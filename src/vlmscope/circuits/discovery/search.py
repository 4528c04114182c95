"""From a ranking to the smallest circuit: threshold search, greedy elimination, and pruning of members.

Legend: N nodes, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from vlmscope.circuits.discovery.nodes import Kept, Nodes, keep, keep_all, read
from vlmscope.circuits.discovery.run import mask_effects, run_circuit
from vlmscope.circuits.discovery.sides import Sides
from vlmscope.scope import Scope

FINER = 1.1  # sizes that are looked at grow by this factor
SHRINK = 0.6  # share of members that a round of the greedy elimination leaves


@dataclass(frozen=True)
class Runner:
    """Runs circuits of one set of nodes on one set of pairs."""

    scope: Scope
    sides: Sides
    nodes: Nodes

    @property
    def widths(self) -> dict[int, int]:
        """Layer -> F."""
        return self.scope.transcoders.widths

    @property
    def device(self) -> torch.device:
        """Of the masks."""
        return self.sides.clean.entering.device

    def kept(self, chosen: np.ndarray) -> Kept:
        """Masks of members, [N] bool or row numbers."""
        return keep(self.nodes, chosen, self.widths, self.sides.subject.pairs.batch.roles, self.device)

    def whole(self, value: bool = True) -> Kept:
        """Masks of everything, or of nothing."""
        return keep_all(self.nodes, self.widths, self.sides.subject.pairs.batch.roles, self.device, value)

    def run(self, kept: Kept, mode: str = "free") -> np.ndarray:
        """m [B]."""
        return run_circuit(self.scope, self.sides, kept, mode)

    def ends(self, mode: str = "free") -> tuple[np.ndarray, np.ndarray]:
        """m [B] of the whole and of the empty circuit; of a free run, of the clean and corrupt ones."""
        if mode == "free":
            return self.sides.clean.gaps, self.sides.corrupt.gaps
        return self.run(self.whole(), mode), self.run(self.whole(False), mode)

    def share(self, chosen: np.ndarray) -> float:
        """f of a circuit, free."""
        clean, corrupt = self.ends()
        return float((self.run(self.kept(chosen)).mean() - corrupt.mean()) / (clean.mean() - corrupt.mean()))

    def effects(self, chosen: np.ndarray, steps: int = 3) -> np.ndarray:
        """[N], what each member is worth to the circuit, in logits; 0 for what is no member."""
        worth = mask_effects(self.scope, self.sides, self.kept(chosen), steps)
        return read(self.nodes, worth)


def smallest(runner: Runner, order: np.ndarray, wanted: float) -> int:
    """The fewest first nodes of an order whose f reaches `wanted`, by bisection over sizes 10 % apart; N if none does.

    f need not grow with every node, so a smaller circuit may exist; the one returned was measured.
    """
    grid = [1]
    while grid[-1] < len(order):
        grid.append(min(len(order), max(grid[-1] + 1, int(grid[-1] * FINER))))
    return grid[_first(len(grid), lambda i: runner.share(order[: grid[i]]) >= wanted)]


def greedy_order(runner: Runner, least: int = 4) -> np.ndarray:
    """[N] node numbers, best first, by elimination: the members of least |effect| go, what is left is scored anew.

    Each round asks what each member is worth to the circuit that is left (`mask_effects`) and drops 40 % of them.
    Unlike one estimate around the whole model it sees what a member does when the others are gone.
    """
    members = np.arange(len(runner.nodes))
    tail: list[np.ndarray] = []
    while True:
        size = np.abs(runner.effects(members))[members]
        ranked = members[np.argsort(-size, kind="stable")]
        left = int(SHRINK * len(ranked))
        if left < least:
            return np.concatenate([ranked, *reversed(tail)])
        tail.append(ranked[left:])
        members = ranked[:left]


@dataclass(frozen=True)
class Pruned:
    """What is left of a circuit, and what dropping single members costs.

    Attributes:
        members: node numbers, best first.
        losses: node number -> loss of f when it alone is dropped, of those that were tried.
        dropped: how many members went.
    """

    members: np.ndarray
    losses: dict[int, float]
    dropped: int


def prune_members(runner: Runner, members: np.ndarray, wanted: float, tries: int, threshold: float) -> Pruned:
    """Drop what a circuit does not need: first by estimate, then by trial.

    The members of least worth (`mask_effects`) go as long as f stays at `wanted`,
    measured. Of what is left, the `tries` of least worth are dropped one by one; those that cost less than
    `threshold` go together, if f stays at `wanted` then, else the better half of them, and so on.
    """
    estimated = runner.effects(members)[members]
    rising = np.argsort(estimated, kind="stable")
    going = _most(len(members), lambda n: runner.share(np.sort(members[rising[n:]])) >= wanted)
    left = members[np.sort(rising[going:])]
    share = runner.share(left)
    losses: dict[int, float] = {}
    if tries:
        estimated = runner.effects(left)[left]
        for place in np.argsort(estimated, kind="stable")[:tries].tolist():
            losses[int(left[place])] = share - runner.share(np.delete(left, place))
    idle = sorted((node for node, loss in losses.items() if loss < threshold), key=lambda node: losses[node])
    while idle and runner.share(left[~np.isin(left, idle)]) < wanted:
        idle = idle[: len(idle) // 2]
    left = left[~np.isin(left, idle)]
    return Pruned(left, losses, len(members) - len(left))


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The first of 0 .. count - 1 from which on `holds` is taken to hold; the last if it never does."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _most(count: int, holds: Callable[[int], bool]) -> int:
    """The largest n below `count` for which `holds` is taken to hold, 0 if none."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
