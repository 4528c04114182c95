"""Queries on tables of trials: means over cells and p-values corrected over all of them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from vlmscope.metrics.rates import CELL, bootstrap_rate, cell_means, measured

# Hits of 8 cases under the trial and under its control. One-sided exact paired tests: 8 to 0 gives 2**-8.
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


def test_all_cells_and_operations_are_corrected_together() -> None:
    """Two of four p-values are 1 / 256: q = 4 / 256 / 2. Of steering alone, one of two, it would be the same twice."""
    found = measured(cells(), ["operation", *CELL], {"steer": "hit", "patch": "hit"})
    assert list(found.index) == list(CELLS)
    np.testing.assert_allclose(found.p.iloc[[0, 2]], 2.0**-8)
    np.testing.assert_allclose(found.q, [2.0**-7, 1.0, 2.0**-7, 1.0])


def test_means_count_each_cell_once_and_draw_pairs_of_concepts() -> None:
    table: Any = cells()
    table = table[~((table.donor == "c") & (table.case > 5))]  # 4 of 6: its mean still weighs as much as the others'
    means = cell_means(measured(table, ["operation", *CELL], {}), ["operation"])
    steer, patch = means.loc["steer"], means.loc["patch"]
    assert (steer.value, steer.matched, steer.lowest, steer.cases) == (1.0, 0.5, 1.0, 2)
    assert patch.value == pytest.approx((1 + 4 / 6) / 2) and patch.lowest == pytest.approx(4 / 6)
    assert (steer.significant, patch.significant) == (0.5, 0.5)
    # a given b and b given a are one pair.
    assert steer.ci_low == bootstrap_rate(np.array([1.0, 1.0]), groups=["a-b", "a-b"]).ci_low
    assert patch.ci_low == bootstrap_rate(np.array([1.0, 4 / 6]), groups=["a-b", "a-c"]).ci_low
