"""Mean activation of every feature by position role.

Legend: F features, roles as in `ModelInputs.roles`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.mlp_inputs import mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.positions import ROLES, Positions
from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch
from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass(frozen=True)
class RoleMeans:
    """`by_role[role][layer]` [F]: mean over the positions of that role and all prompts; `overall[layer]` over all."""

    by_role: dict[str, dict[int, Tensor]]
    overall: dict[int, Tensor]
    prompts: int


@torch.no_grad()
def role_means(
    adapter: Adapter, transcoders: TranscoderSet, batches: Sequence[InputBatch], positions: Positions | None = None
) -> RoleMeans:
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
        for layer, x in mlp_inputs(adapter, batch, transcoders.layers).items():
            code = transcoders[layer].encode(x)
            for role, mask in masks.items():
                total = code.values.new_zeros(transcoders[layer].config.n_features)
                total.index_add_(0, code.indices[:, mask].flatten(), code.values[:, mask].flatten())
                sums[role][layer] = sums[role].get(layer, torch.zeros_like(total)) + total
        for role, mask in masks.items():
            counts[role] += batch.size * int(mask.sum())
    by_role = {r: {layer: s / counts[r] for layer, s in table.items()} for r, table in sums.items() if counts[r]}
    everything = sum(counts.values())
    if not everything:
        raise UserError(f"no prompt has a position in {positions}; choose other positions")
    overall = {
        layer: torch.stack([sums[role][layer] for role in by_role]).sum(0) / everything for layer in transcoders.layers
    }
    return RoleMeans(by_role, overall, prompts)
