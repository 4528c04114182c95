"""From a circuit to a plan of edits: steering with its own levels, or a donor's activations for patching.

Legend: B prompts, T positions, n features of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.circuit import Circuit
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Supernode
from vlmscope.core.records import Places
from vlmscope.interventions import named
from vlmscope.interventions.edits import Gate, LayerEdit, Plan, features_at, merge, position_mask, set_features
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope


def steer_plan(
    circuit: Circuit,
    suppress: str,
    raised: str,
    roles: np.ndarray | Places,
    strength: float,
    question: str | None = None,
    limit: int | None = None,
    gate: float | None = None,
) -> dict[int, LayerEdit]:
    """Set one supernode's features to zero and the other's to `strength` times their level on their own concept.

    With a gate the two are exchanged: each layer and position is edited only as far as the suppressed supernode is
    active there, so that prompts which do not have it stay as they are.

    Args:
        circuit: with levels by role.
        suppress: supernode that goes to zero. A feature of both supernodes is raised.
        raised: supernode that is raised.
        roles: [T] position roles of the prompt, or its places, which a supernode with a box needs.
        strength: 1 is the mean activation on the raised concept.
        question: take the levels of this question; the mean over all questions when None.
        limit: at most so many features a layer and supernode.
        gate: the share of the suppressed supernode's level at which the edit acts in full; None acts everywhere.
    """
    places = roles if isinstance(roles, Places) else Places(roles)
    roles = places.roles
    where = position_mask(roles, "all")

    def levels(name: str, layer: int, n: int) -> tuple[Tensor, Tensor]:
        table = {role: circuit.level(name, role, layer, question)[:n] for role in {*roles.tolist(), "last"}}
        return torch.stack([table[role] for role in roles.tolist()]), table["last"]

    suppressed = circuit.indices(suppress, limit)
    off = {
        layer: set_features(found, torch.zeros(len(found)), where, torch.zeros(len(found)))
        for layer, found in suppressed.items()
    }
    on: dict[int, LayerEdit] = {}
    for layer, found in circuit.indices(raised, limit).items():
        value, generated = levels(raised, layer, len(found))
        on[layer] = set_features(found, value * strength, where, generated * strength)
    plan = merge(
        [at_supernodes(off, [circuit.node(suppress)], places), at_supernodes(on, [circuit.node(raised)], places)]
    )
    if gate is None:
        return plan
    # A layer where nothing is suppressed has nothing to exchange.
    return {
        layer: replace(edit, gate=Gate(found, *levels(suppress, layer, len(found)), gate))
        for layer, edit in plan.items()
        if (found := suppressed.get(layer)) is not None
    }


def at_supernodes(plan: Plan, nodes: Iterable[Supernode], places: Places) -> dict[int, LayerEdit]:
    """The plan, with every feature edited only at the positions of the supernodes that it belongs to.

    Supernodes without positions are meant everywhere. A feature of several is edited at the positions of any of them;
    features of none are left as they are. Generated tokens are touched where a supernode has the role "answer".

    Raises:
        UserError: no position of the prompt is one of a supernode's.
    """
    nodes = list(nodes)
    free = {member.feature for node in nodes if node.positions is None for member in node.features}
    masks: dict[tuple[int, int], tuple[Tensor, bool]] = {}
    for node in nodes:
        if node.positions is None:
            continue
        where = torch.from_numpy(node.positions.mask(places))
        if not bool(where.any()) and not node.positions.generated:
            raise UserError(f"supernode {node.name}: the prompt has no position in {node.positions}")
        for member in node.features:
            if member.feature not in free:
                before = masks.get(member.feature, (torch.zeros_like(where), False))
                masks[member.feature] = (before[0] | where, before[1] or node.positions.generated)
    edited = dict(plan)
    for (layer, index), (where, generated) in masks.items():
        if layer in edited:
            edited[layer] = features_at(edited[layer], torch.tensor([index]), where, generated)
    return edited


def donor_activations(
    scope: Scope, donors: InputBatch, circuit: Circuit, limit: int | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """The donors' activations of all features of a circuit: layer -> (features [n], activations [B, T, n])."""
    return named.donor_activations(scope, donors, union(circuit, limit))


def union(circuit: Circuit, limit: int | None = None) -> dict[int, Tensor]:
    """The distinct features of all supernodes by layer."""
    tables = [circuit.indices(name, limit) for name in circuit.supernodes]
    layers = sorted({layer for table in tables for layer in table})
    return {layer: torch.cat([t[layer] for t in tables if layer in t]).unique() for layer in layers}
