"""Single edits run as a batch: the same as one by one, and in direct mode exactly the edges of the graph."""

import numpy as np
import pytest
import torch

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.targets import difference_target
from vlmscope.interventions import run as single
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import SingleEdits, base_run, run_edited, single_effects
from vlmscope.models.batching import make_batch
from vlmscope.replacement import build_replacement

TOKENS = (5, 9)


def edits_of(table, rows: np.ndarray) -> SingleEdits:
    scale = np.linspace(0, 3, len(rows))
    return SingleEdits(table.layer[rows], table.position[rows], table.index[rows], scale, 1.0 - scale / 2)


def test_direct_effects_are_the_edges(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, inputs, _ = bench
    monkeypatch.setattr(single, "BATCH", 7)  # several forwards, the last one smaller
    replacement = build_replacement(scope, inputs[1])
    table, adjoint = replacement.feature_activations, Adjoint(replacement)
    target = difference_target(replacement, *TOKENS, label="difference")
    edges = adjoint.stream_rows(target.layer, target.vectors, torch.from_numpy(target.positions))[0]
    rows = np.arange(0, len(table), max(len(table) // 17, 1))
    edits = edits_of(table, rows)
    batch = make_batch(scope.adapter, inputs[1:2])
    found = single_effects(scope, batch, base_run(scope, batch), edits, "direct", TOKENS)
    share = edits.scale - 1 + edits.value / table.activation[rows]
    expected = edges.numpy()[adjoint.columns.all_features()[rows]] * share
    assert np.abs(found - expected).max() < 1e-9
    assert np.abs(expected).max() > 1e-4


@pytest.mark.parametrize("mode", ["frozen_attention", "free"])
def test_a_batch_equals_its_edits_one_by_one(bench, mode: str) -> None:
    scope, inputs, _ = bench
    table = build_replacement(scope, inputs[0]).feature_activations
    edits = edits_of(table, np.array([0, 1, len(table) // 2, len(table) // 2 + 1, len(table) - 1]))
    batch = make_batch(scope.adapter, inputs[:1])
    base = base_run(scope, batch)
    found = single_effects(scope, batch, base, edits, mode, TOKENS)
    for i in range(len(edits)):
        where = torch.zeros(batch.length, dtype=torch.bool)
        where[edits.position[i]] = True
        scale, value = (torch.tensor([v[i]], dtype=torch.float64) for v in (edits.scale, edits.value))
        plan = {int(edits.layer[i]): LayerEdit(torch.tensor([edits.index[i]]), value, scale, where)}
        moved = (run_edited(scope, batch, plan, mode, base) - base.logits)[0]
        assert found[i] == pytest.approx(float(moved[TOKENS[0]] - moved[TOKENS[1]]), abs=1e-10)
    assert np.abs(found).max() > 1e-5
