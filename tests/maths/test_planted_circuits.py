"""Discovery finds circuits that were planted, and chance is chance."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from planted import Planted, planted

from vlmscope.attribution.config import AttributionConfig
from vlmscope.circuits.config import DiscoveryConfig
from vlmscope.circuits.discovery.discover import discover
from vlmscope.circuits.discovery.edges import EdgeTable, PairEdges, edge_table, pair_edges, run_edges
from vlmscope.circuits.discovery.nodes import (
    GraphScores,
    Nodes,
    Sides,
    activation_change,
    changing_nodes,
    eap_ig,
    graph_scores,
    measure,
    order_of,
)
from vlmscope.circuits.discovery.search import Runner, greedy_order, prune_members, smallest
from vlmscope.circuits.operations import Carry
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.interventions.edits import by_layer
from vlmscope.interventions.trials import Cases, Setting, Trial, run_trials
from vlmscope.metrics.prediction import auc
from vlmscope.models.base import exact_float64

FOUND = 0.95


@dataclass
class Case:
    planted: Planted
    sides: Sides
    nodes: Nodes
    truth: np.ndarray
    scores: dict[str, np.ndarray]
    graphs: GraphScores
    pairs: list[PairEdges]
    edges: EdgeTable

    @property
    def runner(self) -> Runner:
        return Runner(self.planted.scope, self.sides, self.nodes)

    @property
    def true_edges(self) -> np.ndarray:
        """[E] bool."""
        known = self.planted.true_edges(self.nodes)
        names = zip(self.edges.source.tolist(), self.edges.target.tolist(), strict=True)
        return np.array([pair in known for pair in names])


@pytest.fixture(scope="module", params=range(4))
def case(request: pytest.FixtureRequest) -> Case:
    with exact_float64(), torch.no_grad():
        made = planted(request.param)
        scope = made.scope
        sides = measure(scope, made.subject)
        nodes = changing_nodes(sides, scope.transcoders)
        graphs = graph_scores(scope, made.subject, nodes, 1, AttributionConfig())
        order = greedy_order(Runner(scope, sides, nodes))
        by_rank = np.empty(len(nodes))
        by_rank[order] = -np.arange(len(nodes))
        scores = {
            "eap_ig": eap_ig(scope, sides, nodes, 5).mean(0),
            "graph": graphs.nodes.mean(0),
            "greedy": by_rank,
            "activation": activation_change(scope.transcoders, sides, nodes),
        }
        pairs = pair_edges(scope, sides, nodes, np.flatnonzero(nodes.is_feature), 1, 5)
    return Case(made, sides, nodes, made.truth(nodes), scores, graphs, pairs, edge_table(pairs))


@pytest.fixture(autouse=True)
def exact():
    with exact_float64():
        yield


def size(case: Case, method: str) -> np.ndarray:
    """What is ranked by: |score|, but for the ranks of the greedy search, whose best is 0."""
    return case.scores[method] if method == "greedy" else np.abs(case.scores[method])


@pytest.mark.parametrize("method", ["eap_ig", "graph", "greedy"])
def test_nodes_are_found(case: Case, method: str) -> None:
    assert case.truth.sum() == 8
    assert (~case.truth).sum() > 40
    assert auc(size(case, method), case.truth) >= FOUND


def test_activation_alone_finds_distractors(case: Case) -> None:
    """What moves most is not what matters: the planted distractors would win."""
    assert auc(case.scores["activation"], case.truth) < 0.5


def test_edges_are_found(case: Case) -> None:
    truth = case.true_edges
    assert truth.sum() == 10
    by_graph = np.array(
        [case.graphs.edges.get(pair, 0.0) for pair in zip(case.edges.source, case.edges.target, strict=True)]
    )
    assert auc(np.abs(case.edges.score.mean(0)), truth) >= FOUND
    assert auc(by_graph, truth) >= FOUND


@pytest.mark.parametrize("method", ["eap_ig", "graph", "greedy"])
def test_shuffled_truth_is_chance(case: Case, method: str) -> None:
    rng = generator(0, "shuffle")
    shuffled = [auc(size(case, method), rng.permutation(case.truth)) for _ in range(200)]
    assert np.mean(shuffled) == pytest.approx(0.5, abs=0.04)
    edges = [auc(np.abs(case.edges.score.mean(0)), rng.permutation(case.true_edges)) for _ in range(50)]
    assert np.mean(edges) == pytest.approx(0.5, abs=0.06)


def test_scores_at_the_wrong_role_fail(case: Case) -> None:
    """The same features at other roles are active and do nothing: scores that mix roles up are no longer found."""
    nodes = case.nodes
    rows = nodes.rows()
    moved = np.zeros(len(nodes))
    for (kind, layer, role, index), row in rows.items():
        other = rows.get((kind, layer, (role + 1) % len(nodes.roles), index))
        moved[row] = 0.0 if other is None else abs(case.scores["eap_ig"][other])
    assert auc(moved, case.truth) < FOUND - 0.2


def test_signs_say_what_helps(case: Case) -> None:
    signs = {name: np.sign(case.scores["eap_ig"][case.planted.node(case.nodes, name)]) for name in ("A", "B", "C", "I")}
    assert signs == {"A": 1, "B": 1, "C": 1, "I": -1}
    assert size(case, "eap_ig")[~case.truth].max() < 0.05 * size(case, "eap_ig")[case.truth].min()


def test_the_smallest_circuit_is_the_planted_one(case: Case) -> None:
    runner = case.runner
    count = smallest(runner, order_of(case.scores["eap_ig"]), 0.9)
    members, losses = prune_members(runner, order_of(case.scores["eap_ig"])[:count], 0.9, 20, 1e-3)
    needed = set(np.flatnonzero(case.truth).tolist()) - {case.planted.node(case.nodes, "I")}
    assert set(members.tolist()) == needed  # the inhibitor works against the answer: nothing is lost without it
    assert min(losses[node] for node in needed) > 0.1
    # Distractors share norms with what they stand beside, so leaving them out is not quite free.
    assert runner.share(np.flatnonzero(case.truth)) == pytest.approx(1.0, abs=0.1)
    assert runner.share(np.flatnonzero(~case.truth)) == pytest.approx(0.0, abs=0.1)


def test_circuits_of_edges_are_exact_at_both_ends_and_need_the_planted_edges(case: Case) -> None:
    clean, corrupt = case.pairs[0].clean, case.pairs[0].corrupt
    scores = np.abs(case.edges.score.mean(0))
    every = list(zip(case.edges.source.tolist(), case.edges.target.tolist(), strict=True))
    rest = {pair for pair in every if pair[0] < -1}
    planted_edges = case.planted.true_edges(case.nodes)
    cut = planted_edges - {(case.planted.node(case.nodes, "A"), case.planted.node(case.nodes, "B"))}
    whole, none, found, less, all_listed = run_edges(
        case.pairs, [None, set(), planted_edges | rest, cut | rest, set(every)]
    )[:, 0]
    assert whole == pytest.approx(clean, abs=1e-9)
    assert none == pytest.approx(corrupt, abs=1e-9)
    assert all_listed == pytest.approx(clean, abs=1e-9)
    assert (found - corrupt) / (clean - corrupt) == pytest.approx(1.0, abs=0.02)
    assert (less - corrupt) / (clean - corrupt) < 0.8
    assert scores.max() > 0


def test_discovery_puts_it_all_together(case: Case) -> None:
    """One call: the planted circuit, faithful on test pairs, beside matched circuits that keep less."""
    made = case.planted
    settings = DiscoveryConfig(
        keep=0.9, methods=["eap_ig", "random"], modes=["free"], graphs=1, edge_pairs=1, draws=2, minimality=12,
        resamples=4,
    )  # fmt: skip
    scope = made.scope
    found = discover(scope, made.subject, made.subject, settings)
    needed = set(np.flatnonzero(case.truth).tolist()) - {made.node(case.nodes, "I")}
    assert set(found.circuit.members.tolist()) == needed
    kept, without = found.circuit.test["free"], found.circuit.ablated["free"]
    assert kept.value >= 0.9
    assert kept.control is not None
    assert kept.control < 0.3
    assert without.value < 0.1
    assert without.control is not None
    assert without.control > 0.8
    assert found.curves["free"]["eap_ig"].cmd.value < found.curves["free"]["random"].cmd.value
    assert found.stability.jaccard["eap_ig"] == 1.0  # all pairs are alike
    assert found.edges is not None
    assert found.edges.curves["eap_ig"].cmd.value < found.edges.curves["random"].cmd.value
    assert {m.feature for m in found.features()} == {found.nodes.feature(row) for row in needed if row > 0}
    assert found.to_circuit().size(*found.to_circuit().supernodes) == len(needed) - 1
    with pytest.raises(UserError, match="nothing to keep"):
        swapped = replace(made.subject, tokens=made.subject.other_tokens, other_tokens=made.subject.tokens)
        discover(scope, swapped, made.subject, settings)


def test_matched_controls_of_a_planted_circuit_change_as_much_and_recover_nothing(case: Case) -> None:
    """Carrying the circuit gives the counterfactual's answers; distractors that read the same do not."""
    scope, pairs = case.planted.scope, case.planted.subject
    tokens, other, ids = pairs.tokens, pairs.other_tokens, tuple("abc")
    cases = Cases("test", "x", pairs.batch, pairs.base, tokens, other, ids, pairs.other, pairs.other_logits)
    features = [FeatureId(layer, index) for layer, _, index in case.planted.features.values()]
    do = Carry(by_layer(scope.transcoders, features))
    with torch.no_grad():
        table = run_trials(scope, [Trial("carry", do, [cases], [Setting(matched=20)])])
    done, drawn = table[table.control == ""], table[table.control == "matched"]
    assert done.recovered.to_numpy() == pytest.approx(1.0, abs=1e-3)
    assert len(drawn) == 3 * 20 and not drawn.weak.any()
    assert drawn.recovered.abs().max() < 0.1
