"""Are shared features shared causally? Ablation beside pictures and in text, and patches from one kind to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from vlmscope.circuits.shared_effects import KINDS, Asked, Outcome, ablate, ask, patch_across
from vlmscope.core.ids import FeatureId
from vlmscope.core.intervention import Rate
from vlmscope.features.cross_modal import Shared
from vlmscope.features.cross_modal_config import PLACEHOLDER
from vlmscope.interventions.named import mean_activations
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.models.batching import make_batch
from vlmscope.report.cross_modal_figures import effect_bars
from vlmscope.tasks.steps.intervene import rate_metrics

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

Cases = dict[tuple[str, str], Asked]  # concept, kind -> what is asked
PATCHES = ("shared", "no_last_layer", "every_question", "everything", "everything_no_last_layer")


def measure_effects(bench: Bench, found: Mapping[str, Shared], every: list[set[FeatureId]]) -> None:
    """Metrics under ablate/ and patch/, and figures/effects.png."""
    concepts = bench.cross_modal.concepts
    ablations = {(what, kind): Outcome() for what in ("own", "every_question", "other_concept") for kind in KINDS}
    patches = {(to, what): Outcome() for to in KINDS for what in PATCHES}
    both = Outcome()
    for question, shared in found.items():
        own = {concept: shared.features(c) for c, concept in enumerate(concepts)}
        cases, accuracy = make_cases(bench, question)
        bench.metrics |= accuracy
        always = dict(zip(concepts, every, strict=True))
        means = {key: case_means(bench, asked) for key, asked in cases.items()}
        ablations_of(bench, cases, means, own, always, ablations, both)
        patches_of(bench, cases, means, own, always, patches)
    bench.metrics |= effect_metrics(ablations, patches, both)
    effect_bars(rates(ablations, patches), bench.run_dir / "figures" / "effects.png")


def make_cases(bench: Bench, question: str) -> tuple[Cases, dict[str, float]]:
    """Unseen pictures and the text of each concept, those that are answered rightly, and the accuracies."""
    config, adapter = bench.cross_modal, bench.vlm.adapter
    asked = config.questions[question]
    cases: Cases = {}
    right: dict[str, int] = dict.fromkeys(KINDS, 0)
    total: dict[str, int] = dict.fromkeys(KINDS, 0)
    for concept in config.concepts:
        images = bench.concept_pictures(concept, "test", config.test_pictures, config.seed)
        inputs = {
            "picture": bench.inputs(images, asked.picture),
            "text": [bench.vlm.prepare(asked.text.replace(PLACEHOLDER, concept))],
        }
        for kind, prompts in inputs.items():
            names = [f"{concept} {kind} {number}" for number in range(len(prompts))]
            answer = bench.token(asked.answers[concept])
            case = ask(adapter, bench.transcoders, make_batch(adapter, prompts), names, answer)
            total[kind] += len(prompts)
            if case is not None:
                cases[concept, kind] = case
                right[kind] += case.batch.size
    return cases, {f"base/{question}/{kind}/accuracy": right[kind] / total[kind] for kind in KINDS}


def case_means(bench: Bench, asked: Asked) -> dict[int, Tensor]:
    """Mean activation of all features on these prompts, by which controls are matched: as active, where it counts."""
    return mean_activations(bench.vlm.adapter, bench.transcoders, [asked.batch], bench.transcoders.layers)


def ablations_of(
    bench: Bench,
    cases: Cases,
    means: Mapping[tuple[str, str], Mapping[int, Tensor]],
    own: Mapping[str, set[FeatureId]],
    every: Mapping[str, set[FeatureId]],
    into: Mapping[tuple[str, str], Outcome],
    both: Outcome,
) -> None:
    """Ablate each concept's own shared features, those of every question, and the other concepts', under one question.

    `both` gets, for each picture whose concept was asked in text too, whether both answers changed under its own.
    """
    alone: dict[tuple[str, str], Outcome] = {}
    for (concept, kind), asked in cases.items():
        draws, matched = bench.intervention.controls, means[concept, kind]

        def ablated(features: set[FeatureId], n: int, asked: Asked = asked, matched: Mapping = matched) -> Outcome:
            outcome = Outcome()
            ablate(bench.vlm.adapter, bench.transcoders, asked, features, matched, n, outcome, bench.cfg.seed)
            return outcome

        found = ablated(own[concept], draws)
        alone[concept, kind] = found
        into["own", kind].join(found)
        into["every_question", kind].join(ablated(every[concept], draws))
        for other, features in own.items():
            if other != concept:
                # What the two concepts have in common is both's.
                into["other_concept", kind].join(ablated(features - own[concept], 0))
    for (concept, kind), found in alone.items():
        if kind == "picture" and (concept, "text") in alone:
            text = alone[concept, "text"].hits[0]
            both.add(np.array(found.hits) & text, np.array(found.drops), found.groups, found.sizes[0])


def patches_of(
    bench: Bench,
    cases: Cases,
    means: Mapping[tuple[str, str], Mapping[int, Tensor]],
    own: Mapping[str, set[FeatureId]],
    every: Mapping[str, set[FeatureId]],
    into: Mapping[tuple[str, str], Outcome],
) -> None:
    """Patch every concept's prompts with every other's of the other kind, under one question."""
    for (concept, kind), recipient in cases.items():
        outcomes = {what: into[kind, what] for what in PATCHES}
        for (other, other_kind), donor in cases.items():
            if other_kind != kind and donor.answer != recipient.answer:
                patch_across(
                    bench.vlm.adapter, bench.transcoders, recipient, donor, sorted(own[concept] | own[other]),
                    sorted(every[concept] | every[other]),
                    means[concept, kind], outcomes, bench.cfg.seed,
                )  # fmt: skip


def rates(
    ablations: Mapping[tuple[str, str], Outcome], patches: Mapping[tuple[str, str], Outcome]
) -> dict[str, dict[str, dict[str, Rate]]]:
    """Panel -> kind of prompt -> what was done -> rate."""

    def of(outcomes: Mapping[tuple[str, str], Outcome], kind_at: int) -> dict[str, dict[str, Rate]]:
        table: dict[str, dict[str, Rate]] = {kind: {} for kind in KINDS}
        for key, outcome in outcomes.items():
            if outcome.hits:
                table[key[kind_at]][key[1 - kind_at]] = bootstrap_rate(
                    outcome.hits, control=outcome.control, groups=outcome.groups
                )
        return table

    return {"ablation": of(ablations, 1), "patching": of(patches, 0)}


def effect_metrics(
    ablations: Mapping[tuple[str, str], Outcome], patches: Mapping[tuple[str, str], Outcome], both: Outcome
) -> dict[str, float]:
    """`ablate/picture/changed_rate`, `ablate/text/every_question/changed_rate`, `patch/text_to_picture/flip_rate` and
    so on, with intervals and controls; `log_prob_drop` is a mean in nats.
    """
    found = rates(ablations, patches)
    metrics: dict[str, float] = {}
    for kind in KINDS:
        for what, rate in found["ablation"][kind].items():
            key = f"ablate/{kind}" if what == "own" else f"ablate/{kind}/{what}"
            metrics |= rate_metrics(f"{key}/changed_rate", rate)
            metrics[f"{key}/log_prob_drop"] = float(np.mean(ablations[what, kind].drops))
            metrics[f"{key}/features"] = float(np.mean(ablations[what, kind].sizes))
        donor = KINDS[1 - KINDS.index(kind)]
        for what, rate in found["patching"][kind].items():
            key = f"patch/{donor}_to_{kind}" if what == "shared" else f"patch/{donor}_to_{kind}/{what}"
            metrics |= rate_metrics(f"{key}/flip_rate", rate)
            metrics[f"{key}/features"] = float(np.mean(patches[kind, what].sizes))
    if both.hits:
        metrics |= rate_metrics("ablate/both/changed_rate", bootstrap_rate(both.hits, groups=both.groups))
    return metrics
