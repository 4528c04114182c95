"""Edits that are no plan: mean ablation of whole MLP outputs, and many single edits of one prompt run as a batch.

Legend: n edits, B prompts or edits of one forward, T positions, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import BaseRun, run_edited
from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope

BATCH = 96  # edits of one forward


@torch.no_grad()
def mlp_outputs(adapter: Adapter, batch: InputBatch) -> dict[int, Tensor]:
    """Raw MLP outputs by layer [B, T, d] of one unedited forward."""
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in range(adapter.n_layers):

            def hook(_m: Any, _a: Any, out: Tensor, layer: int = layer) -> None:
                found[layer] = out

            stack.callback(adapter.mlp(layer).register_forward_hook(hook).remove)
        adapter.next_logits(batch.tensors)
    return found


@torch.no_grad()
def mean_ablated(adapter: Adapter, batch: InputBatch, layer: int, where: Tensor, mean: Tensor) -> Tensor:
    """Last-position logits [B, V] when the MLP output of `layer` is `mean` [d] at positions `where` [T] bool."""

    def hook(_m: Any, _a: Any, out: Tensor) -> Tensor:
        replaced = out.clone()
        replaced[:, where] = mean.to(out.dtype)
        return replaced

    handle = adapter.mlp(layer).register_forward_hook(hook)
    try:
        return adapter.next_logits(batch.tensors)
    finally:
        handle.remove()


@dataclass(frozen=True)
class SingleEdits:
    """n edits: row i makes feature `index[i]` of `layer[i]` at `position[i]` `scale[i] * current + value[i]`.

    Attributes:
        layer, position, index: [n] int64.
        scale, value: [n] float64.
    """

    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    scale: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    def rows(self, some: slice) -> SingleEdits:
        """Some of them."""
        return SingleEdits(*(values[some] for values in vars(self).values()))


def single_plan(edits: SingleEdits, size: int, length: int, like: Tensor) -> dict[int, LayerEdit]:
    """A plan for `size` >= n rows of `length` tokens in which row i has edit i alone; rows beyond the edits stay as
    they are. `like` has the dtype and the device of the model.
    """
    plan: dict[int, LayerEdit] = {}
    for layer in np.unique(edits.layer).tolist():
        rows = np.flatnonzero(edits.layer == layer)
        features, slot = np.unique(edits.index[rows], return_inverse=True)
        at = (torch.from_numpy(rows), torch.from_numpy(edits.position[rows]), torch.from_numpy(slot))
        scale, value = like.new_ones(size, length, len(features)), like.new_zeros(size, length, len(features))
        scale[at] = torch.from_numpy(edits.scale[rows]).to(like)
        value[at] = torch.from_numpy(edits.value[rows]).to(like)
        where = torch.zeros(length, dtype=torch.bool)
        where[at[1]] = True
        plan[layer] = LayerEdit(torch.from_numpy(features).to(like.device), value, scale, where)
    return plan


def repeated(base: BaseRun, size: int) -> BaseRun:
    """The run of one prompt as that of a batch of `size` copies, without copying it."""
    tables = {
        key: {at: v.expand(size, *v.shape[1:]) for at, v in table.items()}
        for key, table in vars(base).items()
        if key not in ("logits", "codes")
    }
    return replace(base, logits=base.logits.expand(size, -1), **tables)


def single_effects(
    scope: Scope,
    batch: InputBatch,
    base: BaseRun,
    edits: SingleEdits,
    mode: str,
    tokens: tuple[int, int],
) -> np.ndarray:
    """[n] float64, how far each edit of one prompt moves the logit of a token minus that of another at the last
    position.

    Every forward carries an unedited row besides, from which the others are counted: rounding that depends on the
    batch's size cancels. Of a model that caps its logits, differences before the cap.
    """
    assert batch.size == 1, f"single edits are of one prompt, not of {batch.size}"
    found = []
    for begin in range(0, len(edits), BATCH):
        some = edits.rows(slice(begin, begin + BATCH))
        size = len(some) + 1
        plan = single_plan(some, size, batch.length, base.logits)
        copies = batch.select([0] * size)
        logits = run_edited(scope, copies, plan, mode, repeated(base, size))[:, list(tokens)].double()
        cap = scope.adapter.logit_softcap
        if cap is not None:
            logits = cap * torch.atanh(logits / cap)
        difference = (logits[:, 0] - logits[:, 1]).cpu().numpy()
        found.append(difference[:-1] - difference[-1])
    return np.concatenate(found) if found else np.zeros(0)
