"""Effects of plans, of mean ablation, and of many single edits at once.

What a plan does to the next token of some prompts, beside its controls.

Legend: B prompts, V vocabulary, F width of a transcoder.

Mean ablation of whole MLP outputs: how much a layer matters at some positions.

Many edits of one prompt, each of a single feature at a single position, run together as a batch.

Legend: n edits, B edits of one forward, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.intervention import Change, Effect
from vlmscope.core.records import control_draws
from vlmscope.interventions.edits import LayerEdit, Plan
from vlmscope.interventions.named import matched_features, run_random_direction
from vlmscope.interventions.run import BaseRun, run_edited
from vlmscope.metrics.causal import kl_divergence
from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope


def measure_effect(
    scope: Scope,
    batch: InputBatch,
    base: BaseRun,
    plan: Plan,
    mode: str,
    mean_activation: Mapping[int, Tensor],
    draws: int,
    seed: int = 0,
) -> tuple[Effect, Tensor]:
    """Run a plan and its controls.

    Args:
        scope: the model and its transcoders.
        batch: the prompts.
        base: their unedited run.
        plan: edits by layer.
        mode: 'direct', 'frozen_attention' or 'free'. Random directions are run in free mode alone.
        mean_activation: layer -> [F], by which matched features are chosen.
        draws: how often each control is drawn; 0 for no controls.
        seed: under which they are drawn.

    Returns:
        The effect, and the edited logits [B, V] at the last position.
    """
    logits = run_edited(scope, batch, plan, mode, base)
    matched = [
        run_edited(scope, batch, matched_features(plan, mean_activation, draw), mode, base)
        for draw in control_draws(seed, draws)
    ]
    directions = [
        run_random_direction(scope, batch, plan, draw) for draw in control_draws(seed, draws if mode == "free" else 0)
    ]
    effect = Effect(
        mode,
        _change(base.logits, [logits]),
        _change(base.logits, matched) if matched else None,
        _change(base.logits, directions) if directions else None,
    )
    return effect, logits


def _change(before: Tensor, after: Sequence[Tensor]) -> Change:
    """Mean over prompts and runs of KL(before || after), and the share whose most probable token is another."""
    first = before.double().cpu().numpy()
    found = [logits.double().cpu().numpy() for logits in after]
    kl = np.mean([kl_divergence(first, logits).mean() for logits in found])
    changed = np.mean([(first.argmax(-1) != logits.argmax(-1)).mean() for logits in found])
    return Change(float(kl), float(changed))


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
