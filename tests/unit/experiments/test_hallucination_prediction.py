"""Areas under the curve against brute force; cross-validation by groups leaks nothing; indicators of a graph."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tests.random_graphs import random_graph

from vlmscope.attribution.influence import prune
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.tasks.experiment import own_analysis

experiment = own_analysis("hallucination_prediction")
auc, bootstrap_auc = experiment.auc, experiment.bootstrap_auc
group_folds, held_out_scores = experiment.group_folds, experiment.held_out_scores
graph_indicators = experiment.graph_indicators


def brute(scores: np.ndarray, wrong: np.ndarray, strata: np.ndarray | None = None) -> float:
    won, pairs = 0.0, 0
    for i in np.flatnonzero(wrong):
        for j in np.flatnonzero(~wrong):
            if strata is None or strata[i] == strata[j]:
                won += 1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
                pairs += 1
    return won / pairs


@pytest.mark.parametrize("levels", [3, 1000])  # few levels: many ties
def test_the_area_is_the_share_of_pairs_in_order(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, wrong = rng.integers(levels, size=60).astype(float), rng.random(60) < 0.3
    strata = rng.integers(4, size=60)
    assert auc(scores, wrong) == pytest.approx(brute(scores, wrong))
    assert auc(scores, wrong, strata) == pytest.approx(brute(scores, wrong, strata))
    assert auc(-scores, wrong) == pytest.approx(1 - auc(scores, wrong))


def test_folds_never_split_a_group_and_are_even() -> None:
    groups = np.random.default_rng(1).integers(30, size=200)
    folds = group_folds(groups, 5, seed=3)
    assert all(len(set(folds[groups == name])) == 1 for name in np.unique(groups))
    sizes = np.bincount([folds[groups == name][0] for name in np.unique(groups)])
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1
    assert len(set(group_folds(groups, None))) == len(np.unique(groups))
    assert not np.array_equal(folds, group_folds(groups, 5, seed=4))
    with pytest.raises(ValueError, match="one group alone"):
        group_folds(np.zeros(5), 3)


def test_cross_validation_by_groups_leaks_nothing() -> None:
    """Each group has a signature of its own and one outcome at random: learnt by heart, it says nothing of others."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 6)
    values = rng.normal(size=(60, 40))[groups] + 0.01 * rng.normal(size=(360, 40))
    wrong = rng.permutation(np.arange(60) % 2 == 0)[groups]
    grouped = held_out_scores(values, wrong, group_folds(groups, 6))
    leaking = held_out_scores(values, wrong, rng.integers(6, size=360))
    assert auc(leaking, wrong) > 0.9
    assert auc(grouped, wrong) < 0.65


def test_an_interval_is_that_of_areas_on_drawn_groups() -> None:
    """Against drawing groups one after another."""
    rng = np.random.default_rng(8)
    groups, strata, wrong = np.repeat(np.arange(25), 2), np.tile([0, 1], 25), rng.random(50) < 0.4
    scores = wrong + rng.normal(size=50)
    found = bootstrap_auc(scores, wrong, groups, strata)
    draws = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(groups == name) for name in rng.integers(25, size=25)])
        draws.append(auc(scores[rows], wrong[rows], strata[rows]))
    low, high = np.quantile(draws, (0.025, 0.975))
    assert found.value == pytest.approx(auc(scores, wrong, strata))
    assert (found.ci_low, found.ci_high) == pytest.approx((low, high), abs=0.02)


@pytest.fixture(scope="module")
def graph():
    plain = random_graph(4, 6, 18, 2, density=0.5, left_out=True, seed=3)
    return replace(plain, is_image=np.array([False, True, True, True, False, False]))


def test_indicators_are_what_they_say(graph) -> None:
    pruned = prune(graph)
    found, nodes = graph_indicators(pruned), graph.nodes
    flow = {i: pruned.influence[i] for i in nodes.of(NodeKind.FEATURE)}
    share = {i: value / sum(flow.values()) for i, value in flow.items()}
    assert found["entropy"] == pytest.approx(-sum(c * np.log(c) for c in share.values() if c > 0))
    assert found["top1"] == pytest.approx(max(share.values()))
    assert found["distance"] == pytest.approx(sum(c * (5 - nodes.position[i]) for i, c in share.items()))
    ends = sum(pruned.influence[nodes.of(k)].sum() for k in (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.BIAS,
                                                              NodeKind.LEFT_OUT))  # fmt: skip
    image = sum(pruned.influence[i] for i in nodes.of(NodeKind.TOKEN) if nodes.position[i] in (1, 2, 3))
    assert found["image_share"] == pytest.approx(image / ends) and found["image_share"] > 0
    assert found["image_share"] + found["text_share"] == pytest.approx(pruned.scores.token_share)
    assert (found["replacement"], found["error_share"]) == (pruned.scores.replacement, pruned.scores.error_share)
    assert found["nodes"] == pruned.n_nodes
    assert set(experiment.NAMES) == set(found)


def test_cases_without_anything_to_tell_apart_are_refused() -> None:
    cases = pd.DataFrame({"question": ["name", "name", "cover"], "wrong": [False, False, True]})
    with pytest.raises(UserError, match="no question has right and wrong answers"):
        experiment.check_errors(cases)
    settings = experiment.Settings({"planets": 0, "hands": 4}, [0.0, 0.6], 10, 50)
    with pytest.raises(UserError, match="analysis.scenes asks 1 question"):
        next(experiment.asked_cases(SimpleNamespace(analysis=settings, cfg=SimpleNamespace(seed=0))))
