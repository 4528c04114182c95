"""Plans from features that the user names or from donors, and the features that a control edits instead.

A matched control edits as many features of each layer in the same way, drawn at random among those that are about as
active on the same inputs but belong to no circuit. The other control, a random direction of the same norm, is
`run.editing(direction=...)`.

Legend: B prompts, T positions, n features of a layer, F width of its transcoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.interventions.edits import LayerEdit, Plan, position_mask, set_features
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet


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
    """Set features to given activations (0 ablates) in a prompt of `length` tokens.

    With `positions` the edit acts on these alone, and not on generated tokens; without them everywhere.

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
    for layer, features in by_layer(scope.transcoders, values).items():
        chosen = [values[FeatureId(layer, index)] for index in features.tolist()]
        value = torch.tensor(chosen, dtype=scope.adapter.dtype, device=scope.adapter.device)
        generated = value if positions is None else None
        plan[layer] = set_features(features.to(scope.adapter.device), value, where, generated)
    return plan


@torch.no_grad()
def codes(scope: Scope, batch: InputBatch, layers: Sequence[int] | None = None) -> dict[int, SparseCode]:
    """Layer -> the code [B, T, k] of a batch, from one forward; all layers when None."""
    inputs = scope.capture(batch, layers)
    return {layer: scope.transcoders[layer].encode(inputs.pop(layer)) for layer in sorted(inputs)}


def donor_activations(
    scope: Scope, donors: InputBatch | Mapping[int, SparseCode], features: Mapping[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The donors' activations of chosen features: layer -> (features [n], activations [B, T, n]); `donors` are
    prompts, or their codes.
    """
    coded = codes(scope, donors, sorted(features)) if isinstance(donors, InputBatch) else donors
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in sorted(features):
        chosen = features[layer].to(coded[layer].indices.device)
        found[layer] = (chosen, coded[layer].select(chosen, scope.transcoders[layer].config.n_features))
    return found


def patch_plan(
    activations: Mapping[int, tuple[Tensor, Tensor]],
    roles: np.ndarray,
    strength: float = 1.0,
    pooled: bool = False,
) -> dict[int, LayerEdit]:
    """Carry activations (of `donor_activations`, row i the donor of recipient i) into a run of the same wording.

    They are multiplied by `strength`. Generated tokens get the donor's activations at its last position; with `pooled`
    every soft token gets the donor's mean over its soft tokens, instead of the one at the same place.
    """
    where = position_mask(roles, "all")
    soft, last = torch.from_numpy(roles == "image"), torch.from_numpy(roles == "last")
    plan: dict[int, LayerEdit] = {}
    for layer, (features, values) in activations.items():
        carried = values
        if pooled and bool(soft.any()):
            carried = values.clone()
            carried[:, soft] = values[:, soft].mean(1, keepdim=True)
        carried = carried * strength
        plan[layer] = set_features(features, carried, where, carried[:, last][:, 0])
    return plan


def mean_activations(scope: Scope, batches: Sequence[InputBatch], layers: Sequence[int]) -> dict[int, Tensor]:
    """Layer -> [F] float64, mean activation of every feature over the positions of all prompts (equally long)."""
    means: dict[int, Tensor] = {}
    for batch in batches:
        for layer, code in codes(scope, batch, layers).items():
            dense = code.values.new_zeros(scope.transcoders[layer].config.n_features, dtype=torch.float64)
            dense.scatter_add_(0, code.indices.flatten(), code.values.flatten().double())
            share = dense / (batch.size * batch.length * len(batches))
            means[layer] = means[layer] + share if layer in means else share
    return means


def matched_features(
    plan: Plan, mean_activation: Mapping[int, Tensor], seed: int, neighbours: int = 8
) -> dict[int, LayerEdit]:
    """The plan with each edited feature replaced by a random other one of its layer with a similar mean activation.

    `mean_activation`, layer -> [F], is taken on the data that the circuit was chosen on; each replacement is drawn,
    under `seed`, from the `neighbours` candidates that are nearest in it.

    Raises:
        UserError: a layer has too few other features.
    """
    control: dict[int, LayerEdit] = {}
    for layer, edit in plan.items():
        rng = generator(seed, "control", layer)
        means = mean_activation[layer].double().numpy(force=True)
        free = np.setdiff1d(np.arange(len(means)), edit.features.numpy(force=True))
        if len(free) < len(edit.features):
            raise UserError(
                f"{len(edit.features)} of the {len(means)} features of layer {layer} are edited, so no control can be "
                "drawn from the others; name fewer features, or draw no controls"
            )
        chosen: list[int] = []
        for feature in edit.features.tolist():
            gap = np.abs(means[free] - means[feature])
            # Dead features are no control: a change along a row that the model never uses proves nothing.
            gap[means[free] <= 0] += means.max() + 1.0
            near = free[np.argpartition(gap, min(neighbours, len(free) - 1))[:neighbours]]
            live = near[means[near] > 0]
            chosen.append(int(rng.choice(live if len(live) else near)))
            free = free[free != chosen[-1]]
        control[layer] = replace(edit, features=edit.features.new_tensor(chosen))
    return control
