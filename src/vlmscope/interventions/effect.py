"""What a plan does to the next token of some prompts, beside its controls.

Legend: B prompts, V vocabulary, F width of a transcoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from vlmscope.core.intervention import Change, Effect
from vlmscope.core.seeds import control_draws
from vlmscope.interventions.controls import matched_features, run_random_direction
from vlmscope.interventions.edits import Plan
from vlmscope.interventions.frozen import BaseRun
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import kl_divergence
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
