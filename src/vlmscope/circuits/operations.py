"""Operations of trials on activations: carry, move toward, shift, ablate, set to a mean level, exchange two supernodes.

Each class is an `Operation` of `vlmscope.interventions.trials`. Carrying activations from a donor is an interchange
intervention (Geiger et al., arXiv 2106.02997). Legend: B cases, T positions, n features of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vlmscope.circuits.circuit import Circuit, at_supernodes, steer_plan
from vlmscope.core.results import Supernode
from vlmscope.interventions.edits import (
    AnyPlan,
    Gate,
    LayerEdit,
    WholeEdit,
    ablation,
    donor_activations,
    patch_plan,
    position_mask,
    set_features,
)
from vlmscope.interventions.trials import Cases, Features
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet


def all_features(transcoders: TranscoderSet) -> dict[int, Tensor]:
    """Every feature of every layer."""
    return {layer: torch.arange(transcoders[layer].config.n_features) for layer in transcoders.layers}


@dataclass(frozen=True)
class Carry:
    """Give features the donors' activations, times `strength`; every feature when `features` is None."""

    features: Features | None
    nodes: tuple[Supernode, ...] = ()  # whose positions their features keep to
    last: bool = False  # the donors' last position into the last position alone: they may have any length
    at: Tensor | None = None  # [B, T] bool, positions of each case; features stay live at its others
    own_values: ClassVar[bool] = True

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        roles, donors = cases.batch.roles, cases.donor_codes(scope)
        chosen = self.features if features is None else features
        if chosen is None:
            assert strength == 1, "all features are carried at their own level"
            return {layer: self._whole(scope, cases, layer, code) for layer, code in donors.items()}
        carried = donor_activations(scope, donors, {layer: rows for layer, rows in chosen.items() if len(rows)})
        if self.last:
            where = position_mask(roles, "last")
            return {layer: set_features(f, strength * acts[:, -1:], where) for layer, (f, acts) in carried.items()}
        plan = patch_plan(carried, roles, strength)
        if self.at is not None:
            mask = self.at.unsqueeze(-1).to(scope.adapter.device)
            plan = {n: replace(e, value=mask * e.value, scale=(~mask).to(e.value)) for n, e in plan.items()}
        return at_supernodes(plan, self.nodes, cases.batch.places)

    def _whole(self, scope: Scope, cases: Cases, layer: int, code: SparseCode) -> WholeEdit:
        """Every feature of a layer set to what it is in the donors; only active ones are kept."""
        roles, width = cases.batch.roles, scope.transcoders[layer].config.n_features
        if self.last:
            indices, values = (entries[:, -1:].expand(-1, len(roles), -1) for entries in (code.indices, code.values))
            return WholeEdit(SparseCode(indices, values), width, position_mask(roles, "last"))
        last = torch.from_numpy(roles == "last")
        generated = SparseCode(code.indices[:, last][:, 0], code.values[:, last][:, 0])
        return WholeEdit(code, width, position_mask(roles, "all"), generated)


@dataclass(frozen=True)
class Toward:
    """Move features `strength` of the way from their own activation to the donors' (2: twice as far), never below 0."""

    features: Features
    nodes: tuple[Supernode, ...] = ()
    own_values: ClassVar[bool] = True

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        chosen = self.features if features is None else features
        start = donor_activations(scope, cases.codes(scope), chosen)
        end = patch_plan(donor_activations(scope, cases.donor_codes(scope), chosen), cases.batch.roles)
        plan = {
            layer: replace(e, value=(start[layer][1] + strength * (e.value - start[layer][1])).clamp_min(0))
            for layer, e in end.items()
        }
        return at_supernodes(plan, self.nodes, cases.batch.places)


@dataclass(frozen=True)
class Shift:
    """Add `strength` times a change [T, n] to whatever the activations are."""

    change: Mapping[int, tuple[Tensor, Tensor]]
    nodes: tuple[Supernode, ...] = ()
    own_values: ClassVar[bool] = False

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        everywhere = torch.ones(cases.batch.length, dtype=torch.bool)
        plan = {
            layer: LayerEdit(indices, strength * delta, delta.new_ones(len(indices)), everywhere)
            for layer, (indices, delta) in self.change.items()
        }
        return at_supernodes(plan, self.nodes, cases.batch.places)


@dataclass(frozen=True)
class Ablate:
    """Set features to 0 at every position and at generated tokens."""

    features: Features
    nodes: tuple[Supernode, ...] = ()
    own_values: ClassVar[bool] = True

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        everywhere = torch.ones(cases.batch.length, dtype=torch.bool)
        chosen = self.features if features is None else features
        plan = {layer: ablation(indices, everywhere) for layer, indices in chosen.items()}
        return at_supernodes(plan, self.nodes, cases.batch.places)


@dataclass(frozen=True)
class Level:
    """Set features to the originals' mean level, moved `strength` of the way to the counterfactuals', never below 0.

    Means are taken place by place, over the prompt and over the answer after it, so that the n-th generated token has
    its own; the last serves those after it.

    The gate acts at each layer and place only as far as the features that are stronger on originals are active there,
    in full from this share of their level; a layer without such features is left alone. Without one it acts
    everywhere.
    """

    features: Features
    sides: tuple[InputBatch, InputBatch]  # originals, counterfactuals of training pairs with answers, all equally long
    prompt: int  # positions before the answer
    gate: float | None = None
    own_values: ClassVar[bool] = False

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        starts, ends = (donor_activations(scope, side, self.features) for side in self.sides)
        where = torch.ones(self.prompt, dtype=torch.bool)
        plan: dict[int, LayerEdit] = {}
        for layer, (indices, values) in starts.items():
            start, end = values.mean(0), ends[layer][1].mean(0)  # [T + S, n] over S tokens of the answer
            value = (start + strength * (end - start)).clamp_min(0)
            steps = value[self.prompt :].unsqueeze(1)
            edit = set_features(indices, value[: self.prompt], where, steps if len(steps) else None)
            if self.gate is not None:
                fading = torch.nonzero(start.sum(0) > end.sum(0)).flatten()
                if not len(fading):
                    continue
                level = start[:, fading]
                edit = replace(edit, gate=Gate(indices[fading], level[: self.prompt], level[self.prompt :], self.gate))
            plan[layer] = edit
        return plan


@dataclass(frozen=True)
class Exchange:
    """Suppress one supernode and raise another to `strength` times its own level, as far as the gate is open.

    The gate reads the unedited prompts. With x[s, t], the sum of what the features of supernode s write at position t
    (activation times norm) as a share of that at their level, the edit acts there by

        g[t] = (x[suppress, t] - x[raised, t]) / gate, between 0 and 1.

    The soft tokens where a supernode acts have one gate, of their means, since the pictures differ in where a thing is.
    So prompts that have the suppressed concept no more than the raised one stay as they are. Conditional steering
    (CAST, arXiv 2409.05907) with features as the condition, and without its hard threshold.
    """

    circuit: Circuit
    suppress: str
    raised: str
    gate: float | None = None
    limit: int | None = None
    by_question: bool = True
    own_values: ClassVar[bool] = False

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        question = cases.question if self.by_question else None
        places = cases.batch.places
        plan = steer_plan(self.circuit, self.suppress, self.raised, places, strength, question, self.limit)
        if self.gate is None:
            return plan
        # A layer where nothing is suppressed has nothing to exchange.
        shares = {name: self._shares(scope, cases, name, question) for name in (self.suppress, self.raised)}
        return {
            layer: replace(plan[layer], openness=((own - shares[self.raised].get(layer, 0.0)) / self.gate).clamp(0, 1))
            for layer, own in shares[self.suppress].items()
        }

    def _shares(self, scope: Scope, cases: Cases, name: str, question: str | None) -> dict[int, Tensor]:
        """Layer -> [B, T], what a supernode writes, relative to its level; 0 where that is 0."""
        places, positions = cases.batch.places, self.circuit.node(name).positions
        soft = torch.from_numpy(cases.batch.is_image & (True if positions is None else positions.mask(places)))
        shares: dict[int, Tensor] = {}
        for layer, chosen in self.circuit.indices(name, self.limit).items():
            code, transcoder = cases.codes(scope)[layer], scope.transcoders[layer]
            indices = chosen.to(code.indices.device)
            norms = transcoder.write_norms()[indices]
            written = code.select(indices, transcoder.config.n_features).to(norms) @ norms
            level = self.circuit.levels_at(name, places.roles.tolist(), layer, question)[:, : len(chosen)].to(norms)
            usual = level @ norms
            if bool(soft.any()):
                written[:, soft], usual[soft] = written[:, soft].mean(1, keepdim=True), usual[soft].mean()
            shares[layer] = torch.where(usual > 0, written / usual.clamp_min(torch.finfo(usual.dtype).tiny), 0.0)
        return shares
