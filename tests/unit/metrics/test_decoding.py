"""Facts, numbers and concepts are found in activations that hold them, and not in ones that do not."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from vlmscope.core.records import generator
from vlmscope.metrics.decoding import (
    Rule,
    accuracy_across,
    contrast,
    contrast_p,
    curve_kinds,
    explained_by,
    held_out_r2,
    held_out_tuning,
    level_p,
    linear_prediction,
    matching_p,
    mean_depth,
    partial_correlation,
    rank_correlation,
    shuffled,
    simplest,
    tuning_curves,
)
from vlmscope.metrics.rates import benjamini_hochberg

C, EACH, M = 4, 12, 60


def digits(split: str, n: int) -> np.ndarray:
    return generator(0, split).integers(0, 10, (n, 2))


def activations(split: str, codes: np.ndarray) -> np.ndarray:
    """Features for: the first digit, both digits, the sum, a pair, noise, nothing; and one that fires once."""
    rng = generator(1, split)
    first, second = codes.T
    columns = [first == 3, first - second, first + second == 12, (first == 3) & (second == 4)]
    noise = rng.standard_normal((len(codes), 1))
    table = np.concatenate([np.stack(columns, 1).astype(float), noise, np.zeros((len(codes), 2))], 1)
    table[:, :4] += 0.01 * rng.standard_normal((len(codes), 4))
    if split == "train":
        table[0, 6] = 1.0
    return table


def kinds_of(shuffled: bool) -> list[str]:
    train_codes, codes = digits("train", 3000), digits("test", 1000)
    train, test = activations("train", train_codes), activations("test", codes)
    known = generator(2).permutation(train_codes) if shuffled else train_codes

    def facts(found: np.ndarray) -> pd.DataFrame:
        first, second = found.T
        return pd.DataFrame({"first": first, "second": second, "sum": first + second, "pair": 10 * first + second})

    kinds = {"first": ["first"], "sum": ["sum"], "both": ["first", "second"], "pair": ["pair"]}
    return simplest(explained_by(kinds, train, facts(known), test, facts(codes)), least=0.3).tolist()


def test_each_feature_is_of_the_simplest_kind_that_explains_it() -> None:
    assert kinds_of(shuffled=False) == ["first", "both", "sum", "pair", "", "", ""]


def test_shuffled_facts_explain_nothing_not_even_a_feature_that_fires_once() -> None:
    assert kinds_of(shuffled=True) == [""] * 7


def test_a_fact_that_is_no_whole_number_has_a_slope() -> None:
    rng = generator(3, "slopes")
    seen, new = (pd.DataFrame({"size": rng.random(200), "planet": rng.integers(0, 3, 200)}) for _ in range(2))
    both, size = (np.stack([table["size"] * 2 + step * np.array([0.0, 5.0, 1.0])[table.planet] for step in (1, 0)], 1)
                  for table in (seen, new))  # fmt: skip
    kinds = {"size": ["size"], "planet": ["planet"], "size and planet": ["size", "planet"]}
    scores = explained_by(kinds, both, seen, size, new)
    assert simplest(scores, 0.3, share=0.999).tolist() == ["size and planet", "size"]
    np.testing.assert_allclose(scores["size and planet"], 1.0)


def test_linear_prediction_reads_what_is_there_and_nothing_of_shuffled_targets() -> None:
    rng = generator(2, "targets")
    x = rng.standard_normal((300, 40))
    targets = np.stack([2 * x[:, 3] - x[:, 7] + 5, rng.standard_normal(300)], 1)
    predicted = linear_prediction(x[:200], targets[:200], x[200:])
    r2 = held_out_r2(targets[200:], predicted)
    assert r2[0] > 0.95 and r2[1] < 0.1
    silent = linear_prediction(np.zeros((4, 3)), np.arange(4.0)[:, None], np.ones((2, 3)))
    np.testing.assert_allclose(silent, 1.5)  # without a feature that varies: the mean


def test_the_depth_is_the_mean_of_the_layers_by_what_they_add() -> None:
    added = np.array([0.1, 0.0, 0.5, 0.2])
    curve = np.cumsum(added)[None]
    assert mean_depth(curve) == pytest.approx((np.arange(4) * added).sum() / added.sum())
    assert mean_depth(np.array([[0, 0, 0, 2.0]])) == 3
    assert mean_depth(np.array([[2.0, 2, 2, 2]])) == 0


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


@pytest.fixture
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Features 0 to 3 prefer concept 0 to 3; 4 fires everywhere; 5 on one case of concept 1; the rest at random."""
    rng, labels = generator(0, "selective"), np.repeat(np.arange(C), EACH)
    values = rng.random((C * EACH, M)).astype(np.float32) * (rng.random((C * EACH, M)) < 0.5)
    values[:, :4] = 0.1 * values[:, :4] + (labels[:, None] == np.arange(C))
    values[:, 4], values[:, 5] = 1.0, 0.0
    values[EACH, 5] = 9.0
    order = rng.permutation(len(labels))
    return values[order], labels[order]


def test_contrast_equals_a_plain_loop(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = labelled
    found = contrast(values, labels, C)
    for concept in range(C):
        mine, others = values[labels == concept], values[labels != concept]
        np.testing.assert_allclose(found.mean[concept], mine.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found.rest[concept], others.mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.rate[concept], (mine > 0).mean(0))


def test_the_rule_wants_a_contrast_and_many_cases(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    chosen = contrast(*labelled, C).selective(Rule())
    assert np.array_equal(chosen[:, :4], np.eye(C, dtype=bool))
    assert not chosen[:, 4:6].any()
    assert contrast(*labelled, C).selective(Rule(fires=0.05))[1, 5]
    assert contrast(*labelled, C).selective(Rule(ratio=1.0))[:, 4].all()
    silent = contrast(np.zeros((8, 1)), np.arange(8) % 2, 2)
    assert not silent.selective(Rule(fires=0.0)).any()


def test_shuffled_labels_lose_it_and_p_values_tell(labelled: tuple[np.ndarray, np.ndarray]) -> None:
    values, labels = labelled
    null = list(shuffled(values, labels, C, 199, seed=3))
    assert np.mean([one.selective(Rule())[:, :4].sum() for one in null]) < 2  # of 16, where 4 are true
    q = benjamini_hochberg(contrast_p(contrast(values, labels, C), iter(null)))
    assert (q[np.arange(C), np.arange(C)] < 0.5).all()
    p = contrast_p(contrast(values, labels, C), iter(null))
    assert (p[np.arange(C), np.arange(C)] == 1 / 200).all()
    assert (p[:, 4] == 1).all()  # equal under every order
    assert 0.02 < (p[:, 6:] <= 0.05).mean() < 0.1


def test_matching_goes_through_all_orders() -> None:
    table = generator(1, "matching").integers(0, 9, (5, 5))
    table[np.arange(5), np.arange(5)] += 4
    sums = np.array([sum(table[i, j] for i, j in enumerate(order)) for order in permutations(range(5))])
    mean, p = matching_p(table)
    assert mean == pytest.approx(sums.mean()) == pytest.approx(table.sum() / 5)
    assert p == pytest.approx((sums >= table.trace()).mean())
    assert matching_p(np.ones((4, 4)))[1] == 1.0
    big = np.eye(10) * 5
    assert matching_p(big)[1] == pytest.approx(1 / 10_001)
