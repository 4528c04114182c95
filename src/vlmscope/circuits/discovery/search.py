"""Running a circuit of nodes in the real model, the search for the smallest one, and random circuits like it.

*A run of a circuit* is the originals' run in which everything outside the circuit has the value of the
counterfactuals' run:

    embeddings   clean at the roles that are kept, else corrupt
    MLP of l     sum over kept f of a_f W_dec[f] + sum over the others of a'_f W_dec[f] + b_dec (+ W_skip x) + error,
                 a_f as the features are in *this* run, a'_f and the error outside as measured in the counterfactual's;
                 a kept error is the clean one

Attention and norms are the model's own (`free`), or the patterns are those of the originals (`frozen_attention`). So a
kept feature has its clean activation only as far as what it reads is kept, too: a circuit without its first half keeps
nothing. The empty circuit is the counterfactual's run, and the one of everything the original's (Marks et al., arXiv
2403.19647, and MIB, arXiv 2504.13151, run circuits in this way).

*The search* goes from a ranking to the fewest nodes that keep a share f of the logit difference m, and prunes members.

Legend: B pairs, T positions, d model width, k slots of a code, R roles, F features of a layer, N nodes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlmscope.circuits.discovery.nodes import Kind, Nodes, Sides
from vlmscope.core.records import generator
from vlmscope.interventions.run import hook_targets, watch_inputs
from vlmscope.models.attention import replacing_patterns
from vlmscope.models.base import INJECTIONS
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet

FINER = 1.1  # ratio of successive sizes that are tried
SHRINK = 0.6  # share of members that a round of the greedy elimination keeps
NEIGHBOURS = 8  # candidates, nearest in change, of which a matched feature is drawn


@dataclass(frozen=True)
class Kept:
    """What a run keeps clean: true or false, or a number between corrupt (0) and clean (1)."""

    embeddings: Tensor  # [R]
    errors: dict[int, Tensor]  # by layer: [R]
    features: dict[int, Tensor]  # by layer: [R, F]


@contextmanager
def circuit(scope: Scope, sides: Sides, kept: Kept, mode: str = "free") -> Iterator[dict[str, Tensor]]:
    """Hooks that keep a circuit alone, in the mode 'free' or 'frozen_attention'; gives the forward's arguments."""
    clean, corrupt = sides.clean, sides.corrupt
    tensors = dict(sides.subject.batch.tensors)
    mask = kept.embeddings[sides.role_of][:, None]
    tensors["inputs_embeds"] = _mix(mask, clean.entering, corrupt.entering)
    if INJECTIONS in tensors:
        tensors[INJECTIONS] = _mix(mask, clean.injections, corrupt.injections)
    with ExitStack() as stack:
        if mode == "frozen_attention":
            stack.enter_context(replacing_patterns(scope.adapter, sides.subject.base.patterns))
        inputs = watch_inputs(stack, scope.adapter, scope.transcoders.layers)
        ahead_of: dict[int, list[Tensor]] = {}

        def rewritten(layer: int, out: Tensor) -> Tensor:
            return _written(scope.transcoders, sides, kept, layer, inputs.pop(layer), ahead_of).to(out)

        hook_targets(stack, scope, scope.transcoders.layers, rewritten)
        yield tensors


def _written(
    transcoders: TranscoderSet, sides: Sides, kept: Kept, layer: int, x: Tensor, ahead_of: dict[int, list[Tensor]]
) -> Tensor:
    """What a layer writes, [B, T, d]; what its features write to later layers waits in `ahead_of`."""
    transcoder, clean, corrupt = transcoders[layer], sides.clean, sides.corrupt
    # Live activations of kept features, next to the counterfactual's of all others.
    live, other, role = transcoder.encode(x), corrupt.codes[layer], sides.role_of[:, None]
    mask = kept.features[layer]
    inside = _mix(mask[role, live.indices], live.values, torch.zeros_like(live.values))
    outside = _mix(mask[role, other.indices], torch.zeros_like(other.values), other.values)
    mixed = SparseCode(torch.cat([live.indices, other.indices], -1), torch.cat([inside, outside], -1))
    out = transcoder.b_dec + transcoder.write(mixed)
    if transcoder.W_skip is not None:
        out = out + functional.linear(x.to(transcoder.W_skip.dtype), transcoder.W_skip)
    for ahead in range(1, transcoder.config.writes):
        ahead_of.setdefault(layer + ahead, []).append(transcoder.write(mixed, ahead))
    for earlier in ahead_of.pop(layer, []):
        out = out + earlier.to(out.device)
    return out + _mix(kept.errors[layer][sides.role_of][:, None], clean.errors[layer], corrupt.errors[layer])


def _mix(weight: Tensor, clean: Tensor, corrupt: Tensor) -> Tensor:
    """`clean` where `weight` is true, `corrupt` elsewhere; between them for a weight that is a number."""
    return torch.where(weight, clean, corrupt) if weight.dtype == torch.bool else corrupt + weight * (clean - corrupt)


@dataclass(frozen=True)
class Runner:
    """Runs circuits of one set of nodes on one set of pairs."""

    scope: Scope
    sides: Sides
    nodes: Nodes

    def kept(self, members: np.ndarray, rest: bool = False) -> Kept:
        """Masks of members, [N] bool or row numbers; `rest` keeps what is no node, as training pairs never had it."""
        chosen = np.zeros(len(self.nodes), dtype=bool)
        chosen[members] = True
        return self._masks(torch.from_numpy(chosen).to(self.sides.role_of.device), rest)

    def without(self, members: np.ndarray) -> Kept:
        """Masks of everything but some members."""
        others = np.ones(len(self.nodes), dtype=bool)
        others[members] = False
        return self.kept(others, rest=True)

    def _masks(self, weights: Tensor, rest: bool = False) -> Kept:
        """Masks in which each node has its weight [N]."""
        nodes, n_roles = self.nodes, len(self.nodes.roles)

        def table(chosen: np.ndarray, *shape: int) -> Tensor:
            columns = (nodes.role[chosen], nodes.index[chosen])[: len(shape)]
            places = tuple(torch.from_numpy(column).long().to(weights.device) for column in columns)
            rows = torch.from_numpy(np.flatnonzero(chosen)).to(weights.device)
            return weights.new_full(shape, rest).index_put(places, weights[rows])

        errors, features = {}, {}
        for layer, width in self.scope.transcoders.widths.items():
            inside = nodes.layer == layer
            errors[layer] = table(inside & (nodes.kind == Kind.ERROR), n_roles)
            features[layer] = table(inside & nodes.is_feature, n_roles, width)
        return Kept(table(nodes.kind == Kind.EMBEDDING, n_roles), errors, features)

    @torch.no_grad()
    def run(self, kept: Kept, mode: str = "free") -> np.ndarray:
        """m [B] float64 of a circuit."""
        with circuit(self.scope, self.sides, kept, mode) as tensors:
            logits = self.scope.adapter.next_logits(tensors)
        return self.sides.subject.gaps(logits).double().cpu().numpy()

    def ends(self, mode: str = "free") -> tuple[np.ndarray, np.ndarray]:
        """m [B] of the whole and of the empty circuit; of a free run, of the clean and corrupt ones."""
        if mode == "free":
            return self.sides.clean.gaps, self.sides.corrupt.gaps
        nothing = np.empty(0, dtype=np.int64)
        return self.run(self.without(nothing), mode), self.run(self.kept(nothing), mode)

    def share(self, members: np.ndarray) -> float:
        """f of a circuit, free: the share that it keeps of the change of m, a ratio of means over pairs."""
        clean, corrupt = self.ends()
        return float((self.run(self.kept(members)).mean() - corrupt.mean()) / (clean.mean() - corrupt.mean()))

    def effects(self, members: np.ndarray, steps: int = 3) -> np.ndarray:
        """[N], what each member is worth to its circuit, in logits, mean over pairs; 0 for what is no member.

        With every mask multiplied by alpha, m goes from the empty circuit to this one. A member's worth is the
        derivative of m by its mask, integrated over alpha by the midpoint rule, so that all members together are worth
        m(circuit) - m(empty), up to that rule (integrated gradients, Sundararajan et al., arXiv 1703.01365, of the
        masks). On the way features of the counterfactual are still on, which a gradient at the circuit itself would
        not see.
        """
        entering = self.sides.clean.entering
        chosen = entering.new_zeros(len(self.nodes))
        chosen[torch.from_numpy(members).to(entering.device)] = 1.0
        worth = torch.zeros_like(chosen)
        for step in range(steps):
            with torch.enable_grad():
                weights = ((step + 0.5) / steps * chosen).requires_grad_()
                with circuit(self.scope, self.sides, self._masks(weights)) as tensors:
                    logits = self.scope.adapter.next_logits(tensors)
                (slope,) = torch.autograd.grad(self.sides.subject.gaps(logits).mean(), weights)
            worth += chosen * slope / steps
        return worth.double().cpu().numpy()


def fewest(sizes: Sequence[int], reaches: Callable[[int], bool]) -> int:
    """The first of ascending sizes at which `reaches` holds, by bisection, as if it held for all larger ones; the last
    if none does.
    """
    return sizes[bisect_left(range(len(sizes) - 1), True, key=lambda place: reaches(sizes[place]))]


def finer_sizes(count: int) -> list[int]:
    """Sizes 1 to `count`, some 10 % apart."""
    sizes = [1]
    while sizes[-1] < count:
        sizes.append(min(count, max(sizes[-1] + 1, int(sizes[-1] * FINER))))
    return sizes


def smallest(runner: Runner, order: np.ndarray, share: float) -> int:
    """The fewest first nodes of an order whose f reaches `share`; N if none does.

    f need not grow with every node, so a smaller circuit may exist; the one returned was measured.
    """
    return fewest(finer_sizes(len(order)), lambda size: runner.share(order[:size]) >= share)


def greedy_order(runner: Runner, least: int = 4) -> np.ndarray:
    """[N] node numbers, best first, by elimination: the members of least |effect| go, what is left is scored anew.

    Each round drops 40 % of the members by their worth to the circuit that is left. Unlike one estimate around the
    whole model it sees what a member does when the others are gone.
    """
    members = np.arange(len(runner.nodes))
    dropped: list[np.ndarray] = []
    while True:
        size = np.abs(runner.effects(members))[members]
        ranked = members[np.argsort(-size, kind="stable")]
        left = int(SHRINK * len(ranked))
        if left < least:
            return np.concatenate([ranked, *reversed(dropped)])
        dropped.append(ranked[left:])
        members = ranked[:left]


def prune_members(
    runner: Runner, members: np.ndarray, keep: float, tries: int, threshold: float
) -> tuple[np.ndarray, dict[int, float]]:
    """Drop what a circuit does not need: first by estimate, then by trial.

    The members of least worth go as long as f stays at `keep`, measured. Of what is left, the `tries` of least worth
    are dropped one by one; those that cost less than `threshold` go together, if f stays at `keep` then, else the
    better half of them, and so on.

    Returns:
        The members left, best first; and, by node number of those tried, the loss of f when it alone is dropped.
    """
    rising = np.argsort(runner.effects(members)[members], kind="stable")

    def kept(size: int) -> np.ndarray:
        return np.sort(rising[len(members) - size :])

    size = fewest(range(1, len(members) + 1), lambda size: runner.share(members[kept(size)]) >= keep)
    left = members[kept(size)]
    share = runner.share(left)
    losses: dict[int, float] = {}
    if tries:
        estimated = runner.effects(left)[left]
        for place in np.argsort(estimated, kind="stable")[:tries].tolist():
            losses[int(left[place])] = share - runner.share(np.delete(left, place))
    idle = sorted((node for node, loss in losses.items() if loss < threshold), key=lambda node: losses[node])
    while idle and runner.share(left[~np.isin(left, idle)]) < keep:
        idle = idle[: len(idle) // 2]
    return left[~np.isin(left, idle)], losses


def matched_circuit(nodes: Nodes, members: np.ndarray, change: np.ndarray, seed: int) -> np.ndarray:
    """Replace each feature of a circuit by a random one outside it, of its layer and role and about as much `change`
    [N] of the stream.

    Errors and embeddings stay, as there are no others like them. Where a layer and role have no more features outside
    the circuit, one of the layer is taken, and then any: the number of features never differs.
    """
    rng = generator(seed, "matched circuit")
    free = nodes.is_feature.copy()
    free[members] = False
    out = [row for row in members.tolist() if not nodes.is_feature[row]]
    for row in members[nodes.is_feature[members]].tolist():
        same_layer = free & (nodes.layer == nodes.layer[row])
        pools = (same_layer & (nodes.role == nodes.role[row]), same_layer, free)
        pool = next(np.flatnonzero(pool) for pool in pools if pool.any())
        near = pool[np.argsort(np.abs(change[pool] - change[row]), kind="stable")[:NEIGHBOURS]]
        pick = int(rng.choice(near))
        free[pick] = False
        out.append(pick)
    return np.array(out, dtype=np.int64)


def random_order(nodes: Nodes, order: np.ndarray, seed: int) -> np.ndarray:
    """An order with its features shuffled; errors and embeddings keep their places, so that only features differ."""
    out = order.copy()
    places = np.flatnonzero(nodes.is_feature[order])
    out[places] = generator(seed, "random order").permutation(order[places])
    return out
