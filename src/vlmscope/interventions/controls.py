"""Controls of an intervention: random features matched by layer and activation, and norm-matched random directions.

A control edits as many features of each layer, set to the same values, drawn at random among features that are about as
active on the same inputs but belong to no circuit. A random direction adds a vector of the same norm at each position.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.interventions.edits import AnyPlan, LayerEdit, Plan
from vlmscope.interventions.frozen import target_module
from vlmscope.interventions.run import add_ahead, edit_changes, layers_written, watch_inputs, watch_length
from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch
from vlmscope.transcoders.transcoder import TranscoderSet


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
def random_directions(adapter: Adapter, transcoders: TranscoderSet, plan: AnyPlan, seed: int) -> Iterator[None]:
    """As `editing`, but every layer gets, instead of its edit, a random direction of the same norm at every position;
    also token by token, where the plan edits generated tokens.
    """
    with ExitStack() as stack:
        seen = watch_length(stack, adapter)
        inputs = watch_inputs(stack, adapter, plan)
        pending: dict[int, Tensor] = {}
        for layer in layers_written(transcoders, plan):
            rng = generator(seed, "direction", layer)
            vector = torch.from_numpy(rng.standard_normal(adapter.d_model)).to(adapter.dtype)
            unit = vector / vector.norm()

            def hook(_m: Any, _args: Any, out: Tensor, layer: int = layer, unit: Tensor = unit) -> Tensor:
                if layer in plan:
                    add_ahead(
                        pending, layer, edit_changes(transcoders[layer], inputs.pop(layer), plan[layer], seen["tokens"])
                    )
                if layer not in pending:
                    return out
                return out + pending.pop(layer).norm(dim=-1, keepdim=True) * unit.to(out)

            target = target_module(adapter, layer, transcoders.config.output_hook)
            stack.callback(target.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def run_random_direction(
    adapter: Adapter, transcoders: TranscoderSet, batch: InputBatch, plan: AnyPlan, seed: int
) -> Tensor:
    """Logits [B, V] when each layer gets, instead of its edit, a random direction of the same norm at every
    position.
    """
    with random_directions(adapter, transcoders, plan, seed):
        return adapter.next_logits(batch.tensors)
