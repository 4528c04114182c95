"""Rows of a circuit's table beside steering and patching: ablation, answers generated token by token, corrections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.effects import compared, flip_effect
from vlmscope.core.intervention import FlipRow, Rate
from vlmscope.core.records import control_draws
from vlmscope.interventions.edits import LayerEdit, Plan, position_mask, set_features
from vlmscope.interventions.named import matched_features
from vlmscope.interventions.run import editing, generate_batch
from vlmscope.metrics.causal import benjamini_hochberg

if TYPE_CHECKING:
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.tasks.steps.bench import Bench
    from vlmscope.tasks.steps.intervene import Case

ANSWER_TOKENS = 6  # of a generated answer, at most


def ablation_rows(bench: Bench, circuit: Circuit, cases: dict[str, Case], means: dict[int, Tensor]) -> list[FlipRow]:
    """The recipient's features set to 0 in every mode: does the answer go, and where to?"""
    rows: list[FlipRow] = []
    for mode in bench.intervention.modes:
        found: list[FlipRow] = []
        for name, case in cases.items():
            plan = ablation(bench, circuit, case)
            draws = bench.intervention.controls if mode == "free" else 1
            effect = flip_effect(bench.scope, case.subject, plan, mode, means, draws, bench.cfg.seed)
            found.append(
                FlipRow("ablate", mode, name, "all", effect.flip, size_of(plan), effect.changed, effect.p_changed)
            )
        rows += [*found, worst(found)]
    return rows


def ablation(bench: Bench, circuit: Circuit, case: Case) -> Plan:
    """All features of the recipient's supernode to 0, at every position and at generated tokens."""
    where = position_mask(case.subject.batch.roles, "all")
    found = circuit.indices(bench.circuit_config.concepts[0])
    return {layer: set_features(f, torch.zeros(len(f)), where, torch.zeros(len(f))) for layer, f in found.items()}


def generation_rows(bench: Bench, circuit: Circuit, cases: dict[str, Case], means: dict[int, Tensor]) -> list[FlipRow]:
    """Every method while the answer is generated with a KV cache, each beside one draw of matched features.

    A flip is an answer that begins with the donor's word and does not name the recipient's after it.
    """
    rows: list[FlipRow] = []
    count = bench.intervention.generate
    for method in ("steer", "patch", "ablate") if count else ():
        found: list[FlipRow] = []
        for name, case in cases.items():
            whole = ablation(bench, circuit, case) if method == "ablate" else getattr(case, method)
            plan = first_cases(whole, case.subject.batch.size, count)
            draw = control_draws(bench.cfg.seed, 1)[0]
            pair = [said(bench, case, name, edits) for edits in (plan, matched_features(plan, means, draw))]
            donor, recipient = case.subject.donor_token, case.subject.recipient_token
            flipped = [np.array([ids[:1] == [donor] and recipient not in ids for ids in answers]) for answers in pair]
            moved = [np.array([ids[:1] != [recipient] for ids in answers]) for answers in pair]
            (flip, p_flip), (changed, p_changed) = compared(flipped[0], flipped[1:]), compared(moved[0], moved[1:])
            p = p_changed if method == "ablate" else p_flip
            found.append(FlipRow(method, "generate", name, "all", flip, size_of(plan), changed, p))
        rows += [*found, worst(found)]
    return rows


def said(bench: Bench, case: Case, question: str, plan: Plan) -> list[list[int]]:
    """Token ids of the first cases' generated answers under a plan made for so many."""
    prompt = bench.circuit_config.questions[question].prompt
    inputs = bench.inputs(case.images[: bench.intervention.generate], prompt)
    context = editing(bench.scope, plan)
    return generate_batch(bench.vlm.adapter, inputs, ANSWER_TOKENS, context)


def first_cases(plan: Plan, size: int, count: int) -> dict[int, LayerEdit]:
    """A plan for the first `count` of a batch of `size`: values of each prompt's own are cut to these."""

    def cut(values: Tensor, rank: int) -> Tensor:
        return values[:count] if values.ndim == rank and len(values) == size else values

    return {
        layer: replace(
            edit,
            value=cut(edit.value, 3),
            generated=None if edit.generated is None else cut(edit.generated, 2),
        )
        for layer, edit in plan.items()
    }


def size_of(plan: Plan) -> int:
    """The number of features that a plan edits."""
    return sum(len(edit.features) for edit in plan.values())


def worst(rows: list[FlipRow]) -> FlipRow:
    """The question that is flipped least (changed least, for ablation), with the highest controls of any question."""

    def measure(row: FlipRow) -> Rate:
        return row.changed if row.method == "ablate" and row.changed is not None else row.rate

    lowest = min(rows, key=lambda row: measure(row).value)
    changed = lowest.changed
    if changed is not None:
        changed = replace(changed, control=_highest([row.changed for row in rows if row.changed is not None]))
    rate = replace(lowest.rate, control=_highest([row.rate for row in rows]))
    return replace(lowest, question="worst", rate=rate, changed=changed, p=None)


def _highest(rates: Sequence[Rate]) -> float | None:
    return max((rate.control for rate in rates if rate.control is not None), default=None)


def with_q(rows: list[FlipRow]) -> list[FlipRow]:
    """The rows with q-values: all p-values of the table corrected together (Benjamini and Hochberg)."""
    known = [i for i, row in enumerate(rows) if row.p is not None]
    q = dict(zip(known, benjamini_hochberg(np.array([rows[i].p for i in known], float)).tolist(), strict=True))
    return [replace(row, q=q.get(i)) for i, row in enumerate(rows)]


def row_metrics(rows: list[FlipRow]) -> dict[str, float]:
    """`steer/free/flip_rate`, `steer/free/name/flip_rate`, `steer/free/no_last_layer/flip_rate`, `ablate/free/name/
    changed_rate` ... with intervals, and `steer/free/name/q`.
    """
    metrics: dict[str, float] = {}
    for row in rows:
        parts = [row.method, row.mode]
        parts += [] if row.scope == "all" else [row.scope]
        parts += [] if row.question == "worst" else [row.question]
        metrics |= rate_metrics("/".join([*parts, "flip_rate"]), row.rate)
        if row.changed is not None:
            metrics |= rate_metrics("/".join([*parts, "changed_rate"]), row.changed)
        if row.q is not None:
            metrics["/".join([*parts, "q"])] = row.q
        metrics[f"{row.method}/features"] = float(max(row.n_features, metrics.get(f"{row.method}/features", 0)))
    return metrics


def rate_metrics(key: str, rate: Rate) -> dict[str, float]:
    """A rate under its own name with `_ci_low`, `_ci_high` and `_control`."""
    return rate.metrics(key)
