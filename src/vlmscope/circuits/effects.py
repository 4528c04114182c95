"""Measuring what a plan does to answers: flips with intervals and controls, third parties, specificity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.intervention import Rate
from vlmscope.core.seeds import control_draws
from vlmscope.interventions.controls import matched_features, run_random_direction
from vlmscope.interventions.edits import Plan, at_positions, position_mask, without_layers
from vlmscope.interventions.frozen import BaseRun, base_run
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_rate, kl_divergence
from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch
from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass(frozen=True)
class Subject:
    """One question on recipient pictures: the batch, its unedited run, and which answer counts as a flip."""

    question: str
    batch: InputBatch
    base: BaseRun
    recipient_token: int
    donor_token: int


def make_subject(
    adapter: Adapter, transcoders: TranscoderSet, question: str, batch: InputBatch, recipient: int, donor: int
) -> Subject:
    """Run the batch once and keep it."""
    return Subject(question, batch, base_run(adapter, transcoders, batch), recipient, donor)


def in_scope(plan: Plan, scope: str, roles: np.ndarray, last_layer: int) -> Plan:
    """The plan restricted to a scope: 'all', 'no_last_layer', 'no_last_position', 'role_<role>'."""
    if scope == "no_last_layer":
        return without_layers(plan, [last_layer])
    return plan if scope == "all" else at_positions(plan, position_mask(roles, scope))


def flips(logits: Tensor, subject: Subject) -> np.ndarray:
    """[B] bool: the answer is now the donor's. Pictures already answered so do not occur among correct ones."""
    return (logits.argmax(-1) == subject.donor_token).cpu().numpy()


def flip_rate(
    adapter: Adapter,
    transcoders: TranscoderSet,
    subject: Subject,
    plan: Plan,
    mode: str,
    means: Mapping[int, Tensor],
    controls: int,
    seed: int = 0,
) -> tuple[Rate, Tensor]:
    """The flip rate of a plan with its bootstrap interval, beside that of matched random features, drawn under `seed`.

    Returns:
        The rate (its `control` is the mean over `controls` draws, None for 0) and the edited logits [B, V].
    """
    logits = run_edited(adapter, transcoders, subject.batch, plan, mode, subject.base)
    drawn = [
        flips(
            run_edited(adapter, transcoders, subject.batch, matched_features(plan, means, draw), mode, subject.base),
            subject,
        ).mean()
        for draw in control_draws(seed, controls)
    ]
    control = float(np.mean(drawn)) if drawn else None
    return bootstrap_rate(flips(logits, subject), control=control), logits


def direction_control(
    adapter: Adapter, transcoders: TranscoderSet, subject: Subject, plan: Plan, draws: int, seed: int = 0
) -> float:
    """Flip rate when a random direction of the same norm is added instead, mean over draws (free mode)."""
    rates = [
        flips(run_random_direction(adapter, transcoders, subject.batch, plan, draw), subject).mean()
        for draw in control_draws(seed, draws)
    ]
    return float(np.mean(rates))


@dataclass(frozen=True)
class Specificity:
    """What a plan does to unrelated prompts: mean KL in nats, share of answers that changed, number of prompts."""

    kl: float
    changed: Rate


def specificity(
    adapter: Adapter,
    transcoders: TranscoderSet,
    batches: Sequence[InputBatch],
    plan_for: Callable[[np.ndarray], Plan],
) -> Specificity:
    """Run unrelated prompts with and without the plan (made for each batch's roles)."""
    kls: list[np.ndarray] = []
    changed: list[np.ndarray] = []
    for batch in batches:
        before = run_edited(adapter, transcoders, batch, {}, "free")
        after = run_edited(adapter, transcoders, batch, plan_for(batch.roles), "free")
        kls.append(kl_divergence(before.double().cpu().numpy(), after.double().cpu().numpy()))
        changed.append((before.argmax(-1) != after.argmax(-1)).cpu().numpy())
    return Specificity(float(np.concatenate(kls).mean()), bootstrap_rate(np.concatenate(changed)))


def correct_rows(subject_logits: Tensor, token: int) -> Tensor:
    """Rows whose unedited answer is `token`."""
    return torch.nonzero(subject_logits.argmax(-1) == token).flatten()
