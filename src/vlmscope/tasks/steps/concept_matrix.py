"""Turn every concept into every other by their circuits, on pictures that did not choose them, beside controls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.circuit import Circuit, save_circuit
from vlmscope.circuits.concept_matrix import METHODS, Cell, corrected, gifts, mean_rate, measure, patching
from vlmscope.circuits.contrast import contrast_circuit
from vlmscope.circuits.effects import correct_rows
from vlmscope.circuits.plans import steer_plan
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.interventions.edits import Plan
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.models.batching import InputBatch
from vlmscope.tasks.steps.find_circuit import concept_influence, concept_means
from vlmscope.tasks.steps.intervene import rate_metrics

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.circuits.config import QuestionConfig
    from vlmscope.circuits.matrix_config import ConceptMatrixConfig
    from vlmscope.tasks.steps.bench import Bench

Pair = tuple[str, str]  # recipient, donor


@dataclass(frozen=True)
class Circuits:
    """A circuit for each unordered pair, under both orders; means of controls by pair; words by concept."""

    found: dict[Pair, Circuit]
    means: dict[Pair, dict[int, Tensor]]


def run(bench: Bench) -> None:
    """Leaves cells in `bench.records`, writes circuits/ and matrix.json; metrics under matrix/, third/ and base/."""
    config = settings(bench)
    tokens = {  # first of all: a word that is no token stops here
        name: {concept: bench.token(word) for concept, word in question.answers.items() if concept in config.concepts}
        for name, question in config.questions.items()
    }
    circuits = find_circuits(bench, config)
    images = {c: bench.concept_pictures(c, "test", config.test, config.seed) for c in config.concepts}
    cells: list[Cell] = []
    for name, question in config.questions.items():
        cells += question_cells(bench, circuits, images, name, question, tokens[name])
    cells = corrected(cells)
    if not cells:
        raise UserError("no two of concept_matrix.concepts have different answers: there is nothing to flip")
    third = third_concepts(bench, circuits, images, tokens)
    bench.metrics |= cell_metrics(cells, config.alpha)
    if third:
        bench.metrics["third/donor_rate"] = float(np.mean([rate.value for rate in third.values()]))
        bench.metrics["third/highest_donor_rate"] = max(rate.value for rate in third.values())
    write_json(
        bench.run_dir / "matrix.json",
        {
            "cells": [
                vars(cell) | {"rates": {method: vars(rate) for method, rate in cell.rates.items()}} for cell in cells
            ],
            "third": {f"{r}_to_{d}": vars(rate) for (r, d), rate in third.items()},
        },
    )
    bench.records["concept_matrix"] = {"config": config, "cells": cells, "third": third}


def settings(bench: Bench) -> ConceptMatrixConfig:
    """The `concept_matrix` group.

    Raises:
        UserError: the experiment chose none.
    """
    if bench.cfg.concept_matrix is None:
        raise UserError("this experiment needs concepts: choose some, such as concept_matrix=planets")
    return bench.cfg.concept_matrix


def find_circuits(bench: Bench, config: ConceptMatrixConfig) -> Circuits:
    """Means and graphs of each concept, once, and the circuit of each pair from them."""
    train = {c: bench.concept_pictures(c, "train", config.pictures, config.seed) for c in config.concepts}
    prompts = {name: question.prompt for name, question in config.questions.items()}
    means = concept_means(bench, train, prompts)
    influence, _, _ = concept_influence(bench, train, prompts, config.graphs)
    found: dict[Pair, Circuit] = {}
    controls: dict[Pair, dict[int, Tensor]] = {}
    for i, first in enumerate(config.concepts):
        for second in config.concepts[i + 1 :]:
            both = {c: means[c] for c in (first, second)}
            circuit, _ = contrast_circuit(bench.transcoders, both, influence, config.per_layer, bench.vlm.name)
            save_circuit(circuit, bench.run_dir / "circuits" / f"{first}_{second}")
            tables = [asked.overall for by_question in both.values() for asked in by_question.values()]
            overall = {layer: torch.stack([t[layer] for t in tables]).mean(0) for layer in bench.transcoders.layers}
            for pair in ((first, second), (second, first)):
                found[pair], controls[pair] = circuit, overall
    return Circuits(found, controls)


def question_cells(
    bench: Bench,
    circuits: Circuits,
    images: dict[str, list[Image.Image]],
    name: str,
    question: QuestionConfig,
    tokens: dict[str, int],
) -> list[Cell]:
    """All cells of one question; each concept's pictures are encoded once as donors, and asked once as recipients."""
    scope, config = bench.scope, settings(bench)
    batches = {c: scope.batch(bench.inputs(found, question.prompt)) for c, found in images.items()}
    rows = {c: right_rows(bench, c, name, batches[c], tokens[c]) for c in images}
    recipients = {c: batches[c].select(rows[c]) for c in images}
    cells: list[Cell] = []
    for donor in images:
        others = [c for c in images if tokens[c] != tokens[donor]]
        if not others:
            continue
        given = gifts(scope, batches[donor], [circuits.found[other, donor] for other in others])
        for recipient in others:
            circuit, batch = circuits.found[recipient, donor], recipients[recipient]
            plans = {
                "steer": steering(bench, circuit, recipient, donor, batch.roles, name),
                "patch": patching(given, circuit, rows[recipient], batch.roles, bench.intervention.patch_strength),
            }
            rates, p = measure(scope, batch, plans, tokens[donor], circuits.means[recipient, donor], config.seed)
            size = sum(len(edit.features) for edit in plans["steer"].values())
            cells.append(Cell(recipient, donor, name, rates, p, {}, size))
    return cells


def right_rows(bench: Bench, concept: str, name: str, batch: InputBatch, token: int) -> Tensor:
    """The pictures of a concept that the model answers rightly; base/<question>/<concept>/accuracy.

    Raises:
        UserError: too few.
    """
    config = settings(bench)
    rows = correct_rows(run_edited(bench.scope, batch, {}, "free"), token)
    bench.metrics[f"base/{name}/{concept}/accuracy"] = len(rows) / batch.size
    if len(rows) < config.least:
        raise UserError(
            f"only {len(rows)} of {batch.size} pictures of {concept} are answered rightly to {name!r}, too few for an "
            f"interval: leave {concept} out of concept_matrix.concepts, or lower concept_matrix.least={config.least}"
        )
    return rows


def steering(bench: Bench, circuit: Circuit, recipient: str, donor: str, roles: np.ndarray, question: str) -> Plan:
    """The configured steering from recipient to donor."""
    chosen = bench.intervention
    return steer_plan(circuit, recipient, donor, roles, chosen.strength, question, gate=chosen.gate)


def third_concepts(
    bench: Bench, circuits: Circuits, images: dict[str, list[Image.Image]], tokens: dict[str, dict[str, int]]
) -> dict[Pair, Rate]:
    """For each pair, the share of all other concepts' pictures that its steering makes the donor's (first question)."""
    config = settings(bench)
    name, question = next(iter(config.questions.items()))
    found: dict[Pair, Rate] = {}
    for (recipient, donor), circuit in circuits.found.items():
        outside = [i for c, of in images.items() if c not in (recipient, donor) for i in of[: config.third]]
        if not outside:
            continue
        batch = bench.scope.batch(bench.inputs(outside, question.prompt))
        plan = steering(bench, circuit, recipient, donor, batch.roles, name)
        logits = run_edited(bench.scope, batch, plan, "free")
        found[recipient, donor] = bootstrap_rate((logits.argmax(-1) == tokens[name][donor]).cpu().numpy())
    return found


def cell_metrics(cells: list[Cell], alpha: float) -> dict[str, float]:
    """Every cell as `matrix/<method>/<question>/<recipient>_to_<donor>/flip_rate`, and means over cells.

    `matrix/<method>/flip_rate` is over all cells, with an interval over pairs of concepts; `<method>/<question>/`
    alike. `significant_frac` is the share of cells whose q-value is below alpha.
    """
    metrics: dict[str, float] = {}
    for method in cells[0].rates:
        for cell in cells:
            key = f"matrix/{method}/{cell.question}/{cell.recipient}_to_{cell.donor}/flip_rate"
            metrics |= rate_metrics(key, cell.rates[method])
        for question in (None, *dict.fromkeys(cell.question for cell in cells)):
            chosen = [cell for cell in cells if question in (None, cell.question)]
            key = "/".join(["matrix", method, *([] if question is None else [question])])
            metrics |= rate_metrics(f"{key}/flip_rate", mean_rate(chosen, method))
            metrics[f"{key}/lowest_flip_rate"] = min(cell.rates[method].value for cell in chosen)
            if method in METHODS:
                metrics[f"{key}/significant_frac"] = float(np.mean([cell.q[method] < alpha for cell in chosen]))
    metrics["matrix/cells"] = float(len(cells))
    return metrics
