"""Tuning curves, their shapes, and correlations that hold another quantity fixed."""

import numpy as np
import pytest
from scipy import stats

from vlmscope.metrics.decoding import (
    accuracy_across,
    curve_kinds,
    held_out_tuning,
    level_p,
    partial_correlation,
    rank_correlation,
    tuning_curves,
)


@pytest.fixture(scope="module")
def cases() -> tuple[np.ndarray, np.ndarray]:
    """Activations [600, 5] and counts: up, down, peak at 3, noise, constant."""
    rng = np.random.default_rng(0)
    counts = np.tile(np.arange(1, 7), 100)
    values = np.stack([counts, 7 - counts, 3 - np.abs(counts - 3), 0 * counts, 0 * counts], 1).astype(float)
    values[:, :4] += rng.normal(0, 0.5, (600, 4))
    return values, counts


def test_curves_are_means_and_have_the_shapes_that_were_put_in(cases: tuple[np.ndarray, np.ndarray]) -> None:
    values, counts = cases
    curves = tuning_curves(values, counts)
    assert curves.shape == (6, 5)
    np.testing.assert_allclose(curves[2], values[counts == 3].mean(0))
    kinds = curve_kinds(curves)
    assert list(kinds[:3]) == ["up", "down", "peak"]
    assert kinds[4] == "other"


def test_p_is_that_of_scipy_and_says_nothing_of_what_never_varies(cases: tuple[np.ndarray, np.ndarray]) -> None:
    values, counts = cases
    p = level_p(values, counts)
    expected = [stats.f_oneway(*(values[counts == c, f] for c in range(1, 7))).pvalue for f in range(4)]
    np.testing.assert_allclose(p[:4], expected, rtol=1e-6)
    assert p[4] == 1.0
    assert p[3] > 0.001


def test_rank_correlation_is_spearmans(cases: tuple[np.ndarray, np.ndarray]) -> None:
    values, counts = cases
    rho = rank_correlation(values, counts)
    expected = [stats.spearmanr(values[:, f], counts)[0] for f in range(4)]
    np.testing.assert_allclose(rho[:4], np.array(expected, dtype=float))
    assert rho[4] == 0.0


def test_a_feature_of_area_is_none_of_count() -> None:
    rng = np.random.default_rng(1)
    count = rng.integers(1, 7, 4000).astype(float)
    area = count + rng.normal(0, 1, 4000)
    values = np.stack([area + rng.normal(0, 0.3, 4000), count + rng.normal(0, 0.3, 4000)], 1)
    between = float(rank_correlation(count[:, None], area)[0])
    of_count = partial_correlation(rank_correlation(values, count), rank_correlation(values, area), between)
    assert abs(of_count[0]) < 0.1
    assert of_count[1] > 0.8


def test_tuning_holds_on_other_cases_and_not_at_equal_area_where_area_is_all_that_counts(
    cases: tuple[np.ndarray, np.ndarray],
) -> None:
    values, counts = cases
    rng = np.random.default_rng(1)
    area = counts + rng.normal(0, 1, len(counts))
    values = np.column_stack([values, area + rng.normal(0, 0.1, len(counts))])
    names = {0: np.array(["up", "down", "peak 3", "", "", "up"], dtype=object)}
    found = held_out_tuning(names, {0: values}, counts, area)
    assert {name: rate.value for name, rate in found.items() if name.endswith("holds")} == {
        "up/holds": 1.0,
        "down/holds": 1.0,
        "peak/holds": 1.0,
    }
    rho = [abs(stats.spearmanr(values[:, f], counts)[0]) for f in (0, 1, 5)]
    assert found["monotone/rho"].value == pytest.approx(np.mean(rho))
    lines = held_out_tuning({0: names[0][[3, 3, 3, 3, 3, 5]]}, {0: values}, counts, area)
    assert abs(lines["monotone/rho_at_equal_area"].value) < 0.15 < lines["monotone/rho"].value


def test_a_readout_of_one_group_is_tested_on_its_own_and_on_the_others() -> None:
    levels, groups = np.tile(np.arange(3), 40), np.repeat(np.arange(2), 60)
    codes = np.zeros((120, 6))
    codes[np.arange(120), levels + 3 * groups] = 1  # each group has features of its own
    same, others = accuracy_across(codes, levels, groups, codes, levels, groups)
    assert same.all() and len(same) == 120
    assert others.mean() == pytest.approx(1 / 3)
