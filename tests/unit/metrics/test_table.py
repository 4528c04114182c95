"""Queries on tables of trials: ranks among control draws, and means over cells."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from vlmscope.metrics.rates import CELL, NO_CONTROL, corrected, measured, rates, worst

# Hits of 8 cases under the trial and under its control.
CELLS = {
    ("steer", "name", "a", "b"): (8, 0),
    ("steer", "name", "b", "a"): (8, 8),
    ("patch", "name", "a", "b"): (8, 0),
    ("patch", "colour", "a", "c"): (4, 4),
}


def cells() -> pd.DataFrame:
    rows = []
    for (operation, question, recipient, donor), counts in CELLS.items():
        of = {"operation": operation, "question": question, "recipient": recipient, "donor": donor, "features": 3}
        for control, hits in zip(("", "matched"), counts, strict=True):
            rows += [of | {"control": control, "draw": 0, "case": i, "hit": i < hits} for i in range(8)]
    return pd.DataFrame(rows)


def test_a_trial_is_ranked_among_its_draws() -> None:
    """The draw is what is random: with one draw of the control the smallest p-value is 1 / 2, whatever the pictures."""
    found = measured(cells(), ["operation", *CELL], {"steer": "hit", "patch": "hit"})
    assert list(found.index) == list(CELLS)
    assert found.p.tolist() == [1 / 2, 1.0, 1 / 2, 1.0] and found["rank"].tolist() == [1, 2, 1, 2]
    assert found.q.isna().all() and (found.draws == 1).all()  # one draw tests nothing


def test_ranks_among_enough_draws_are_corrected_together() -> None:
    rows = pd.DataFrame({"p": [1 / 31, 1 / 20, 1 / 2, np.nan, 0.8], "draws": [30, 19, 1, 0, 30]})
    np.testing.assert_allclose(corrected(rows).q, [3 / 40, 3 / 40, np.nan, np.nan, 0.8])


def ranked(hits: list[int], weak: list[bool], moves: float = 0.1) -> Any:
    """`rates` of 8 cases that all hit, beside control draws of so many hits, some of which do not bite."""
    one = {"question": "name", "features": 3}
    rows = [one | {"control": "", "draw": 0, "case": i, "hit": True, "displacement": 2.0} for i in range(8)]
    for draw, (count, soft) in enumerate(zip(hits, weak, strict=True)):
        same = one | {"control": "matched", "draw": draw, "weak": soft, "displacement": 2 * moves if soft else 2.0}
        rows += [same | {"case": i, "hit": i < count} for i in range(8)]
    return rates(pd.DataFrame(rows), ["question"]).loc["name"]


def test_draws_that_do_not_bite_are_refused_with_the_number() -> None:
    row = ranked([0] * 19 + [8, 4], [False] * 19 + [True, False])
    assert (row["rank"], row.draws, row.p, row.reason) == (1, 20, 1 / 21, "")
    assert row.matched == pytest.approx(0.5 / 20)  # the mean over draws that count
    none = ranked([0, 0], [True, True], 0.07)
    assert np.isnan(none.p) and np.isnan(none.matched) and none.draws == 0
    assert none.reason == "control too weak: it moves 0.07 of what the edit does"
    assert ranked([], []).reason == NO_CONTROL


def test_the_worst_question_has_the_weakest_evidence_of_any() -> None:
    table: Any = cells()
    table = table[table.operation == "steer"].assign(question=table.recipient, setting="main")
    row = worst(rates(table, ["setting", "question"])).loc["main"]
    assert (row.value, row.matched, row["rank"], row.p) == (1.0, 1.0, 2, 1.0)
