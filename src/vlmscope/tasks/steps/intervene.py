"""Steer and patch the circuit on test pictures: flip rates with intervals, controls, third concept, specificity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.effects import (
    Subject,
    correct_rows,
    direction_control,
    flip_effect,
    flips,
    in_scope,
    make_subject,
    specificity,
)
from vlmscope.circuits.plans import donor_activations
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve, FlipRow, Rate
from vlmscope.data.orrery.dataset import unrelated_scenes
from vlmscope.interventions.edits import Plan
from vlmscope.interventions.named import patch_plan
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.models.batching import InputBatch
from vlmscope.tasks.steps.circuit_rows import (
    ablation_rows,
    generation_rows,
    rate_metrics,
    row_metrics,
    size_of,
    with_q,
    worst,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from vlmscope.tasks.steps.bench import Bench


@dataclass
class Case:
    """One question: the recipients answered rightly, their donors row by row, and the two plans."""

    subject: Subject
    donors: InputBatch
    images: list[Image.Image]
    steer: Plan
    patch: Plan
    base_accuracy: float
    after: dict[str, Tensor] = field(default_factory=dict)


def run(bench: Bench) -> None:
    """Leaves cases, rows and curves in `bench.records`; metrics under steer/, patch/, third/ and specificity/."""
    circuit: Circuit = bench.record("find_circuit")["circuit"]
    means = control_means(bench)
    cases = {name: make_case(bench, circuit, name) for name in bench.circuit_config.questions}
    rows = flip_rows(bench, circuit, cases, means)
    rows += ablation_rows(bench, circuit, cases, means)
    rows = with_q([*rows, *generation_rows(bench, circuit, cases, means)])
    bench.metrics |= row_metrics(rows)
    for name, case in cases.items():
        bench.metrics[f"base/{name}/accuracy"] = case.base_accuracy
    third_concept(bench, circuit)
    curve = dose_response(bench, circuit, cases)
    measure_specificity(bench, circuit)
    bench.records["intervene"] = {"cases": cases, "rows": rows, "curves": curve}


def control_means(bench: Bench) -> dict[int, Tensor]:
    """Mean activation of every feature over both concepts, by which controls are matched."""
    means = [m for by_question in bench.record("find_circuit")["means"].values() for m in by_question.values()]
    return {layer: torch.stack([m.overall[layer] for m in means]).mean(0) for layer in means[0].overall}


def make_case(bench: Bench, circuit: Circuit, question: str) -> Case:
    """Prepare one question on the test pictures that the model answers rightly.

    Raises:
        UserError: it answers none of them rightly.
    """
    config, asked = bench.circuit_config, bench.circuit_config.questions[question]
    recipient, donor = config.concepts
    count = bench.intervention.pictures
    images = bench.concept_pictures(recipient, "test", count)
    gifts = bench.concept_pictures(donor, "test", max(len(images), 1))
    everything = bench.scope.batch(bench.inputs(images, asked.prompt))
    tokens = bench.token(asked.answers[recipient]), bench.token(asked.answers[donor])
    answers = run_edited(bench.scope, everything, {}, "free")
    rows = correct_rows(answers, tokens[0])
    if len(rows) == 0:
        said = ", ".join(sorted({bench.words(row, 1)[0][0] for row in answers}))
        raise UserError(
            f"none of the {len(images)} pictures of {recipient} is answered {asked.answers[recipient]!r} to "
            f"{asked.prompt!r} (the model says: {said}): nothing to flip; give other pictures"
        )
    subject = make_subject(bench.scope, question, everything.select(rows), *tokens, bench.intervention.modes)
    donors = bench.scope.batch(bench.inputs([gifts[i % len(gifts)] for i in rows.tolist()], asked.prompt))
    carried = donor_activations(bench.scope, donors, circuit)
    roles = subject.batch.roles
    return Case(
        subject,
        donors,
        [images[i] for i in rows.tolist()],
        bench.steer(circuit, roles, question),
        patch_plan(carried, roles, bench.intervention.patch_strength),
        len(rows) / len(images),
    )


def flip_rows(bench: Bench, circuit: Circuit, cases: dict[str, Case], means: dict[int, Tensor]) -> list[FlipRow]:
    """Every method, mode and question everywhere; in free mode the other scopes too."""
    settings, adapter = bench.intervention, bench.vlm.adapter
    rows: list[FlipRow] = []
    plans = [("all", mode) for mode in settings.modes] + [(scope, "free") for scope in settings.scopes]
    for method in ("steer", "patch"):
        for scope, mode in plans:
            found: list[FlipRow] = []
            for name, case in cases.items():
                whole = case.steer if method == "steer" else case.patch
                plan = in_scope(whole, scope, case.subject.batch.roles, adapter.n_layers - 1)
                # The headline gets every draw of the controls, the rest one: they only back it up.
                draws = settings.controls if (scope, mode) == ("all", "free") else 1
                effect = flip_effect(bench.scope, case.subject, plan, mode, means, draws, bench.cfg.seed)
                if (scope, mode) == ("all", "free"):
                    case.after[method] = effect.logits
                found.append(
                    FlipRow(method, mode, name, scope, effect.flip, size_of(plan), effect.changed, effect.p_flip)
                )
            rows += [*found, worst(found)]
    for name, case in cases.items():
        rate = direction_control(bench.scope, case.subject, case.steer, settings.controls, bench.cfg.seed)
        bench.metrics[f"steer/free/{name}/flip_rate_random_direction"] = rate
    return rows


def third_concept(bench: Bench, circuit: Circuit) -> None:
    """What the donor's circuit does to pictures of neither concept: share answered with the donor's word."""
    config = bench.circuit_config
    if config.third is None:
        return
    images = bench.concept_pictures(config.third, "test", bench.intervention.pictures)
    for name, asked in config.questions.items():
        batch = bench.scope.batch(bench.inputs(images, asked.prompt))
        for label, changed in steering_forms(bench).items():
            plan = bench.steer(circuit, batch.roles, name, **changed)
            logits = run_edited(bench.scope, batch, plan, "free")
            hits = (logits.argmax(-1) == bench.token(asked.answers[config.concepts[1]])).numpy(force=True)
            bench.metrics |= rate_metrics(f"third/{label}{config.third}/{name}/donor_rate", bootstrap_rate(hits))


def steering_forms(bench: Bench) -> dict[str, dict[str, None]]:
    """The configured steering and, where that has a gate, the same without one: how much the gate saves."""
    return {"": {}} if bench.intervention.gate is None else {"": {}, "ungated/": {"gate": None}}


def dose_response(bench: Bench, circuit: Circuit, cases: dict[str, Case]) -> list[Curve]:
    """Flip rate against steering strength (free mode), one curve a question."""
    strengths = sorted(bench.intervention.strengths)
    curves: list[Curve] = []
    for name, case in cases.items():
        rates: list[Rate] = []
        for strength in strengths:
            plan = bench.steer(circuit, case.subject.batch.roles, name, strength=strength)
            logits = run_edited(bench.scope, case.subject.batch, plan, "free")
            rates.append(bootstrap_rate(flips(logits, case.subject)))
        curves.append(make_curve(name, strengths, rates))
    return curves


def make_curve(name: str, x: Sequence[float], rates: Sequence[Rate]) -> Curve:
    """Rates as a named curve."""
    return Curve.of(name, x, rates)


def measure_specificity(bench: Bench, circuit: Circuit) -> None:
    """The steering plan on other scenes and on text alone: KL and changed answers."""
    config, count = bench.circuit_config, bench.intervention.unrelated
    if count == 0:
        return
    groups: dict[tuple[int, bytes], list] = {}
    for scene in unrelated_scenes("test", count, config.seed, without=tuple(config.concepts)):
        from PIL import Image

        pictures = [] if scene.image is None else [Image.fromarray(scene.image)]
        inputs = bench.vlm.prepare(scene.questions[0].question, pictures)
        groups.setdefault((len(inputs), inputs.is_image.tobytes()), []).append(inputs)
    batches = [bench.scope.batch(group) for group in groups.values()]
    for label, changed in steering_forms(bench).items():
        found = specificity(bench.scope, batches, lambda roles, changed=changed: bench.steer(circuit, roles, **changed))
        bench.metrics[f"specificity/{label}kl"] = found.kl
        bench.metrics |= rate_metrics(f"specificity/{label}changed_rate", found.changed)
