"""From which layers does each answer follow? Is one fact read out by way of another?

*Ranges.* All features of layers 0 .. k, or k .. L - 1, are carried from the counterfactual into the original at every
position; the mean layer of what the first ranges recover (`metrics.depth`) says how deep an answer is carried, and
pairs of questions are compared on the same scenes.

*By way of another.* Features are chosen for each question on training pairs. If "what covers this planet" is answered
by way of the planet's name, carrying the features of the name must move the cover, and silencing them must spoil it.
How alike the features' effects on two questions are, layer by layer, says where their ways part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.interchange import (
    Outcome,
    all_features,
    carried_controls,
    direction_controls,
    interchange_plan,
    layer_role_grid,
    outcome,
    recovered,
    run_interchange,
    whole_plan,
)
from vlmscope.circuits.pair_effects import PairEffects, pair_effects
from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.core.artifacts import write_json
from vlmscope.core.intervention import Rate
from vlmscope.core.records import control_draws, generator
from vlmscope.interventions.edits import Plan, scale_features
from vlmscope.interventions.named import matched_features, mean_activations
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.metrics.decoding import bootstrap_depth
from vlmscope.tasks.steps.interchange import PairCase, layers_of, roles_of, test_cases
from vlmscope.tasks.steps.intervene import rate_metrics
from vlmscope.tasks.steps.pair_subjects import moving, pairs_of, subject_of

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

RANGES = ("first", "last")  # layers 0 .. k, layers k .. L - 1


@dataclass(frozen=True)
class RangeCurve:
    """One question under one kind of range, at L layers.

    Attributes:
        outcomes: L.
        shares: [B, L], recovered logit difference of every pair.
        directions: L follow rates with a random direction of the same norm instead.
    """

    outcomes: list[Outcome]
    shares: np.ndarray
    directions: list[float]


@dataclass(frozen=True)
class ByWay:
    """A question's own features used on a question: carried, and set to 0. Controls are matched features."""

    features_of: str
    question: str
    carried: Rate
    recovered: Rate
    recovered_control: float
    silenced: Rate
    size: int


def run(bench: Bench) -> None:
    """Leaves curves, depths, grids, ways and likenesses in `bench.records`; metrics: ranges/, depth/, way/, alike/."""
    cases = {name: case for name, case in test_cases(bench).items() if case.subject.moves}
    curves = {name: {kind: range_curve(bench, case.subject, kind) for kind in RANGES} for name, case in cases.items()}
    depths, gaps = depths_of(bench, cases, curves)
    everything = all_features(bench.transcoders)
    grids = {
        name: layer_role_grid(bench.scope, case.subject, everything, roles_of(case.subject))
        for name, case in cases.items()
    }
    effects = effects_of(bench, cases)
    ways = by_way(bench, cases, effects)
    alike = likenesses(bench, effects)
    bench.metrics |= metrics_of(bench, curves, depths, gaps, ways, alike)
    write_json(bench.run_dir / "layer_ranges.json", {
        "ranges": {name: {kind: [one.recovered.value for one in of[kind].outcomes if one.recovered] for kind in RANGES}
                   for name, of in curves.items()},
        "grids": {name: {"roles": roles_of(cases[name].subject), "recovered": listed(grid[..., 0])}
                  for name, grid in grids.items()},
        "alike": {f"{a} {b} {role}": listed(values) for (a, b, role), (values, _) in alike.items()},
    })  # fmt: skip
    bench.records["layer_ranges"] = {
        "cases": cases, "curves": curves, "depths": depths, "gaps": gaps, "grids": grids, "ways": ways, "alike": alike
    }  # fmt: skip


def listed(values: np.ndarray) -> list[Any]:
    """As JSON takes it: None for what is not there, such as a role that the prompt does not have."""
    found = values.astype(object)
    found[np.isnan(values)] = None
    return found.tolist()


def effects_of(bench: Bench, cases: Mapping[str, PairCase]) -> dict[str, PairEffects]:
    """Effects on each question, estimated on training pairs whose answers differ."""
    scope, steps = bench.scope, bench.cfg.interchange.steps
    return {
        name: pair_effects(scope, subject_of(bench, name, pairs), steps)
        for name, pairs in moving(pairs_of(bench, "train")).items()
        if name in cases
    }


def range_curve(bench: Bench, subject: PairSubject, kind: str) -> RangeCurve:
    """Carry all features of growing ranges of layers."""
    scope, layers = bench.scope, bench.transcoders.layers
    whole = whole_plan(scope, subject.other)
    outcomes, shares, directions = [], [], []
    for layer in layers:
        plan = {i: edit for i, edit in whole.items() if (i <= layer if kind == "first" else i >= layer)}
        logits = run_edited(scope, subject.batch, plan)
        outcomes.append(outcome(subject, logits))
        shares.append(recovered(subject, logits))
        (control,) = direction_controls(scope, subject, plan, 1, bench.cfg.seed)
        directions.append(control.follows.value)
    return RangeCurve(outcomes, np.stack(shares, 1), directions)


def depths_of(
    bench: Bench, cases: Mapping[str, PairCase], curves: Mapping[str, Mapping[str, RangeCurve]]
) -> tuple[dict[str, Rate], dict[tuple[str, str], Rate]]:
    """The depth of each question, and for each two the first's less the second's, on scenes that both have."""
    seed = bench.cfg.seed
    depths = {name: bootstrap_depth(of["first"].shares, seed=seed) for name, of in curves.items()}
    gaps = {}
    for a, b in combinations(curves, 2):
        rows = {name: {pair.id: i for i, pair in enumerate(cases[name].pairs)} for name in (a, b)}
        common = [scene for scene in rows[a] if scene in rows[b]]
        if len(common) > 1:
            first, second = (curves[n]["first"].shares[[rows[n][scene] for scene in common]] for n in (a, b))
            gaps[a, b] = bootstrap_depth(first, second, seed)
    return depths, gaps


def by_way(bench: Bench, cases: Mapping[str, PairCase], effects: Mapping[str, PairEffects]) -> list[ByWay]:
    """Every question's features on every question, carried and silenced."""
    scope, seed = bench.scope, bench.cfg.seed
    means = mean_activations(
        scope, [case.subject.batch for case in cases.values()], scope.transcoders.layers
    )  # fmt: skip
    count, draws = bench.cfg.interchange.features, bench.intervention.controls
    found = []
    for owner, table in effects.items():
        features = layers_of(bench, table.ranked(count), count)
        size = sum(len(of) for of in features.values())
        for name, case in cases.items():
            subject = case.subject
            plan = interchange_plan(scope, subject, features)
            got = run_interchange(scope, subject, plan)
            controls = carried_controls(scope, subject, plan, "free", means, draws, seed)
            gained = [one.recovered.value for one in controls if one.recovered is not None]
            assert got.recovered is not None, "only questions that move are looked at"
            carried = Rate(got.follows.value, got.follows.ci_low, got.follows.ci_high, got.follows.cases,
                           float(np.mean([one.follows.value for one in controls])))  # fmt: skip
            silenced = silence(bench, subject, features, means, draws)
            found.append(ByWay(owner, name, carried, got.recovered, float(np.mean(gained)), silenced, size))
    return found


def silence(
    bench: Bench, subject: PairSubject, features: Mapping[int, Tensor], means: Mapping[int, Tensor], draws: int
) -> Rate:
    """The share of original answers that change when features are 0 everywhere; control: as many matched ones."""
    where = torch.ones(subject.batch.length, dtype=torch.bool)
    plan: Plan = {layer: scale_features(chosen, 0.0, where) for layer, chosen in features.items()}

    def changed(edits: Plan) -> np.ndarray:
        logits = run_edited(bench.scope, subject.batch, edits)
        return (logits.argmax(-1) != subject.tokens).numpy(force=True)

    controls = [changed(matched_features(plan, means, draw)).mean() for draw in control_draws(bench.cfg.seed, draws)]
    return bootstrap_rate(changed(plan), control=float(np.mean(controls)))


Alike = dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]


def likenesses(bench: Bench, effects: Mapping[str, PairEffects]) -> Alike:
    """(question, question, role) -> [L], cosine of the absolute effects of a layer's features on the two; beside it
    [L] with the features of one shuffled among those that have an effect on either.

    Effects are absolute, since the sign depends on which answer a pair starts from.
    """
    found: Alike = {}
    rng = generator(bench.cfg.seed, "alike")
    for a, b in combinations(effects, 2):
        for role in effects[a].roles:
            row = effects[a].roles.index(role)
            real, null = [], []
            for layer in bench.transcoders.layers:
                first, second = (effects[n].effect[layer][row].abs().double().numpy(force=True) for n in (a, b))
                live = (first > 0) | (second > 0)
                real.append(cosine(first, second))
                null.append(cosine(first[live], rng.permutation(second[live])))
            found[a, b, role] = np.array(real), np.array(null)
    return found


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two vectors; nan where one is 0."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float("nan")


def metrics_of(
    bench: Bench,
    curves: Mapping[str, Mapping[str, RangeCurve]],
    depths: Mapping[str, Rate],
    gaps: Mapping[tuple[str, str], Rate],
    ways: list[ByWay],
    alike: Alike,
) -> dict[str, float]:
    """`ranges/<question>/first/layer_03/follow_rate`, `depth/<question>`, `depth/<a>_less_<b>`,
    `way/<features of>/<question>/follow_rate` and `changed_rate`, `alike/<a>_<b>/<role>/layer_03`.
    """
    metrics: dict[str, float] = {}
    layers = bench.transcoders.layers
    for name, of in curves.items():
        for kind, curve in of.items():
            for layer, one, direction in zip(layers, curve.outcomes, curve.directions, strict=True):
                key = f"ranges/{name}/{kind}/layer_{layer:02d}"
                metrics |= rate_metrics(f"{key}/follow_rate", one.follows)
                metrics[f"{key}/follow_rate_random_direction"] = direction
                assert one.recovered is not None
                metrics[f"{key}/recovered"] = one.recovered.value
    for name, rate in depths.items():
        metrics |= rate_metrics(f"depth/{name}", rate)
    for (a, b), rate in gaps.items():
        metrics |= rate_metrics(f"depth/{a}_less_{b}", rate)
    for way in ways:
        key = f"way/{way.features_of}/{way.question}"
        metrics |= rate_metrics(f"{key}/follow_rate", way.carried) | rate_metrics(f"{key}/changed_rate", way.silenced)
        metrics |= {f"{key}/recovered": way.recovered.value, f"{key}/recovered_control": way.recovered_control}
    for (a, b, role), (real, null) in alike.items():
        for layer, value, chance in zip(layers, real, null, strict=True):
            metrics[f"alike/{a}_{b}/{role}/layer_{layer:02d}"] = float(value)
            metrics[f"alike/{a}_{b}/{role}/layer_{layer:02d}_shuffled"] = float(chance)
    return metrics
