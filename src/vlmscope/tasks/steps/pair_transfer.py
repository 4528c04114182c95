"""Do features that carry a fact generalise over another? Chosen on pairs of one value, tested on pairs of each other.

For pairs that differ in the count, features are chosen on pairs of circles alone and carried over on test pairs of
circles, squares and so on; likewise for one colour. Every value takes its turn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.circuits.interchange import carried_controls, interchange_plan, recovered
from vlmscope.circuits.pair_effects import pair_effects
from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.data.pairs import Pair
from vlmscope.interventions.named import by_layer
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.tasks.steps.intervene import rate_metrics
from vlmscope.tasks.steps.pair_subjects import pairs_of, subject_of

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


@dataclass(frozen=True)
class Transfer:
    """Features of `question` chosen on each of V values of `fact` and tested on each.

    `recovered` and `follows` are [V, V], chosen on x tested on; `own` and `other` the recovered share of all test
    pairs under features of their own value, and on average under those of the others; `control` under matched ones.
    """

    question: str
    fact: str
    values: tuple[str, ...]
    recovered: np.ndarray
    follows: np.ndarray
    own: Rate
    other: Rate
    own_follows: Rate
    other_follows: Rate


def run(bench: Bench) -> None:
    """Leaves a `Transfer` for each fact that pairs have in common in `bench.records`; metrics under transfer/."""
    means = bench.record("interchange")["means"]
    wanted = bench.cfg.interchange.transfer
    sides = {split: more_pairs(bench, split, wanted) for split in ("train", "test")}
    found = []
    for question in [name for name, pairs in sides["test"].items() if pairs[0].moves]:
        for fact in [name for name, pairs in sides["test"].items() if not pairs[0].moves]:
            groups = {s: by_value(pairs[question], pairs[fact]) for s, pairs in sides.items()}
            values = [v for v in groups["test"] if min(len(g.get(v, ())) for g in groups.values()) >= least(bench)]
            if len(values) > 1:
                found.append(transfer(bench, question, fact, sorted(values), groups, means))
    if not found:
        raise UserError("pair_transfer: no fact that pairs have in common has two values with enough pairs each")
    for one in found:
        key = f"transfer/{one.question}/over_{one.fact}"
        bench.metrics |= rate_metrics(f"{key}/same/recovered", one.own)
        bench.metrics |= rate_metrics(f"{key}/another/recovered", one.other)
        bench.metrics |= rate_metrics(f"{key}/same/follow_rate", one.own_follows)
        bench.metrics |= rate_metrics(f"{key}/another/follow_rate", one.other_follows)
    bench.records["pair_transfer"] = found


def least(bench: Bench) -> int:
    """How many pairs of a value there must be."""
    return bench.cfg.interchange.least


def more_pairs(bench: Bench, split: str, count: int) -> dict[str, list[Pair]]:
    """`count` pairs by question; Orrery's list begins with the pairs that other steps use, of the same split."""
    assert bench.cfg.pairs is not None, "the step interchange has run"
    more = replace(bench.cfg.pairs, train=count, test=count)
    return pairs_of(replace(bench, cfg=replace(bench.cfg, pairs=more)), split)


def by_value(pairs: list[Pair], stays: list[Pair]) -> dict[str, list[Pair]]:
    """Pairs of one question by the answer that the same scenes give to another, which is equal on both sides."""
    answers = {pair.id: pair.original.answer for pair in stays}
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        if pair.id in answers:
            found.setdefault(answers[pair.id], []).append(pair)
    return found


def transfer(
    bench: Bench, question: str, fact: str, values: list[str], groups: dict[str, dict[str, list[Pair]]], means: dict
) -> Transfer:
    """Choose on each value, test on each."""
    scope = bench.scope
    chosen = []
    for value in values:
        subject = subject_of(bench, question, groups["train"][value])
        ranked = pair_effects(scope, subject, bench.cfg.interchange.steps)
        ids = [member.feature for member in ranked.ranked(bench.cfg.interchange.features)]
        chosen.append(by_layer(scope.transcoders, ids))
    subjects = [subject_of(bench, question, groups["test"][value]) for value in values]
    cells = [[measure(bench, subject, features) for subject in subjects] for features in chosen]
    matched = []
    for at, subject in enumerate(subjects):
        plan = interchange_plan(scope, subject, chosen[at])
        (control,) = carried_controls(scope, subject, plan, "free", means, 1, bench.cfg.seed)
        assert control.recovered is not None
        matched.append((control.recovered.value, control.follows.value, subject.size))
    weights = [size for *_, size in matched]
    controls = [float(np.average([row[i] for row in matched], weights=weights)) for i in (0, 1)]
    own, other = ([], []), ([], [])
    for column in range(len(values)):
        for measure_of in (0, 1):
            parts = [cells[row][column][measure_of] for row in range(len(values))]
            own[measure_of].append(parts[column])
            other[measure_of].append(np.mean([part for row, part in enumerate(parts) if row != column], axis=0))
    shares, rates = (np.array([[cell[i].mean() for cell in row] for row in cells]) for i in (0, 1))
    return Transfer(
        question,
        fact,
        tuple(values),
        shares,
        rates,
        bootstrap_mean(np.concatenate(own[0]), control=controls[0]),
        bootstrap_mean(np.concatenate(other[0]), control=controls[0]),
        bootstrap_rate(np.concatenate(own[1]), control=controls[1]),
        bootstrap_rate(np.concatenate(other[1]), control=controls[1]),
    )


def measure(bench: Bench, subject: PairSubject, features: dict) -> tuple[np.ndarray, np.ndarray]:
    """[B] recovered share and [B] whether the answer follows, pair by pair, when features are carried over."""
    plan = interchange_plan(bench.scope, subject, features)
    logits = run_edited(bench.scope, subject.batch, plan)
    follows = (logits.argmax(-1) == subject.other_tokens).cpu().numpy()
    return recovered(subject, logits), follows.astype(float)
