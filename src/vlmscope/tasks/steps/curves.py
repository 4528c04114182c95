"""The long curves: strength, number of features, position roles, layers, and how much each MLP matters where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.effects import Subject, flips, in_scope
from vlmscope.circuits.plans import donor_activations
from vlmscope.core.artifacts import write_json
from vlmscope.core.intervention import Curve, FlipRow
from vlmscope.core.records import ROLES
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.interventions.edits import Plan, without_layers
from vlmscope.interventions.effects import mean_ablated, mlp_outputs
from vlmscope.interventions.named import patch_plan
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.tasks.steps.intervene import Case, make_curve, rate_metrics

if TYPE_CHECKING:
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.tasks.steps.bench import Bench


def run(bench: Bench) -> None:
    """Leaves curves and the ablation matrix in `bench.records`, metrics under curves/ and ablation/."""
    circuit: Circuit = bench.record("find_circuit")["circuit"]
    cases: dict[str, Case] = bench.record("intervene")["cases"]
    curves = {
        "strength": strength_curves(bench, circuit, cases),
        "features": feature_curves(bench, circuit, cases),
        "layers": layer_curves(bench, cases),
    }
    bench.metrics |= smallest(curves["features"])
    rows = role_rows(bench, cases)
    bench.metrics |= {
        key: value
        for row in rows
        for key, value in rate_metrics(f"{row.method}/free/{row.scope}/{row.question}/flip_rate", row.rate).items()
    }
    matrix = ablation_matrix(bench, cases)
    for i, layer in enumerate(matrix):
        for j, role in enumerate(ROLES):
            bench.metrics[f"ablation/layer_{i:02d}/{role}/accuracy_drop"] = float(layer[j])
    write_json(
        bench.run_dir / "curves.json",
        {kind: [vars(curve) for curve in found] for kind, found in curves.items()}
        | {"ablation": {"roles": ROLES, "accuracy_drop": matrix.tolist()}},
    )
    bench.records["curves"] = {"curves": curves, "rows": rows, "ablation": matrix}


def _rate(bench: Bench, subject: Subject, plan: Plan):
    logits = run_edited(bench.scope, subject.batch, plan, "free")
    return bootstrap_rate(flips(logits, subject))


def strength_curves(bench: Bench, circuit: Circuit, cases: dict[str, Case]) -> list[Curve]:
    """Patching strength; steering strength is in the main experiment already."""
    strengths = [0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0]
    curves = []
    for name, case in cases.items():
        carried = donor_activations(bench.scope, case.donors, circuit)
        rates = [_rate(bench, case.subject, patch_plan(carried, case.subject.batch.roles, s)) for s in strengths]
        curves.append(make_curve(f"patch {name}", strengths, rates))
        pooled = [
            _rate(bench, case.subject, patch_plan(carried, case.subject.batch.roles, s, pooled=True)) for s in strengths
        ]
        curves.append(make_curve(f"patch pooled {name}", strengths, pooled))
    return curves


def feature_curves(bench: Bench, circuit: Circuit, cases: dict[str, Case]) -> list[Curve]:
    """Flip rate by steering against the number of features: the best 1, 2, 4 ... of each layer and concept."""
    full = bench.circuit_config.per_layer
    limits = sorted({n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if n < full} | {full})
    curves = []
    for name, case in cases.items():
        counts, rates = [], []
        for limit in limits:
            plan = bench.steer(circuit, case.subject.batch.roles, name, limit=limit)
            counts.append(float(sum(len(edit.features) for edit in plan.values())))
            rates.append(_rate(bench, case.subject, plan))
        curves.append(make_curve(name, counts, rates))
    return curves


def smallest(curves: list[Curve], enough: float = 0.95) -> dict[str, float]:
    """`circuit/smallest/<question>/features`: the fewest features that flip `enough` of the pictures, if any do."""
    found = {curve.name: [x for x, y in zip(curve.x, curve.y, strict=True) if y >= enough] for curve in curves}
    return {f"circuit/smallest/{name}/features": min(counts) for name, counts in found.items() if counts}


def layer_curves(bench: Bench, cases: dict[str, Case]) -> list[Curve]:
    """Flip rate when only layers from 0 up to x are steered, and when only layers from x up are."""
    n = bench.vlm.adapter.n_layers
    curves = []
    for name, case in cases.items():
        below = [_rate(bench, case.subject, without_layers(case.steer, range(i + 1, n))) for i in range(n)]
        above = [_rate(bench, case.subject, without_layers(case.steer, range(i))) for i in range(n)]
        curves.append(make_curve(f"{name}: layers 0 to x", list(map(float, range(n))), below))
        curves.append(make_curve(f"{name}: layers x to {n - 1}", list(map(float, range(n))), above))
    return curves


def role_rows(bench: Bench, cases: dict[str, Case]) -> list[FlipRow]:
    """Steering and patching at the positions of one role only."""
    rows = []
    for method in ("steer", "patch"):
        for role in ROLES:
            for name, case in cases.items():
                whole = case.steer if method == "steer" else case.patch
                plan = in_scope(whole, f"role_{role}", case.subject.batch.roles, bench.vlm.adapter.n_layers - 1)
                size = sum(len(edit.features) for edit in plan.values())
                rows.append(FlipRow(method, "free", name, f"role_{role}", _rate(bench, case.subject, plan), size))
    return rows


def ablation_matrix(bench: Bench, cases: dict[str, Case]) -> np.ndarray:
    """[layers, roles]: by how much accuracy falls, mean over questions, when a layer's MLP output is replaced at the
    positions of a role by its mean over pictures of all planets.
    """
    adapter = bench.vlm.adapter
    means = role_output_means(bench)
    drops = np.zeros((adapter.n_layers, len(ROLES)))
    for case in cases.values():
        batch = case.subject.batch
        for layer in range(adapter.n_layers):
            for column, role in enumerate(ROLES):
                where: Tensor = torch.from_numpy(batch.roles == role)
                logits = mean_ablated(adapter, batch, layer, where, means[layer, role])
                right = (logits.argmax(-1) == case.subject.recipient_token).double().mean()
                drops[layer, column] += (1.0 - float(right)) / len(cases)
    return drops


def role_output_means(bench: Bench) -> dict[tuple[int, str], Tensor]:
    """Mean MLP output [d] by (layer, role) over pictures of all planets, so that the mean says nothing of one."""
    sums: dict[tuple[int, str], Tensor] = {}
    counts: dict[tuple[int, str], int] = {}
    images = [i for planet in PLANETS for i in bench.concept_pictures(planet, "train", 10)]
    for question in bench.circuit_config.questions.values():
        batch = bench.scope.batch(bench.inputs(images, question.prompt))
        for layer, out in mlp_outputs(bench.vlm.adapter, batch).items():
            for role in ROLES:
                part = out[:, torch.from_numpy(batch.roles == role)].flatten(0, 1)
                sums[layer, role] = sums.get((layer, role), torch.zeros_like(part[0])) + part.sum(0)
                counts[layer, role] = counts.get((layer, role), 0) + len(part)
    return {key: total / counts[key] for key, total in sums.items()}
