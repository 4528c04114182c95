"""Many edits of one prompt, each of a single feature at a single position, run together as a batch.

Legend: n edits, B edits of one forward, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.frozen import BaseRun
from vlmscope.interventions.run import run_edited
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope

BATCH = 96  # edits of one forward


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
        return SingleEdits(*(v[some] for v in (self.layer, self.position, self.index, self.scale, self.value)))


def single_plan(edits: SingleEdits, size: int, length: int, like: Tensor) -> dict[int, LayerEdit]:
    """A plan for a batch of `size` rows in which row i has edit i alone; rows beyond the edits stay as they are.

    Args:
        edits: at most `size`.
        size: B.
        length: T.
        like: has the dtype and the device of the model.
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

    def tiled(table: dict) -> dict:
        return {key: v.expand(size, *v.shape[1:]) for key, v in table.items()}

    return replace(
        base,
        logits=base.logits.expand(size, -1),
        patterns=tiled(base.patterns),
        mlp_in=tiled(base.mlp_in),
        written=tiled(base.written),
        inverse_rms=tiled(base.inverse_rms),
    )


def single_effects(
    scope: Scope,
    batch: InputBatch,
    base: BaseRun,
    edits: SingleEdits,
    mode: str,
    tokens: tuple[int, int],
) -> np.ndarray:
    """How far each edit moves the logit of one token minus that of another at the last position.

    Every forward carries an unedited row besides, from which the others are counted: rounding that depends on the
    batch's size cancels.

    Args:
        scope: the model and its transcoders.
        batch: one prompt.
        base: its unedited run.
        edits: n edits.
        mode: 'direct', 'frozen_attention' or 'free'.
        tokens: the two tokens.

    Returns:
        [n] float64. Of a model that caps its logits, differences before the cap.
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
