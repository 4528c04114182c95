"""Are shared features shared causally? Ablation beside pictures and in text, and patches from one kind to the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vlmscope.circuits.shared_effects import KINDS, Asked, Outcome, ablate, ask, patch_across
from vlmscope.core.intervention import Rate
from vlmscope.core.records import FeatureId, generator
from vlmscope.features.cross_modal import Shared
from vlmscope.interventions.named import mean_activations
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.tasks.steps.intervene import rate_metrics

if TYPE_CHECKING:
    from vlmscope.features.cross_modal_config import CrossModalConfig
    from vlmscope.tasks.steps.bench import Bench

Cases = dict[tuple[str, str], Asked]  # concept, kind -> what is asked
PATCHES = ("shared", "no_last_layer", "every_question", "everything", "everything_no_last_layer")


@dataclass(frozen=True)
class Tested:
    """One question on unseen prompts.

    Attributes:
        bench: the model and its settings.
        cases: what is answered rightly, by concept and kind.
        means: mean activation of all features on each of these, layer -> [F], by which controls are matched.
        own: concept -> features that its pictures and word share under this question.
        every: concept -> those shared under every question.
        others: concept -> the other ones that it is tested with.
    """

    bench: Bench
    cases: Cases
    means: Mapping[tuple[str, str], Mapping[int, Tensor]]
    own: Mapping[str, set[FeatureId]]
    every: Mapping[str, set[FeatureId]]
    others: Mapping[str, list[str]]


@dataclass(frozen=True)
class Effects:
    """What ablation (what, kind) and patching (kind, what) did, over all questions; `both` counts pictures and text."""

    ablations: dict[tuple[str, str], Outcome]
    patches: dict[tuple[str, str], Outcome]
    both: Outcome


def measure_effects(
    bench: Bench, config: CrossModalConfig, found: Mapping[str, Shared], every: list[set[FeatureId]]
) -> tuple[Effects, dict[str, float]]:
    """Ablate and patch what is shared; metrics under ablate/, patch/ and base/."""
    concepts = config.concepts
    ablations = {(what, kind): Outcome() for what in ("own", "every_question", "other_concept") for kind in KINDS}
    patches = {(to, what): Outcome() for to in KINDS for what in PATCHES}
    effects = Effects(ablations, patches, Outcome())
    metrics: dict[str, float] = {}
    for question, shared in found.items():
        cases, accuracy = make_cases(bench, config, question)
        metrics |= accuracy
        own = {concept: shared.features(c) for c, concept in enumerate(concepts)}
        means = {key: case_means(bench, asked) for key, asked in cases.items()}
        always = dict(zip(concepts, every, strict=True))
        tested = Tested(bench, cases, means, own, always, drawn_others(bench, config, question))
        ablations_of(tested, effects)
        patches_of(tested, effects.patches)
    return effects, metrics | effect_metrics(effects)


def drawn_others(bench: Bench, config: CrossModalConfig, question: str) -> dict[str, list[str]]:
    """For each concept the other ones that it is tested with: those with another answer go first."""
    found: dict[str, list[str]] = {}
    answers = config.questions[question].answers
    for concept in config.concepts:
        rest = [other for other in config.concepts if other != concept]
        if config.others is not None:
            rest = generator(bench.cfg.seed, "others", question, concept).permutation(rest).tolist()
            rest = sorted(rest, key=lambda other: answers[other] == answers[concept])[: config.others]
        found[concept] = rest
    return found


def make_cases(bench: Bench, config: CrossModalConfig, question: str) -> tuple[Cases, dict[str, float]]:
    """Unseen pictures and the text of each concept, those that are answered rightly, and the accuracies."""
    asked = config.questions[question]
    cases: Cases = {}
    right: dict[str, int] = dict.fromkeys(KINDS, 0)
    total: dict[str, int] = dict.fromkeys(KINDS, 0)
    for concept in config.concepts:
        images = bench.cross_pictures(config, question, concept, "test")
        inputs = {
            "picture": bench.inputs(images, asked.picture),
            "text": [bench.vlm.prepare(asked.asked_in_text(concept))],
        }
        for kind, prompts in inputs.items():
            names = [f"{concept} {kind} {number}" for number in range(len(prompts))]
            answer = bench.token(asked.answers[concept])
            case = ask(bench.scope, bench.scope.batch(prompts), names, answer)
            total[kind] += len(prompts)
            if case is not None:
                cases[concept, kind] = case
                right[kind] += case.batch.size
    return cases, {f"base/{question}/{kind}/accuracy": right[kind] / total[kind] for kind in KINDS}


def case_means(bench: Bench, asked: Asked) -> dict[int, Tensor]:
    """Mean activation of all features on these prompts, by which controls are matched: as active, where it counts."""
    return mean_activations(bench.scope, [asked.batch], bench.transcoders.layers)


def ablations_of(tested: Tested, into: Effects) -> None:
    """Ablate each concept's own shared features, those of every question, and the other concepts', under one question.

    `into.both` gets, for each picture whose concept was asked in text too, whether both answers changed under its own.
    """
    bench, alone = tested.bench, {}
    for (concept, kind), asked in tested.cases.items():
        draws, matched = bench.intervention.controls, tested.means[concept, kind]

        def ablated(features: set[FeatureId], n: int, asked: Asked = asked, matched: Mapping = matched) -> Outcome:
            outcome = Outcome()
            ablate(bench.scope, asked, features, matched, n, outcome, bench.cfg.seed)
            return outcome

        found = ablated(tested.own[concept], draws)
        alone[concept, kind] = found
        into.ablations["own", kind].join(found)
        into.ablations["every_question", kind].join(ablated(tested.every[concept], draws))
        for other in tested.others[concept]:
            # What the two concepts have in common is both's.
            into.ablations["other_concept", kind].join(ablated(tested.own[other] - tested.own[concept], 0))
    for (concept, kind), found in alone.items():
        if kind == "picture" and (concept, "text") in alone:
            text = alone[concept, "text"].hits[0]
            into.both.add(np.array(found.hits) & text, np.array(found.drops), found.groups, found.sizes[0])


def patches_of(tested: Tested, into: Mapping[tuple[str, str], Outcome]) -> None:
    """Patch every concept's prompts with every other's of the other kind, under one question."""
    bench, own, every = tested.bench, tested.own, tested.every
    for (concept, kind), recipient in tested.cases.items():
        outcomes = {what: into[kind, what] for what in PATCHES}
        for (other, other_kind), donor in tested.cases.items():
            if other_kind != kind and other in tested.others[concept] and donor.answer != recipient.answer:
                patch_across(
                    bench.scope, recipient, donor, sorted(own[concept] | own[other]),
                    sorted(every[concept] | every[other]),
                    tested.means[concept, kind], outcomes, bench.cfg.seed,
                )  # fmt: skip


def rates(effects: Effects) -> dict[str, dict[str, dict[str, Rate]]]:
    """Panel -> kind of prompt -> what was done -> rate."""

    def of(outcomes: Mapping[tuple[str, str], Outcome], kind_at: int) -> dict[str, dict[str, Rate]]:
        table: dict[str, dict[str, Rate]] = {kind: {} for kind in KINDS}
        for key, outcome in outcomes.items():
            if outcome.hits:
                table[key[kind_at]][key[1 - kind_at]] = bootstrap_rate(
                    outcome.hits, control=outcome.control, groups=outcome.groups
                )
        return table

    return {"ablation": of(effects.ablations, 1), "patching": of(effects.patches, 0)}


def effect_metrics(effects: Effects) -> dict[str, float]:
    """`ablate/picture/changed_rate`, `ablate/text/every_question/changed_rate`, `patch/text_to_picture/flip_rate` and
    so on, with intervals and controls; `log_prob_drop` is a mean in nats.
    """
    found = rates(effects)
    metrics: dict[str, float] = {}
    for kind in KINDS:
        for what, rate in found["ablation"][kind].items():
            key, outcome = f"ablate/{kind}" if what == "own" else f"ablate/{kind}/{what}", effects.ablations[what, kind]
            metrics |= rate_metrics(f"{key}/changed_rate", rate)
            metrics[f"{key}/log_prob_drop"] = float(np.mean(outcome.drops))
            metrics[f"{key}/features"] = float(np.mean(outcome.sizes))
        donor = KINDS[1 - KINDS.index(kind)]
        for what, rate in found["patching"][kind].items():
            key = f"patch/{donor}_to_{kind}" if what == "shared" else f"patch/{donor}_to_{kind}/{what}"
            metrics |= rate_metrics(f"{key}/flip_rate", rate)
            metrics[f"{key}/features"] = float(np.mean(effects.patches[kind, what].sizes))
    if effects.both.hits:
        both = bootstrap_rate(effects.both.hits, groups=effects.both.groups)
        metrics |= rate_metrics("ablate/both/changed_rate", both)
    return metrics
