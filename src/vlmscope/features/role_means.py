"""Mean activation of every feature by position role.

Legend: F features, roles as in `ModelInputs.roles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.positions import ROLES, Positions
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope


@dataclass(frozen=True)
class RoleMeans:
    """`by_role[role][layer]` [F]: mean over the positions of that role and all prompts; `overall[layer]` over all.

    In float32 at least, whatever the model's dtype.
    """

    by_role: dict[str, dict[int, Tensor]]
    overall: dict[int, Tensor]
    prompts: int


@torch.no_grad()
def role_means(scope: Scope, batches: Sequence[InputBatch], positions: Positions | None = None) -> RoleMeans:
    """Average activations over batches of prompts (which may differ in length from one batch to the next).

    With `positions` only those count; a role without one is left out.
    """
    sums: dict[str, dict[int, Tensor]] = {role: {} for role in ROLES}
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    prompts = 0
    for batch in batches:
        prompts += batch.size
        there = np.ones(batch.length, dtype=bool) if positions is None else positions.mask(batch.places)
        present = [role for role in ROLES if ((batch.roles == role) & there).any()]
        masks = {role: torch.from_numpy((batch.roles == role) & there) for role in present}
        for layer, x in scope.capture(batch).items():
            code = scope.transcoders[layer].encode(x)
            for role, mask in masks.items():
                # Half precision cannot count: a running sum stops growing at a few hundred times what is added.
                total = code.values.new_zeros(scope.transcoders[layer].config.n_features, dtype=torch.float64)
                total.index_add_(0, code.indices[:, mask].flatten(), code.values[:, mask].flatten().double())
                sums[role][layer] = sums[role].get(layer, torch.zeros_like(total)) + total
        for role, mask in masks.items():
            counts[role] += batch.size * int(mask.sum())
    everything = sum(counts.values())
    if not everything:
        raise UserError(f"no prompt has a position in {positions}; choose other positions")

    def mean(total: Tensor, count: int, layer: int) -> Tensor:
        return (total / count).to(torch.promote_types(scope.transcoders[layer].W_dec.dtype, torch.float32))

    by_role = {
        role: {layer: mean(total, counts[role], layer) for layer, total in table.items()}
        for role, table in sums.items()
        if counts[role]
    }
    overall = {
        layer: mean(torch.stack([sums[role][layer] for role in by_role]).sum(0), everything, layer)
        for layer in scope.transcoders.layers
    }
    return RoleMeans(by_role, overall, prompts)
