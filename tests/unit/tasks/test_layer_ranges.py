"""Ranges of layers, silenced features and likenesses do what they say, on a tiny random model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlmscope.circuits.interchange import all_features, interchange_plan, recovered
from vlmscope.circuits.pair_effects import PairEffects
from vlmscope.circuits.pair_subject import PairSubject
from vlmscope.interventions.named import mean_activations
from vlmscope.interventions.run import run_edited
from vlmscope.tasks.steps.layer_ranges import cosine, likenesses, range_curve, silence


def test_ranges_grow_to_all_layers_from_both_ends(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    first, last = (range_curve(bench, subject, kind) for kind in ("first", "last"))
    assert first.shares.shape == (3, len(bench.transcoders.layers))
    np.testing.assert_allclose(first.shares[:, -1], last.shares[:, 0], rtol=1e-4)
    plan = interchange_plan(bench.scope, subject, all_features(bench.transcoders))
    logits = run_edited(bench.scope, subject.batch, {i: plan[i] for i in (0, 1)})
    np.testing.assert_allclose(first.shares[:, 1], recovered(subject, logits), rtol=1e-4, atol=1e-5)
    assert np.ptp(first.shares, axis=1).max() > 1e-4  # the ranges differ
    assert len(first.outcomes) == len(first.directions) == len(bench.transcoders.layers)


def test_silenced_features_are_zero_and_controls_are_as_many(made: tuple[Any, PairSubject]) -> None:
    bench, subject = made
    means = mean_activations(bench.scope, [subject.batch], bench.transcoders.layers)
    nothing = silence(bench, subject, {0: torch.empty(0, dtype=torch.int64)}, means, 1)
    right = float((subject.base.logits.argmax(-1) == subject.tokens).float().mean())
    assert nothing.value == pytest.approx(1 - right) == nothing.control
    some = silence(bench, subject, {layer: torch.arange(8) for layer in (0, 1)}, means, 2)
    assert some.cases == 3 and some.control is not None


def test_likeness_is_of_absolute_effects_role_by_role() -> None:
    def effects(rows: list[list[float]]) -> PairEffects:
        table = {0: torch.tensor(rows)}
        return PairEffects(("image", "last"), table, table)

    bench: Any = SimpleNamespace(transcoders=SimpleNamespace(layers=[0]), cfg=SimpleNamespace(seed=0))
    one = effects([[1.0, -2.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    other = effects([[-1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    found = likenesses(bench, {"name": one, "cover": other})
    assert found["name", "cover", "image"][0].tolist() == pytest.approx([1.0])
    assert found["name", "cover", "last"][0].tolist() == pytest.approx([0.0])
    assert np.isnan(cosine(np.zeros(3), np.ones(3)))
