"""Interchange interventions: carry features' activations from the counterfactual into the original, see what follows.

For a pair with answers y and y', and an edited run with logits l (Geiger et al., arXiv 2106.02997; the recovered share
is the normalised logit difference of Zhang and Nanda, arXiv 2309.16042):

    follows    argmax l = y'
    recovered  (d(l) - d(l_original)) / (d(l_counterfactual) - d(l_original)),  d(l) = l[y'] - l[y]

Recovered is 0 when nothing happened and 1 when the logits moved as far apart as in the counterfactual itself. Where y =
y', nothing should happen: then what counts is how often the answer is no longer y.

Legend: B pairs, T positions, F features of a layer, n chosen ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.circuits.plans import at_supernodes
from vlmscope.core.intervention import Rate, Supernode
from vlmscope.core.records import control_draws
from vlmscope.interventions.edits import AnyPlan, LayerEdit, Plan, WholeEdit, at_positions
from vlmscope.interventions.named import donor_activations, matched_features, patch_plan, run_random_direction
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet

Features = Mapping[int, Tensor]  # layer -> [n] int64


@dataclass(frozen=True)
class Outcome:
    """What an interchange did to a question's answers, over B pairs.

    Attributes:
        follows: share that now give the counterfactual's answer; of a question that should not move, 0 by definition.
        changed: share that no longer give the original's answer.
        recovered: share of the logit difference, None for a question that should not move.
    """

    follows: Rate
    changed: Rate
    recovered: Rate | None


def all_features(transcoders: TranscoderSet) -> dict[int, Tensor]:
    """Every feature of every layer."""
    return {layer: torch.arange(transcoders[layer].config.n_features) for layer in transcoders.layers}


def interchange_plan(
    scope: Scope,
    subject: PairSubject,
    features: Features,
    where: Tensor | None = None,
    nodes: Sequence[Supernode] = (),
) -> dict[int, LayerEdit]:
    """Set features in the originals to what they are in the counterfactuals, position by position.

    Args:
        scope: the model and its transcoders.
        subject: the pairs.
        features: which, by layer.
        where: [T] bool, the positions to act on; all when None.
        nodes: supernodes whose positions their features keep to.
    """
    chosen = {layer: found for layer, found in features.items() if len(found)}
    plan = patch_plan(donor_activations(scope, subject.other, chosen), subject.batch.roles)
    plan = at_supernodes(plan, nodes, subject.batch.places)
    return plan if where is None else at_positions(plan, where)


@torch.no_grad()
def whole_plan(
    scope: Scope, donors: InputBatch, layers: Sequence[int] | None = None, where: Tensor | None = None
) -> dict[int, WholeEdit]:
    """Set every feature of some layers (all when None) to what it is in the donors; only active ones are kept."""
    last = torch.from_numpy(donors.roles == "last")
    acts = torch.ones(donors.length, dtype=torch.bool) if where is None else where
    inputs = scope.capture(donors, layers)
    plan = {}
    for layer in sorted(inputs):
        code = scope.transcoders[layer].encode(inputs.pop(layer))
        generated = SparseCode(code.indices[:, last][:, 0], code.values[:, last][:, 0])
        plan[layer] = WholeEdit(code, scope.transcoders[layer].config.n_features, acts, generated)
    return plan


def outcome(subject: PairSubject, logits: Tensor) -> Outcome:
    """Compare edited logits [B, V] with the pair's two answers."""
    said = logits.argmax(-1)
    changed = bootstrap_rate((said != subject.tokens).cpu().numpy())
    if not subject.moves:
        return Outcome(bootstrap_rate(np.zeros(subject.size, bool)), changed, None)
    follows = bootstrap_rate((said == subject.other_tokens).cpu().numpy())
    return Outcome(follows, changed, bootstrap_mean(recovered(subject, logits)))


def recovered(subject: PairSubject, logits: Tensor) -> np.ndarray:
    """[B], the share of the logit difference that edited logits [B, V] recover."""

    def gap(found: Tensor) -> Tensor:
        rows = torch.arange(subject.size, device=found.device)
        return (found[rows, subject.other_tokens] - found[rows, subject.tokens]).double()

    start, end = gap(subject.base.logits), gap(subject.other_logits)
    return ((gap(logits) - start) / (end - start)).cpu().numpy()


def run_interchange(scope: Scope, subject: PairSubject, plan: AnyPlan, mode: str = "free") -> Outcome:
    """Run a plan on the originals and compare."""
    return outcome(subject, run_edited(scope, subject.batch, plan, mode, subject.base))


def carried_controls(
    scope: Scope,
    subject: PairSubject,
    plan: Plan,
    mode: str,
    means: Mapping[int, Tensor],
    draws: int,
    seed: int = 0,
) -> list[Outcome]:
    """The same with as many other features, alike in layer and mean activation, carried from the same counterfactuals.

    Args:
        scope: the model and its transcoders.
        subject: the pairs.
        plan: the interchange to be controlled; its positions are kept.
        mode: as in `run_edited`.
        means: layer -> [F], by which features are matched.
        draws: how many; an outcome each.
        seed: under which they are drawn.
    """
    found = []
    for draw in control_draws(seed, draws):
        drawn = matched_features(plan, means, draw)
        control = interchange_plan(scope, subject, {layer: e.features for layer, e in drawn.items()})
        control = {
            layer: replace(edit, where=plan[layer].where, at=plan[layer].at, at_generated=plan[layer].at_generated)
            for layer, edit in control.items()
        }
        found.append(run_interchange(scope, subject, control, mode))
    return found


def direction_controls(scope: Scope, subject: PairSubject, plan: AnyPlan, draws: int, seed: int = 0) -> list[Outcome]:
    """The same with a random direction of the same norm at each layer and position, in free mode."""
    runs = (run_random_direction(scope, subject.batch, plan, one) for one in control_draws(seed, draws))
    return [outcome(subject, logits) for logits in runs]


def layer_role_grid(scope: Scope, subject: PairSubject, features: Features, roles: Sequence[str]) -> np.ndarray:
    """[layers, roles, 2]: recovered (of what should not move: changed) and follow rate when features of one layer
    at the positions of one role are carried over, in free mode; NaN where the prompt has no such position.
    """
    grid = np.full((len(scope.transcoders.layers), len(roles), 2), np.nan)
    for row, layer in enumerate(scope.transcoders.layers):
        if layer not in features:
            continue
        whole = len(features[layer]) == scope.transcoders[layer].config.n_features
        plan: AnyPlan = (
            whole_plan(scope, subject.other, [layer])
            if whole
            else interchange_plan(scope, subject, {layer: features[layer]})
        )
        for column, role in enumerate(roles):
            where = torch.from_numpy(subject.batch.roles == role)
            if bool(where.any()):
                found = run_interchange(scope, subject, at_positions(plan, where))
                first = found.changed.value if found.recovered is None else found.recovered.value
                grid[row, column] = first, found.follows.value
    return grid
