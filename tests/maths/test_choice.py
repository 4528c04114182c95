"""Which features get a row: total effects by one backward sweep, and the influence of those that are left out."""

import numpy as np
import pytest
from scipy.linalg import solve_triangular
from tests.maths.maths_cases import TOLERANCE, Case, config, dense, key_of, read_targets, rows_of

from vlmscope.attribution.adjoint import Adjoint, total_effects
from vlmscope.attribution.influence import influence, logit_weights, prune
from vlmscope.attribution.targets import choose_logits, feature_target
from vlmscope.attribution.trace import attribute
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import FeatureId

CHOICES = ("influence", "total_effect")


def by_substitution(graph: AttributionGraph) -> tuple[np.ndarray, np.ndarray]:
    """Total effects of features on the ends, times the activations, by forward substitution in the whole graph; and
    the sums of |edges| of the ends.
    """
    features, ends = graph.nodes.of(NodeKind.FEATURE), graph.nodes.ends()
    matrix, activation = dense(graph), graph.nodes.activation[features]
    jacobian = matrix[:, features] / activation
    # A column each feature: its own change and the response of all others, (I - J)^-1.
    changed = solve_triangular(-jacobian[features], np.eye(len(features)), lower=True, unit_diagonal=True)
    return jacobian[ends] @ changed * activation, np.abs(matrix[ends]).sum(1)


def of_features(case: Case, graph: AttributionGraph, rows: np.ndarray) -> np.ndarray:
    """The columns of the graph's features, of rows over all columns."""
    columns = Adjoint(case.replacement).columns
    return rows[:, columns.all_features()[: len(graph.nodes.of(NodeKind.FEATURE))]]


def test_one_backward_sweep_gives_total_effects(case: Case) -> None:
    targets = choose_logits(case.replacement, 1.0, 5)
    found = of_features(case, case.graph, total_effects(Adjoint(case.replacement), targets).numpy())
    expected, scale = by_substitution(case.graph)
    direct = dense(case.graph)[np.ix_(case.graph.nodes.ends(), case.graph.nodes.of(NodeKind.FEATURE))]
    assert np.abs(found - expected).max() <= TOLERANCE * max(scale.max(), np.abs(expected).max())
    assert np.abs(expected - direct).max() > 1e-3 * np.abs(direct).max()


def test_total_effects_move_the_replacement_model(one_case: Case) -> None:
    graph, replacement = one_case.graph, one_case.replacement
    targets = choose_logits(replacement, 1.0, 5)
    found = of_features(one_case, graph, total_effects(Adjoint(replacement), targets).numpy())
    ends = np.searchsorted(rows_of(graph), graph.nodes.ends())
    for number, node in list(enumerate(graph.nodes.of(NodeKind.FEATURE)))[::17]:
        moved = replacement.total({key_of(graph, node): 0.5 * float(graph.nodes.activation[node])})
        assert (
            np.abs(read_targets(graph, moved)[ends] - 0.5 * found[:, number]).max() <= TOLERANCE * np.abs(found).max()
        )


def test_total_effects_on_a_feature_and_on_some_targets(one_case: Case) -> None:
    replacement, top = one_case.replacement, one_case.replacement.n_layers - 1
    target = feature_target(replacement, FeatureId(top, int(replacement.features[top].index[-1])))
    graph = attribute(replacement, config(), one_case.vlm.tokenizer, targets=target)
    found = of_features(one_case, graph, total_effects(Adjoint(replacement), target).numpy())
    expected, scale = by_substitution(graph)
    assert np.abs(found - expected).max() <= TOLERANCE * max(scale.max(), np.abs(expected).max())
    logits, adjoint = choose_logits(replacement, 1.0, 5), Adjoint(replacement)
    whole, some = total_effects(adjoint, logits), total_effects(adjoint, logits, slice(2, 4))
    np.testing.assert_allclose(some, whole[2:4], rtol=0, atol=1e-12 * float(whole.abs().max()))


def without_rows(graph: AttributionGraph, nodes: np.ndarray) -> np.ndarray:
    """Influence in the whole graph when some nodes hand nothing down, `[N]`."""
    absolute = np.abs(dense(graph))
    share = absolute / np.maximum(absolute.sum(1, keepdims=True), 1e-300)
    share[nodes] = 0.0
    weights = logit_weights(graph)
    return np.linalg.solve((np.eye(len(share)) - share).T, weights) - weights


@pytest.mark.parametrize("choice", CHOICES)
def test_influence_of_what_is_left_out_is_that_of_the_whole_graph(one_case: Case, choice: str) -> None:
    cut = attribute(one_case.replacement, config(max_nodes=40, update_every=8, choice=choice), one_case.vlm.tokenizer)
    whole, features = one_case.graph, one_case.graph.nodes.of(NodeKind.FEATURE)
    kept = {key_of(cut, node) for node in cut.nodes.of(NodeKind.FEATURE)}
    left_out = np.array([node for node in features if key_of(whole, node) not in kept])
    assert len(kept) == 40 and len(left_out) == len(features) - 40
    expected, found = without_rows(whole, left_out), influence(cut, logit_weights(cut)).nodes
    mass = found[cut.nodes.of(NodeKind.LEFT_OUT)].sum()
    assert mass > 0 and mass == pytest.approx(expected[left_out].sum(), rel=1e-9)
    ending = ~np.isin(whole.nodes.kind, (NodeKind.FEATURE, NodeKind.LOGIT))
    share = expected[left_out].sum() / (expected[left_out].sum() + expected[ending].sum())
    assert prune(cut).scores.left_out_share == pytest.approx(share, rel=1e-9)


def test_total_effect_keeps_the_features_of_the_largest_effects(one_case: Case) -> None:
    graph = one_case.graph
    cut = attribute(one_case.replacement, config(max_nodes=30, choice="total_effect"), one_case.vlm.tokenizer)
    effects, scale = by_substitution(graph)
    scores = (graph.end_weights / scale) @ np.abs(effects)
    best = graph.nodes.of(NodeKind.FEATURE)[np.argsort(-scores)[:30]]
    assert {key_of(cut, n) for n in cut.nodes.of(NodeKind.FEATURE)} == {key_of(graph, n) for n in best}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_does_not_depend_on_batches(one_case: Case, choice: str) -> None:
    graphs = [
        attribute(
            one_case.replacement,
            config(max_nodes=50, update_every=9, choice=choice, batch_size=size),
            one_case.vlm.tokenizer,
        )
        for size in (1, 4, 64)
    ]
    for other in graphs[1:]:
        np.testing.assert_array_equal(other.nodes.index, graphs[0].nodes.index)
        np.testing.assert_array_equal(other.indices, graphs[0].indices)
