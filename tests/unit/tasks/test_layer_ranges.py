"""Ranges of layers, silenced features and likenesses do what they say, on a tiny random model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.circuits.subjects import carried, cases_of, recovered

from vlmscope.circuits.operations import Carry
from vlmscope.circuits.pairs import PairEffects, PairSubject
from vlmscope.interventions.run import run_edited
from vlmscope.interventions.trials import Setting, Trial, run_trials
from vlmscope.tasks.experiment import own_analysis

HIERARCHY: Any = own_analysis("hierarchy")


def test_ranges_grow_to_all_layers_from_both_ends(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    settings = [Setting("first", layers="0-each", matched=0), Setting("last", layers="each-", matched=0)]
    table = run_trials(bench.scope, [Trial("all", Carry(None), [cases_of(subject)], settings)])
    first, last = (of.pivot(index="case", columns="layers", values="recovered") for _, of in table.groupby("setting"))
    layers = bench.transcoders.layers
    assert first.columns.tolist() == [f"0-{n}" for n in layers] and last.columns.tolist() == [f"{n}-" for n in layers]
    np.testing.assert_allclose(first[f"0-{layers[-1]}"], last["0-"], rtol=1e-4)
    plan = carried(bench.scope, subject, None)
    logits = run_edited(bench.scope, subject.batch, {i: plan[i] for i in (0, 1)})
    np.testing.assert_allclose(first["0-1"], recovered(subject, logits), rtol=1e-4, atol=1e-5)
    assert np.ptp(first.to_numpy(), axis=1).max() > 1e-4  # the ranges differ


def test_likeness_is_of_absolute_effects_role_by_role() -> None:
    def effects(rows: list[list[float]]) -> PairEffects:
        table = {0: torch.tensor(rows)}
        return PairEffects(("image", "last"), table, table)

    bench: Any = SimpleNamespace(transcoders=SimpleNamespace(layers=[0]), cfg=SimpleNamespace(seed=0))
    one = effects([[1.0, -2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    other = effects([[-1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    found = HIERARCHY.likenesses(bench, {"name": one, "cover": other}).set_index("role").alike
    assert found["image"] == pytest.approx(1.0) and found["last"] == pytest.approx(0.0)
    assert np.isnan(HIERARCHY.cosine(np.zeros(3), np.ones(3)))
