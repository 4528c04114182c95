"""Rows of a circuit's table: cut plans, the worst question, corrected p-values, names of metrics."""

import torch

from vlmscope.core.intervention import FlipRow, Rate
from vlmscope.interventions.edits import set_features
from vlmscope.report.page import flip_table
from vlmscope.tasks.steps.circuit_rows import first_cases, row_metrics, with_q, worst


def row(method: str, question: str, flip: float, changed: float, p: float | None = None) -> FlipRow:
    rate, moved = (Rate(v, v, v, 10, v / 4) for v in (flip, changed))
    return FlipRow(method, "free", question, "all", rate, 3, moved, p)


def test_only_values_of_each_prompt_are_cut() -> None:
    features, where = torch.tensor([1, 2]), torch.ones(4, dtype=torch.bool)
    own = set_features(features, torch.rand(4, 4, 2), where, torch.rand(4, 2))
    shared = set_features(features, torch.rand(4, 2), where, torch.rand(2))
    cut = first_cases({0: own, 1: shared}, 4, 3)
    assert torch.equal(cut[0].value, own.value[:3])
    assert cut[0].generated is not None
    assert cut[0].generated.shape == (3, 2)
    assert cut[1] == shared


def test_worst_is_by_flips_or_for_ablation_by_changes() -> None:
    by_flip = worst([row("steer", "name", 0.9, 0.2, 0.01), row("steer", "colour", 0.4, 0.8, 0.02)])
    assert (by_flip.question, by_flip.rate.value, by_flip.rate.control, by_flip.p) == ("worst", 0.4, 0.9 / 4, None)
    by_change = worst([row("ablate", "name", 0.9, 0.2), row("ablate", "colour", 0.4, 0.8)])
    assert by_change.changed is not None
    assert (by_change.changed.value, by_change.changed.control) == (0.2, 0.2)


def test_p_values_are_corrected_over_the_rows_that_have_one() -> None:
    rows = with_q([row("steer", "name", 1, 1, 0.01), row("steer", "worst", 1, 1), row("ablate", "name", 0, 1, 0.04)])
    assert [r.q for r in rows] == [0.02, None, 0.04]
    metrics = row_metrics(rows)
    assert metrics["steer/free/name/q"] == 0.02
    assert metrics["ablate/free/name/changed_rate_control"] == 0.25
    assert "steer/free/q" not in metrics
    table = flip_table("All", rows)
    assert {"q", "changed, control"} <= set(table.columns)
    plain = [FlipRow("steer", "free", "name", "all", Rate(1, 1, 1, 2), 3)]
    assert "q" not in flip_table("All", plain).columns
    assert with_q(plain) == plain
