"""Carry features from the counterfactual into the original: which answers follow, which stay, beside controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.circuit import Circuit, load_circuit, save_circuit, with_labels
from vlmscope.circuits.effects import in_scope
from vlmscope.circuits.interchange import (
    Outcome,
    all_features,
    carried_controls,
    direction_controls,
    interchange_plan,
    layer_role_grid,
    run_interchange,
    whole_plan,
)
from vlmscope.circuits.pair_effects import pair_effects
from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitFeature, Curve, FlipRow, Rate, Supernode
from vlmscope.interventions.edits import AnyPlan, LayerEdit
from vlmscope.interventions.named import by_layer, mean_activations
from vlmscope.interventions.run import generate_edited
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics
from vlmscope.tasks.steps.pair_subjects import moving, pairs_of, subject_of

if TYPE_CHECKING:
    from vlmscope.data.pairs import Pair
    from vlmscope.tasks.steps.bench import Bench

ALL = "all features"
CIRCUIT = "the circuit"  # all supernodes of one that was given
LOADED = "interchange.circuit"  # the record of a circuit that was given
Features = Mapping[int, Tensor]


@dataclass(frozen=True)
class PairCase:
    """One question on test pairs: the pairs that the model answers rightly on both sides, and their batches."""

    pairs: list[Pair]
    subject: PairSubject


@dataclass(frozen=True)
class InterchangeRow:
    """One interchange: which set of features, its outcome, and the mean outcome of the controls (None without).

    `direction` is the follow rate under random directions of the same norm; `own`: the features should move it.
    """

    row: FlipRow
    outcome: Outcome
    recovered_control: float | None = None
    direction: float | None = None
    own: bool = False


def run(bench: Bench) -> None:
    """Leaves cases, chosen features, rows, curves and grids in `bench.records`; metrics: interchange/, grid/, base/."""
    cases = test_cases(bench)
    chosen = chosen_features(bench, cases)
    means = mean_activations(
        bench.scope,
        [side for case in cases.values() for side in (case.subject.batch, case.subject.other)],
        bench.transcoders.layers,
    )
    sets = {ALL: all_features(bench.transcoders)}
    sets |= {
        f"features of {name}": layers_of(bench, found, bench.cfg.interchange.features) for name, found in chosen.items()
    }
    if len(bench.records[LOADED].supernodes if LOADED in bench.records else ()) > 1:
        sets[CIRCUIT] = by_layer(bench.transcoders, [m.feature for found in chosen.values() for m in found])
    rows = interchange_rows(bench, cases, sets, means)
    curves = count_curves(bench, cases, chosen, means)
    grids = {
        name: layer_role_grid(bench.scope, case.subject, sets[ALL], roles_of(case.subject))
        for name, case in cases.items()
        if case.subject.moves
    }
    bench.metrics |= interchange_metrics(rows)
    bench.metrics |= grid_metrics(bench, cases, grids)
    bench.metrics |= generated(bench, cases, sets)
    write_json(
        bench.run_dir / "interchange.json",
        {
            "grids": {
                n: {"roles": roles_of(cases[n].subject), "recovered": g[..., 0].tolist()} for n, g in grids.items()
            },
            "curves": [vars(curve) for found in curves.values() for curve in found],
        },
    )
    bench.records["interchange"] = {
        "cases": cases, "chosen": chosen, "sets": sets, "means": means, "rows": rows, "curves": curves, "grids": grids
    }  # fmt: skip


def test_cases(bench: Bench) -> dict[str, PairCase]:
    """Every question on the test pairs; base/ metrics."""
    cases: dict[str, PairCase] = {}
    for name, pairs in pairs_of(bench, "test").items():
        subject = subject_of(bench, name, pairs, modes=bench.intervention.modes)
        cases[name] = PairCase([pairs[i] for i in subject.rows.tolist()], subject)
        for side, rate in zip(("original", "counterfactual", "both"), subject.accuracy, strict=True):
            bench.metrics |= rate_metrics(f"base/{name}/{side}/accuracy", rate)
        bench.metrics[f"base/{name}/pairs"] = float(subject.size)
    if not any(case.subject.moves for case in cases.values()):
        raise UserError("no question's answer differs within a pair: there is nothing that could follow")
    return cases


def chosen_features(bench: Bench, cases: Mapping[str, PairCase]) -> dict[str, list[CircuitFeature]]:
    """For each question that moves, features by estimated effect on training pairs, best first; or a saved circuit's.

    Raises:
        UserError: no training pairs, or the circuit names features that the transcoders do not have.
    """
    settings = bench.cfg.interchange
    if settings.circuit is not None:
        circuit = load_circuit(Path(settings.circuit))
        circuit.check_fits(bench.vlm.name, bench.transcoders.widths, settings.circuit)
        bench.records[LOADED] = circuit
        return {name: list(node.features) for name, node in circuit.supernodes.items()}
    train = moving(pairs_of(bench, "train"))
    chosen: dict[str, list[CircuitFeature]] = {}
    for name, case in cases.items():
        if case.subject.moves and name in train:
            effects = pair_effects(bench.scope, subject_of(bench, name, train[name]), settings.steps)
            chosen[name] = effects.ranked(max([settings.features, *settings.counts]))
    nodes = {
        name: with_labels(Supernode(name, tuple(found[: settings.features])), bench.labels)
        for name, found in chosen.items()
    }
    if nodes:
        name = (bench.cfg.pairs and bench.cfg.pairs.change) or "pairs"
        circuit = Circuit(nodes, {}, model=bench.vlm.name, n_features=bench.transcoders.widths)
        save_circuit(circuit, bench.run_dir / "circuits" / name)
    return chosen


def nodes_of(bench: Bench, label: str) -> list[Supernode]:
    """The supernodes of a set, which say at which positions it is carried; none unless a circuit was given."""
    circuit: Circuit | None = bench.records.get(LOADED)
    nodes = [] if circuit is None else list(circuit.supernodes.values())
    return [node for node in nodes if label in (CIRCUIT, f"features of {node.name}")]


def layers_of(bench: Bench, features: list[CircuitFeature], count: int) -> dict[int, Tensor]:
    """The first `count` by layer."""
    return by_layer(bench.transcoders, [member.feature for member in features[:count]])


def interchange_rows(
    bench: Bench, cases: Mapping[str, PairCase], sets: Mapping[str, Features], means: Mapping[int, Tensor]
) -> list[InterchangeRow]:
    """Every set on every question in free mode; where the answer should move, in all modes and scopes too."""
    settings = bench.intervention
    rows = []
    for label, features in sets.items():
        for name, case in cases.items():
            nodes = nodes_of(bench, label)
            own = case.subject.moves and (label in (ALL, f"features of {name}") or bool(nodes))
            whole = plan_of(bench, case.subject, label, features)
            plans = [("all", mode) for mode in settings.modes] + [(scope, "free") for scope in settings.scopes]
            for scope, mode in plans if own else [("all", "free")]:
                found = one_row(bench, case.subject, label, whole, scope, mode, means)
                rows.append(replace(found, own=own))
    return rows


def plan_of(bench: Bench, subject: PairSubject, label: str, features: Features) -> AnyPlan:
    """The interchange of a set's features, at the positions of its supernodes if it has any."""
    scope = bench.scope
    if label == ALL:
        return whole_plan(scope, subject.other)
    return interchange_plan(scope, subject, features, nodes=nodes_of(bench, label))


def one_row(
    bench: Bench,
    subject: PairSubject,
    label: str,
    whole: AnyPlan,
    scope: str,
    mode: str,
    means: Mapping[int, Tensor],
) -> InterchangeRow:
    """Run an interchange in one scope with its controls; where every feature is carried there are none to draw."""
    seed = bench.cfg.seed
    plan = in_scope(whole, scope, subject.batch.roles, bench.vlm.adapter.n_layers - 1)
    found = run_interchange(bench.scope, subject, plan, mode)
    headline = (scope, mode) == ("all", "free")
    draws = bench.intervention.controls if headline else 1
    edits = {layer: edit for layer, edit in plan.items() if isinstance(edit, LayerEdit)}
    controls = [] if label == ALL else carried_controls(bench.scope, subject, edits, mode, means, draws, seed)
    rate = found.follows if subject.moves else found.changed
    control = None
    if controls:
        control = float(np.mean([(c.follows if subject.moves else c.changed).value for c in controls]))
    gained = [c.recovered.value for c in controls if c.recovered is not None]
    directions = direction_controls(bench.scope, subject, plan, draws, seed) if headline and subject.moves else []
    size = sum(len(edit.features) for edit in plan.values())
    return InterchangeRow(
        FlipRow(label, mode, subject.question, scope, replace(rate, control=control), size),
        found,
        float(np.mean(gained)) if gained else None,
        float(np.mean([d.follows.value for d in directions])) if directions else None,
    )


def interchange_metrics(rows: list[InterchangeRow]) -> dict[str, float]:
    """`interchange/<set>/<mode>/<question>/follow_rate` and `recovered`; `changed_rate` where nothing should move."""
    metrics: dict[str, float] = {}
    for found in rows:
        row, gained = found.row, found.outcome.recovered
        scope = [] if row.scope == "all" else [row.scope]
        key = "/".join(["interchange", row.method.replace(" ", "_"), row.mode, *scope, row.question])
        if gained is None:
            metrics |= rate_metrics(f"{key}/changed_rate", row.rate)
            continue
        metrics |= rate_metrics(f"{key}/follow_rate", row.rate)
        metrics |= {f"{key}/recovered": gained.value, f"{key}/recovered_ci_low": gained.ci_low}
        metrics[f"{key}/recovered_ci_high"] = gained.ci_high
        if found.recovered_control is not None:
            metrics[f"{key}/recovered_control"] = found.recovered_control
        if found.direction is not None:
            metrics[f"{key}/follow_rate_random_direction"] = found.direction
    return metrics


def count_curves(
    bench: Bench, cases: Mapping[str, PairCase], chosen: Mapping[str, list[CircuitFeature]], means: Mapping[int, Tensor]
) -> dict[str, list[Curve]]:
    """Follow rate and recovered share against the number of features, each beside one draw of matched features."""
    scope = bench.scope
    follow: list[Curve] = []
    gained: list[Curve] = []
    for name, features in chosen.items():
        if name not in cases or not cases[name].subject.moves:
            continue
        subject = cases[name].subject
        counts = sorted({min(count, len(features)) for count in bench.cfg.interchange.counts})
        pairs = []
        for count in counts:
            chosen_now, nodes = layers_of(bench, features, count), nodes_of(bench, f"features of {name}")
            plan = interchange_plan(scope, subject, chosen_now, nodes=nodes)
            (control,) = carried_controls(scope, subject, plan, "free", means, 1, bench.cfg.seed)
            pairs.append((run_interchange(scope, subject, plan), control))
        x = [float(count) for count in counts]
        for label, side in ((name, 0), (f"{name}, matched", 1)):
            follow.append(make_curve(label, x, [pair[side].follows for pair in pairs]))
            means_of = [pair[side].recovered for pair in pairs]
            assert all(m is not None for m in means_of), "a question that moves recovers something"
            shares = [Rate(m.value, m.ci_low, m.ci_high, m.cases) for m in means_of if m is not None]
            gained.append(make_curve(label, x, shares))
        for count, (found, _) in zip(counts, pairs, strict=True):
            bench.metrics[f"curves/{name}/features_{count}/follow_rate"] = found.follows.value
            assert found.recovered is not None
            bench.metrics[f"curves/{name}/features_{count}/recovered"] = found.recovered.value
    return {"follows": follow, "recovered": gained}


def roles_of(subject: PairSubject) -> list[str]:
    """The position roles of a prompt, in the order of reading."""
    return list(dict.fromkeys(subject.batch.roles.tolist()))


def grid_metrics(bench: Bench, cases: Mapping[str, PairCase], grids: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`grid/<question>/layer_04/last/recovered`."""
    return {
        f"grid/{name}/layer_{layer:02d}/{role}/recovered": float(grid[row, column, 0])
        for name, grid in grids.items()
        for row, layer in enumerate(bench.transcoders.layers)
        for column, role in enumerate(roles_of(cases[name].subject))
    }


def generated(bench: Bench, cases: Mapping[str, PairCase], sets: Mapping[str, Features]) -> dict[str, float]:
    """The share of pairs whose generated answer, under the edit and with a KV cache, is the counterfactual's word."""
    metrics: dict[str, float] = {}
    for label, features in sets.items():
        for name, case in cases.items():
            nodes = nodes_of(bench, label)
            if not case.subject.moves or not (label in (ALL, f"features of {name}") or nodes):
                continue
            hits = []
            for i, pair in enumerate(case.pairs[: bench.cfg.interchange.generate]):
                row = torch.tensor([i])
                single = replace(
                    case.subject, batch=case.subject.batch.select(row), other=case.subject.other.select(row)
                )
                plan = plan_of(bench, single, label, features)
                inputs = bench.vlm.prepare(pair.original.prompt, list(pair.original.images))
                said = generate_edited(bench.scope, inputs, plan, 6)
                hits.append(said.split()[:1] == [pair.counterfactual.answer])
            if hits:
                key = f"interchange/{label.replace(' ', '_')}/generate/{name}/follow_rate"
                metrics |= rate_metrics(key, bootstrap_rate(hits))
    return metrics
