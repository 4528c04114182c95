"""Carry a count's features by a dose: does the number that the model says go along, past the number that was carried?

Within a pair the originals' activations a become a + s (a' - a), a' the counterfactuals' (never below 0), so that 1 is
the interchange and 2 twice the way. Only pairs with room above count: at most half of the numbers that the model knows.
The step also carries the features of one kind of tuning curve alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.interchange import interchange_plan
from vlmscope.circuits.pair_subject import part_of
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.core.records import control_draws
from vlmscope.data.orrery.scenes import NUMBERS
from vlmscope.interventions.edits import LayerEdit, Plan
from vlmscope.interventions.named import donor_activations, matched_features
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.tasks.steps.interchange import InterchangeRow, PairCase, interchange_metrics, one_row
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics

if TYPE_CHECKING:
    from vlmscope.circuits.pair_subject import PairSubject
    from vlmscope.tasks.steps.bench import Bench

QUESTION = "count"
ROOM = 3  # originals of at most so many, of the six that training showed
KINDS = {"up": ("up",), "down": ("down",), "peak": ("peak",)}


def run(bench: Bench) -> None:
    """Leaves curves, shares by strength and rows in `bench.records`; metrics under dose/ and interchange/."""
    record = bench.record("interchange")
    if QUESTION not in record["cases"] or not record["cases"][QUESTION].subject.moves:
        raise UserError(f"number_dose needs pairs that differ in {QUESTION}: choose pairs=count")
    case: PairCase = record["cases"][QUESTION]
    features = record["sets"].get(f"features of {QUESTION}", {})
    few = [i for i, pair in enumerate(case.pairs) if NUMBERS.index(pair.original.answer) <= ROOM]
    if not features or not few:
        raise UserError(f"number_dose has no features or no pair of at most {ROOM} shapes: raise pairs.train or .test")
    subject = part_of(case.subject, few)
    numbers = torch.tensor([bench.token(word) for word in NUMBERS], device=subject.tokens.device)
    shifts: dict[str, list[Rate]] = {}
    shares: list[tuple[float, list[Rate]]] = []
    strengths = sorted(bench.cfg.interchange.strengths)
    for strength in strengths:
        plan = dosed(bench, subject, features, strength)
        control = matched_features(plan, record["means"], control_draws(bench.cfg.seed, 1)[0])
        drawn = dosed(bench, subject, {layer: edit.features for layer, edit in control.items()}, strength)
        for label, one in (("features of count", plan), ("matched features", drawn)):
            logits = run_edited(bench.scope, subject.batch, one)
            shift = numbers_said(logits, numbers) - numbers_said(subject.base.logits, numbers)
            shifts.setdefault(label, []).append(bootstrap_mean(shift))
            if one is plan:
                shares.append((strength, [bootstrap_rate(shift == by) for by in (0, 1, 2, 3)]))
        rate = replace(shifts["features of count"][-1], control=shifts["matched features"][-1].value)
        bench.metrics |= rate_metrics(f"dose/{QUESTION}/strength_{strength:g}/shift", rate)
        for by, share in enumerate(shares[-1][1]):
            bench.metrics |= rate_metrics(f"dose/{QUESTION}/strength_{strength:g}/plus_{by}", share)
    rows = kind_rows(bench, record)
    bench.metrics |= interchange_metrics(rows)
    curves = [make_curve(label, strengths, rates) for label, rates in shifts.items()]
    bench.records["number_dose"] = {"curves": curves, "shares": shares, "rows": rows, "pairs": subject.size}


def dosed(bench: Bench, subject: PairSubject, features: Mapping[int, Tensor], strength: float) -> Plan:
    """Set the originals' activations to a + strength (a' - a), at least 0, position by position."""
    scope = bench.scope
    before = donor_activations(scope, subject.batch, features)
    plan: dict[int, LayerEdit] = {}
    for layer, edit in interchange_plan(scope, subject, features).items():
        start = before[layer][1]
        plan[layer] = replace(edit, value=(start + strength * (edit.value - start)).clamp_min(0))
    return plan


def numbers_said(logits: Tensor, numbers: Tensor) -> np.ndarray:
    """[B], the number whose word is most probable among number words; logits [B, V], numbers [n] token ids."""
    return logits[:, numbers].argmax(-1).cpu().numpy()


def kind_rows(bench: Bench, record: dict) -> list[InterchangeRow]:
    """Carry only the features of one kind of tuning curve over, on every question."""
    if "number_line" not in bench.records:
        return []
    tuned = bench.record("number_line")["last"]["tuned"].names
    cases: dict[str, PairCase] = record["cases"]
    rows = []
    for label, names in KINDS.items():
        found = {
            layer: torch.from_numpy(np.flatnonzero([name.split(" ")[0] in names for name in of]))
            for layer, of in tuned.items()
        }
        found = {layer: chosen for layer, chosen in found.items() if len(chosen)}
        for case in cases.values() if found else ():
            plan = interchange_plan(bench.scope, case.subject, found)
            rows.append(one_row(bench, case.subject, f"{label} kind", plan, "all", "free", record["means"]))
    return rows
