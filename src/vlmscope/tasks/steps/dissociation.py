"""Double dissociation: a fact's features move that fact's answer and no other's, and the other fact's the reverse.

On pairs that differ in both facts each set of features can pull either answer; on pairs that differ in one, that the
other answer stays is the test. A set of features may be silent when another question is asked, and would then do
nothing whatever it stands for: `activity` says how much of its change within pairs is there under each question.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.circuits.interchange import carried_controls, interchange_plan, outcome, recovered
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.data.pairs import load_pairs
from vlmscope.interventions.named import donor_activations
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_mean
from vlmscope.tasks.steps.interchange import PairCase
from vlmscope.tasks.steps.intervene import rate_metrics
from vlmscope.tasks.steps.pair_subjects import pairs_of, subject_of

if TYPE_CHECKING:
    from vlmscope.circuits.pair_subject import PairSubject
    from vlmscope.config import AppConfig
    from vlmscope.tasks.steps.bench import Bench

NEEDS = "dissociation needs pairs that differ in two facts, such as pairs=object, and pairs.train > 0"


@dataclass(frozen=True)
class Cell:
    """What carrying the features of one fact did to the answer about another (or the same), on pairs of one change.

    `gained` is the recovered share, None where the answer does not differ; each rate has the matched features' as its
    control. `pulled [B]` is the recovered share pair by pair and `ids` names the pairs.
    """

    change: str
    features: str
    question: str
    follows: Rate
    changed: Rate
    gained: Rate | None
    pulled: np.ndarray
    ids: tuple[str, ...]


def check(cfg: AppConfig) -> None:
    """One's own pairs ask different questions about the same scenes.

    Raises:
        UserError: fewer than two questions whose answers differ, or no scene that all of them ask about.
    """
    if cfg.pairs is None or cfg.pairs.path is None:
        return
    scenes: dict[str, set[str]] = {}
    for pair in load_pairs(cfg.pairs, "test"):
        if pair.moves:
            scenes.setdefault(pair.question, set()).add(pair.id)
    if len(scenes) < 2:
        raise UserError(f"{cfg.pairs.path}: {NEEDS}")
    if not set.intersection(*scenes.values()):
        raise UserError(
            f"{cfg.pairs.path}: no test pair of {', '.join(scenes)} has an id in common, and dissociation compares "
            'them on the same scenes; give lines about one scene the same "id"'
        )


def run(bench: Bench) -> None:
    """Leaves cells, contrasts and activities in `bench.records`; metrics under dissociation/."""
    record = bench.record("interchange")
    facts = [name for name, case in record["cases"].items() if case.subject.moves]
    sets = {fact: record["sets"][f"features of {fact}"] for fact in facts if f"features of {fact}" in record["sets"]}
    if len(sets) < 2:
        raise UserError(NEEDS)
    common = set.intersection(*({pair.id for pair in record["cases"][fact].pairs} for fact in facts))
    if not common:
        raise UserError(
            f"dissociation: the model answers no pair rightly under all of {', '.join(facts)}; give more pairs"
        )
    cells = [
        measure(bench, change, fact, case, features, record["means"])
        for change, cases in changes(bench, record["cases"], list(sets)).items()
        for fact, features in sets.items()
        for case in cases.values()
    ]
    contrasts = {fact: contrast(cells, "both", fact) for fact in sets}
    activity = {(fact, name): activity_of(bench, record["cases"], features, fact, name)
                for fact, features in sets.items() for name in record["cases"]}  # fmt: skip
    for cell in cells:
        key = f"dissociation/{cell.change}/features_of_{cell.features}/{cell.question}"
        bench.metrics |= rate_metrics(f"{key}/follow_rate", cell.follows)
        bench.metrics |= rate_metrics(f"{key}/changed_rate", cell.changed)
        if cell.gained is not None:
            bench.metrics |= rate_metrics(f"{key}/recovered", cell.gained)
    for fact, rate in contrasts.items():
        bench.metrics |= rate_metrics(f"dissociation/features_of_{fact}/own_minus_other", rate)
    for (fact, name), share in activity.items():
        bench.metrics[f"dissociation/features_of_{fact}/active_under/{name}"] = share
    bench.records["dissociation"] = {"cells": cells, "contrasts": contrasts, "activity": activity}


def changes(bench: Bench, both: dict[str, PairCase], facts: list[str]) -> dict[str, dict[str, PairCase]]:
    """Change -> question -> its test pairs: those of the run, named `both`, and those that differ in one fact alone.

    One's own pairs are only of the one kind.
    """
    found = {"both": both}
    pairs = bench.cfg.pairs
    assert pairs is not None, "the step interchange has run"
    if pairs.change is None:
        return found
    for fact in facts:
        alone = replace(pairs, change=fact, original=None, counterfactual=None)
        some = pairs_of(replace(bench, cfg=replace(bench.cfg, pairs=alone)), "test")
        found[fact] = {}
        for name, ones in some.items():
            subject = subject_of(bench, name, ones)
            found[fact][name] = PairCase([ones[i] for i in subject.rows.tolist()], subject)
    return found


def measure(bench: Bench, change: str, fact: str, case: PairCase, features: dict, means: dict) -> Cell:
    """Carry one fact's features over and look at one question."""
    scope, subject = bench.scope, case.subject
    plan = interchange_plan(scope, subject, features)
    logits = run_edited(scope, subject.batch, plan)
    drawn = carried_controls(scope, subject, plan, "free", means, bench.intervention.controls, bench.cfg.seed)
    found = outcome(subject, logits)
    gained = found.recovered
    if gained is not None:
        shares = [one.recovered.value for one in drawn if one.recovered is not None]
        gained = replace(gained, control=float(np.mean(shares)))
    return Cell(
        change,
        fact,
        subject.question,
        replace(found.follows, control=float(np.mean([one.follows.value for one in drawn]))),
        replace(found.changed, control=float(np.mean([one.changed.value for one in drawn]))),
        gained,
        recovered(subject, logits) if subject.moves else np.zeros(0),
        tuple(pair.id for pair in case.pairs),
    )


def contrast(cells: list[Cell], change: str, fact: str) -> Rate:
    """Recovered share of the fact's own answer minus that of the other facts', on the pairs that all have."""
    own = next(c for c in cells if (c.change, c.features, c.question) == (change, fact, fact))
    others = [
        c for c in cells if (c.change, c.features) == (change, fact) and c.question != fact and c.gained is not None
    ]
    common = [name for name in own.ids if all(name in c.ids for c in others)]

    def values(cell: Cell) -> np.ndarray:
        at = {name: i for i, name in enumerate(cell.ids)}
        return cell.pulled[[at[name] for name in common]]

    return bootstrap_mean(values(own) - np.mean([values(c) for c in others], axis=0))


def activity_of(bench: Bench, cases: dict[str, PairCase], features: dict, fact: str, name: str) -> float:
    """How much a set changes within pairs under question `name`, in units of that under its own."""
    return moved(bench, cases[name].subject, features) / max(moved(bench, cases[fact].subject, features), 1e-12)


def moved(bench: Bench, subject: PairSubject, features: dict) -> float:
    """Mean over pairs of the sum over features and positions of |a' - a| times the norm of what a feature writes."""
    sides = [donor_activations(bench.scope, b, features) for b in (subject.batch, subject.other)]
    total = 0.0
    for layer, (found, before) in sides[0].items():
        norms = bench.transcoders[layer].write_norms()[found]
        total += float(((sides[1][layer][1] - before).abs() @ norms).sum()) / subject.size
    return total
