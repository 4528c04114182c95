"""Plans from named features or donors, and the controls of a plan.

Plans from features that the user names: set to given values, or carried over from a donor run.

Legend: B prompts, T positions, n features of a layer, F width of its transcoder.

Controls of an intervention: random features matched by layer and activation, and norm-matched random directions.

A control edits as many features of each layer, set to the same values, drawn at random among features that are about as
active on the same inputs but belong to no circuit. A random direction adds a vector of the same norm at each position.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.interventions.edits import AnyPlan, LayerEdit, Plan, position_mask, set_features
from vlmscope.interventions.run import (
    activations,
    add_ahead,
    edit_changes,
    layers_written,
    target_module,
    watch_inputs,
    watch_length,
)
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet


def by_layer(transcoders: TranscoderSet, features: Iterable[FeatureId]) -> dict[int, Tensor]:
    """Features grouped by layer, [n] int64, each once, in the order of naming.

    Raises:
        UserError: the transcoders do not have one of them.
    """
    table: dict[int, list[int]] = {}
    for feature in dict.fromkeys(features):  # named twice, it is still one feature
        if feature.layer not in transcoders:
            raise UserError(f"feature {feature}: the transcoders have layers {transcoders.layers}")
        width = transcoders[feature.layer].config.n_features
        if feature.index >= width:
            raise UserError(f"feature {feature}: layer {feature.layer} has {width} features")
        table.setdefault(feature.layer, []).append(feature.index)
    return {layer: torch.tensor(found) for layer, found in table.items()}


def steer_plan(
    scope: Scope,
    values: Mapping[FeatureId, float],
    length: int,
    positions: Sequence[int] | None = None,
) -> dict[int, LayerEdit]:
    """Set features to given activations (0 ablates).

    Args:
        scope: the model and its transcoders.
        values: feature -> activation.
        length: T of the prompt.
        positions: prompt positions to act on, and then not on generated tokens; everywhere when None.

    Raises:
        UserError: a feature or position that is not there.
    """
    where = torch.ones(length, dtype=torch.bool)
    if positions is not None:
        bad = [p for p in positions if not 0 <= p < length]
        if bad:
            raise UserError(f"position {bad[0]}: the prompt has positions 0 to {length - 1}")
        where = torch.zeros_like(where)
        where[list(positions)] = True
    plan: dict[int, LayerEdit] = {}
    for layer, found in by_layer(scope.transcoders, values).items():
        chosen = [values[FeatureId(layer, index)] for index in found.tolist()]
        value = torch.tensor(chosen, dtype=scope.adapter.dtype, device=scope.adapter.device)
        plan[layer] = set_features(found.to(scope.adapter.device), value, where, value if positions is None else None)
    return plan


@torch.no_grad()
def donor_activations(
    scope: Scope, donors: InputBatch, features: Mapping[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The donors' activations of chosen features: layer -> (features [n], activations [B, T, n])."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for layer, x in scope.capture(donors, sorted(features)).items():
        chosen = features[layer].to(x.device)
        found[layer] = (chosen, activations(scope.transcoders[layer], x, chosen))
    return found


def patch_plan(
    activations: Mapping[int, tuple[Tensor, Tensor]],
    roles: np.ndarray,
    strength: float = 1.0,
    pooled: bool = False,
) -> dict[int, LayerEdit]:
    """Carry activations from a donor run into a recipient run of the same wording.

    Generated tokens get the donor's activations at its last position.

    Args:
        activations: what `donor_activations` returned, row i the donor of recipient i.
        roles: [T] position roles.
        strength: factor of the donor's activations; 1 is the patch proper.
        pooled: give every soft token the donor's mean over its soft tokens, instead of the one at the same place.
    """
    where = position_mask(roles, "all")
    soft = torch.from_numpy(roles == "image")
    last = torch.from_numpy(roles == "last")
    plan: dict[int, LayerEdit] = {}
    for layer, (features, values) in activations.items():
        carried = values
        if pooled and bool(soft.any()):
            carried = values.clone()
            carried[:, soft] = values[:, soft].mean(1, keepdim=True)
        carried = carried * strength
        plan[layer] = set_features(features, carried, where, carried[:, last][:, 0])
    return plan


@torch.no_grad()
def mean_activations(scope: Scope, batches: Sequence[InputBatch], layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> [F] float64, mean activation of every feature over the positions of all prompts (equally long)."""
    means: dict[int, Tensor] = {}
    for batch in batches:
        for layer, x in scope.capture(batch, layers).items():
            code, width = scope.transcoders[layer].encode(x), scope.transcoders[layer].config.n_features
            dense = torch.zeros(width, dtype=torch.float64, device=x.device)
            dense.scatter_add_(0, code.indices.flatten(), code.values.flatten().double())
            share = dense / (x.shape[0] * x.shape[1] * len(batches))
            means[layer] = means[layer] + share if layer in means else share
    return means


def matched_features(
    plan: Plan, mean_activation: Mapping[int, Tensor], seed: int, neighbours: int = 8
) -> dict[int, LayerEdit]:
    """Replace each edited feature by a random one of its layer with a similar mean activation.

    Args:
        plan: the intervention to be controlled.
        mean_activation: layer -> [F], mean activation of every feature on the data that the circuit was found on.
        seed: which control.
        neighbours: how many candidates nearest in mean activation each replacement is drawn from.

    Returns:
        A plan with the same values, scales and positions on other features, never on those of `plan`.

    Raises:
        UserError: a layer has too few other features.
    """
    control: dict[int, LayerEdit] = {}
    for layer, edit in plan.items():
        rng = generator(seed, "control", layer)
        means = mean_activation[layer].double().numpy(force=True)
        free = np.setdiff1d(np.arange(len(means)), edit.features.numpy(force=True))
        chosen: list[int] = []
        if len(free) < len(edit.features):
            raise UserError(
                f"{len(edit.features)} of the {len(means)} features of layer {layer} are edited, so no control can be "
                "drawn from the others; name fewer features, or draw no controls"
            )
        for feature in edit.features.tolist():
            gap = np.abs(means[free] - means[feature])
            # Dead features are no control: a change along a row that the model never uses proves nothing.
            gap[means[free] <= 0] += means.max() + 1.0
            near = free[np.argpartition(gap, min(neighbours, len(free) - 1))[:neighbours]]
            live = near[means[near] > 0]
            near = live if len(live) else near
            pick = int(rng.choice(near))
            chosen.append(pick)
            free = free[free != pick]
        control[layer] = replace(edit, features=edit.features.new_tensor(chosen))
    return control


@contextmanager
def random_directions(scope: Scope, plan: AnyPlan, seed: int) -> Iterator[None]:
    """As `editing`, but every layer gets, instead of its edit, a random direction of the same norm at every position;
    also token by token, where the plan edits generated tokens.
    """
    with ExitStack() as stack:
        seen = watch_length(stack, scope.adapter)
        inputs = watch_inputs(stack, scope.adapter, plan)
        pending: dict[int, Tensor] = {}
        for layer in layers_written(scope.transcoders, plan):
            rng = generator(seed, "direction", layer)
            vector = torch.from_numpy(rng.standard_normal(scope.adapter.d_model)).to(scope.adapter.dtype)
            unit = vector / vector.norm()

            def hook(_m: Any, _args: Any, out: Tensor, layer: int = layer, unit: Tensor = unit) -> Tensor:
                if layer in plan:
                    add_ahead(
                        pending,
                        layer,
                        edit_changes(scope.transcoders[layer], inputs.pop(layer), plan[layer], seen["tokens"]),
                    )
                if layer not in pending:
                    return out
                return out + pending.pop(layer).norm(dim=-1, keepdim=True) * unit.to(out)

            target = target_module(scope.adapter, layer, scope.transcoders.config.output_hook)
            stack.callback(target.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def run_random_direction(scope: Scope, batch: InputBatch, plan: AnyPlan, seed: int) -> Tensor:
    """Logits [B, V] when each layer gets, instead of its edit, a random direction of the same norm at every
    position.
    """
    with random_directions(scope, plan, seed):
        return scope.forward(batch)
