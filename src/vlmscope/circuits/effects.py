"""Measuring what a plan does to answers: flips with intervals and controls, third parties, specificity."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.intervention import MODES, Rate
from vlmscope.core.records import control_draws
from vlmscope.interventions.edits import Edit, Plan, at_positions, position_mask, without_layers
from vlmscope.interventions.named import matched_features, run_random_direction
from vlmscope.interventions.run import BaseRun, base_run, run_edited
from vlmscope.metrics.causal import bootstrap_rate, kl_divergence, paired_p
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope


@dataclass(frozen=True)
class Subject:
    """One question on recipient pictures: the batch, its unedited run, and which answer counts as a flip."""

    question: str
    batch: InputBatch
    base: BaseRun
    recipient_token: int
    donor_token: int


def make_subject(
    scope: Scope,
    question: str,
    batch: InputBatch,
    recipient: int,
    donor: int,
    modes: Collection[str] = MODES,
) -> Subject:
    """Run the batch once and keep what editing it in these modes needs."""
    return Subject(question, batch, base_run(scope, batch, modes), recipient, donor)


def in_scope(plan: Mapping[int, Edit], scope: str, roles: np.ndarray, last_layer: int) -> Mapping[int, Edit]:
    """The plan restricted to a scope: 'all', 'no_last_layer', 'no_last_position', 'role_<role>'."""
    if scope == "no_last_layer":
        return without_layers(plan, [last_layer])
    return plan if scope == "all" else at_positions(plan, position_mask(roles, scope))


def flips(logits: Tensor, subject: Subject) -> np.ndarray:
    """[B] bool: the answer is now the donor's. Pictures already answered so do not occur among correct ones."""
    return (logits.argmax(-1) == subject.donor_token).cpu().numpy()


@dataclass(frozen=True)
class FlipEffect:
    """What a plan did to a question's answers, beside matched features.

    Attributes:
        flip: the answer is the donor's.
        changed: the answer is no longer the recipient's.
        p_flip, p_changed: one-sided exact p-values against the first draw of the control, None without one.
        logits: [B, V], edited.
    """

    flip: Rate
    changed: Rate
    p_flip: float | None
    p_changed: float | None
    logits: Tensor


def flip_effect(
    scope: Scope,
    subject: Subject,
    plan: Plan,
    mode: str,
    means: Mapping[int, Tensor],
    controls: int,
    seed: int = 0,
) -> FlipEffect:
    """How often a plan flips and changes answers, with bootstrap intervals, beside that of matched random features.

    A rate's `control` is the mean over `controls` draws under `seed`, None for 0.
    """

    def under(edits: Plan) -> Tensor:
        return run_edited(scope, subject.batch, edits, mode, subject.base)

    logits = under(plan)
    drawn = [under(matched_features(plan, means, draw)) for draw in control_draws(seed, controls)]
    flip = compared(flips(logits, subject), [flips(other, subject) for other in drawn])
    moved = compared(changes(logits, subject), [changes(other, subject) for other in drawn])
    return FlipEffect(flip[0], moved[0], flip[1], moved[1], logits)


def compared(hits: np.ndarray, controls: Sequence[np.ndarray]) -> tuple[Rate, float | None]:
    """The rate of hits [B] beside the mean of its controls', and the p-value against the first of them."""
    control = float(np.mean([other.mean() for other in controls])) if controls else None
    return bootstrap_rate(hits, control=control), paired_p(hits, controls[0]) if controls else None


def changes(logits: Tensor, subject: Subject) -> np.ndarray:
    """[B] bool: the answer is no longer the recipient's."""
    return (logits.argmax(-1) != subject.recipient_token).cpu().numpy()


def direction_control(scope: Scope, subject: Subject, plan: Plan, draws: int, seed: int = 0) -> float:
    """Flip rate when a random direction of the same norm is added instead, mean over draws (free mode)."""
    rates = [
        flips(run_random_direction(scope, subject.batch, plan, draw), subject).mean()
        for draw in control_draws(seed, draws)
    ]
    return float(np.mean(rates))


@dataclass(frozen=True)
class Specificity:
    """What a plan does to unrelated prompts: mean KL in nats, share of answers that changed, number of prompts."""

    kl: float
    changed: Rate


def specificity(scope: Scope, batches: Sequence[InputBatch], plan_for: Callable[[np.ndarray], Plan]) -> Specificity:
    """Run unrelated prompts with and without the plan (made for each batch's roles)."""
    kls: list[np.ndarray] = []
    changed: list[np.ndarray] = []
    for batch in batches:
        before = run_edited(scope, batch, {}, "free")
        after = run_edited(scope, batch, plan_for(batch.roles), "free")
        kls.append(kl_divergence(before.double().cpu().numpy(), after.double().cpu().numpy()))
        changed.append((before.argmax(-1) != after.argmax(-1)).cpu().numpy())
    return Specificity(float(np.concatenate(kls).mean()), bootstrap_rate(np.concatenate(changed)))


def correct_rows(subject_logits: Tensor, token: int) -> Tensor:
    """Rows whose unedited answer is `token`."""
    return torch.nonzero(subject_logits.argmax(-1) == token).flatten()
