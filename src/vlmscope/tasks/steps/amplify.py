"""Can a difference that the model sees but does not act on be amplified until it says so?

Features are chosen by estimated effect on d = l[y'] - l[y] over training pairs, whatever the model answers there, and
their mean change from original to counterfactual is added `s` times, position by position, to test pictures of both
sides. That the counterfactuals should then be answered y', and the originals still y, is the test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmscope.circuits.pair_effects import pair_effects
from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve, Rate
from vlmscope.core.records import control_draws
from vlmscope.interventions.edits import LayerEdit, Plan
from vlmscope.interventions.named import (
    by_layer,
    donor_activations,
    matched_features,
    mean_activations,
    run_random_direction,
)
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.models.batching import InputBatch
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics
from vlmscope.tasks.steps.pair_subjects import moving, pairs_of, subject_of

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def run(bench: Bench) -> None:
    """Leaves curves a question in `bench.records`; metrics under amplify/."""
    found: dict[str, list[Curve]] = {}
    train = moving(pairs_of(bench, "train"))
    for name, pairs in pairs_of(bench, "test").items():
        subject = subject_of(bench, name, pairs, answerable=False)
        if subject.moves and name in train:
            seen = subject_of(bench, name, train[name], answerable=False)
            found[name] = question_curves(bench, name, subject, seen)
    if not found:
        raise UserError(
            "nothing to amplify: no question's answer differs within test and training pairs, or pairs.train is 0"
        )
    bench.records["amplify"] = {"curves": found}


def question_curves(bench: Bench, name: str, subject: PairSubject, train: PairSubject) -> list[Curve]:
    """Share of either side that is answered with the counterfactual's word, by strength.

    The controls (as many matched features, a random direction of the same norm) act on the counterfactuals.
    """
    scope = bench.scope
    ranked = pair_effects(scope, train, bench.cfg.interchange.steps).ranked(bench.cfg.interchange.features)
    change = mean_change(bench, train, by_layer(scope.transcoders, [member.feature for member in ranked]))
    means = mean_activations(scope, [train.batch, train.other], scope.transcoders.layers)
    describe(bench, name, subject)
    strengths = sorted(bench.cfg.interchange.strengths)
    (draw,) = control_draws(bench.cfg.seed, 1)
    rates: dict[str, list[Rate]] = {}
    for strength in strengths:
        plan = amplified(change, strength)
        control = matched_features(plan, means, draw)
        runs = {
            "counterfactual": said(bench, subject.other, plan, subject.other_tokens),
            "original": said(bench, subject.batch, plan, subject.other_tokens),
            "matched features": said(bench, subject.other, control, subject.other_tokens),
        }
        logits = run_random_direction(scope, subject.other, plan, draw)
        runs["random direction"] = hits(logits, subject.other_tokens)
        for side, rate in runs.items():
            rates.setdefault(side, []).append(rate)
        at = f"strength_{strength:g}/follow_rate"
        edited = replace(runs["counterfactual"], control=runs["matched features"].value)
        bench.metrics |= rate_metrics(f"amplify/{name}/counterfactual/{at}", edited)
        bench.metrics[f"amplify/{name}/counterfactual/{at}_random_direction"] = runs["random direction"].value
        bench.metrics |= rate_metrics(f"amplify/{name}/original/{at}", runs["original"])
    return [make_curve(side, strengths, values) for side, values in rates.items()]


def describe(bench: Bench, name: str, subject: PairSubject) -> None:
    """Metrics of the unedited runs: how far the two words are apart, and their probabilities, on both sides."""
    rows = torch.arange(subject.size, device=subject.tokens.device)
    for side, logits in (("original", subject.base.logits), ("counterfactual", subject.other_logits)):
        logs = logits.double().log_softmax(-1)
        gap = (logs[rows, subject.other_tokens] - logs[rows, subject.tokens]).mean()
        bench.metrics[f"amplify/{name}/{side}/logit_gap"] = float(gap)
        bench.metrics[f"amplify/{name}/{side}/p_counterfactual"] = float(logs[rows, subject.other_tokens].exp().mean())
    for side, rate in zip(("original", "counterfactual"), subject.accuracy, strict=False):
        bench.metrics |= rate_metrics(f"base/{name}/{side}/accuracy", rate)


def mean_change(bench: Bench, train: PairSubject, features: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> (features [n], mean change of activation from original to counterfactual [T, n])."""
    scope = bench.scope
    before = donor_activations(scope, train.batch, features)
    after = donor_activations(scope, train.other, features)
    return {layer: (found, (after[layer][1] - values).mean(0)) for layer, (found, values) in before.items()}


def amplified(change: Mapping[int, tuple[Tensor, Tensor]], strength: float) -> dict[int, LayerEdit]:
    """Add `strength` times the change to whatever the activations are."""
    return {
        layer: LayerEdit(
            features, strength * delta, delta.new_ones(len(features)), torch.ones(len(delta), dtype=torch.bool)
        )
        for layer, (features, delta) in change.items()
    }


def said(bench: Bench, batch: InputBatch, plan: Plan, tokens: Tensor) -> Rate:
    """Share answered with `tokens` [B] under a plan, in free mode."""
    return hits(run_edited(bench.scope, batch, plan), tokens)


def hits(logits: Tensor, tokens: Tensor) -> Rate:
    """Share of rows of logits [B, V] whose most probable token is `tokens` [B]."""
    return bootstrap_rate((logits.argmax(-1) == tokens).cpu().numpy())
