"""Discovery: circuits of nodes and of edges are exact at both ends, controls are alike, supernodes get names."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from vlmscope.activations.capture import mlp_inputs
from vlmscope.circuits.build import spread_answers
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.discovery.discover import NAMED, by_answer
from vlmscope.circuits.discovery.edges import edge_table, pair_edges, run_edges
from vlmscope.circuits.discovery.nodes import (
    REST,
    CircuitSubject,
    Kind,
    Nodes,
    activation_change,
    changing_nodes,
    eap_ig,
    measure,
    order_of,
)
from vlmscope.circuits.discovery.search import Runner, circuit, matched_circuit, matched_circuits
from vlmscope.circuits.pairs import pair_effects, pair_subject
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitFeature, Supernode
from vlmscope.core.records import FeatureId, Positions
from vlmscope.data.inputs import Pair, Side
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

WIDTH = 24


@pytest.fixture(autouse=True)
def exact():
    with exact_float64():
        yield


@pytest.fixture(scope="module", params=["gemma3", "cross_layer", "qwen3_vl"])
def bench(request: pytest.FixtureRequest):
    """(runner, subject): three pairs of pictures of a random model."""
    with exact_float64(), torch.no_grad():
        family = "qwen3_vl" if request.param == "qwen3_vl" else "gemma3"
        vlm = tiny_vlm(family, 5, dtype=torch.float64)
        adapter = vlm.adapter
        transcoders = random_set(
            adapter.n_layers, adapter.d_model, WIDTH, 5, seed=6, dtype=torch.float64,
            skip=request.param == "qwen3_vl", cross_layer=request.param == "cross_layer",
        ).requires_grad_(False)  # fmt: skip
        sides = [
            [vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in some] for some in ((0, 1, 2), (3, 4, 5))
        ]
        first, second = (torch.tensor([i, i + 1, i + 2]) for i in (3, 7))
        pairs = pair_subject(Scope(vlm, transcoders), "name", sides[0], sides[1], first, second, 2, answerable=False)
        subject = CircuitSubject(pairs, *sides)
        measured = measure(Scope(vlm, transcoders), subject)
        nodes = changing_nodes(measured, transcoders)
    return Runner(Scope(vlm, transcoders), measured, nodes), subject


@pytest.mark.parametrize("mode", ["free", "frozen_attention"])
def test_everything_is_the_original_and_nothing_the_counterfactual(bench, mode: str) -> None:
    runner, _ = bench
    assert np.abs(runner.sides.clean.gaps - runner.sides.corrupt.gaps).min() > 1e-6
    nothing = np.empty(0, dtype=np.int64)
    whole, none = runner.run(runner.without(nothing), mode), runner.run(runner.kept(nothing), mode)
    assert np.abs(whole - runner.sides.clean.gaps).max() < 1e-9
    if mode == "free":
        assert np.abs(none - runner.sides.corrupt.gaps).max() < 1e-9
    listed = runner.run(runner.kept(np.ones(len(runner.nodes), bool)), mode)
    assert np.abs(listed - whole).max() < 1e-9  # what is no node differs on neither side


def test_a_circuit_and_its_complement_are_run_apart(bench) -> None:
    runner, _ = bench
    half = np.arange(len(runner.nodes)) % 2 == 0
    kept, left = runner.kept(half), runner.without(half)
    assert np.abs(runner.run(kept) - runner.run(left)).min() > 1e-9
    assert torch.equal(kept.embeddings, ~left.embeddings)
    for layer, mask in kept.features.items():
        assert torch.equal(mask, ~left.features[layer]) and torch.equal(kept.errors[layer], ~left.errors[layer])


def test_kept_features_are_live_and_others_are_the_counterfactuals(bench) -> None:
    runner, subject = bench
    chosen = runner.nodes.is_feature & (runner.nodes.layer == 0) & (runner.nodes.role == 0)
    kept = runner.kept(chosen | (runner.nodes.kind == Kind.EMBEDDING))
    seen: dict[int, torch.Tensor] = {}
    with torch.no_grad(), circuit(runner.scope, runner.sides, kept) as tensors:
        handle = runner.scope.adapter.mlp(1).register_forward_pre_hook(lambda _m, args: seen.__setitem__(1, args[0]))
        runner.scope.adapter.forward(tensors, use_cache=False)
        handle.remove()
    ends = [mlp_inputs(runner.scope.adapter, batch, [1])[1] for batch in (subject.pairs.batch, subject.pairs.other)]
    assert all(not torch.allclose(seen[1], end) for end in ends)


def test_worths_of_all_members_add_up_to_the_circuit(bench) -> None:
    runner, _ = bench
    worth = runner.effects(np.arange(len(runner.nodes)), 16)
    whole = (runner.sides.clean.gaps - runner.sides.corrupt.gaps).mean()
    # Supports change on the way, and the midpoint rule sees jumps of TopK only roughly.
    assert worth.sum() == pytest.approx(whole, abs=0.15 * np.abs(worth).sum())
    assert (runner.effects(np.arange(4))[4:] == 0).all()


def test_eap_ig_of_features_is_that_of_pair_effects(bench) -> None:
    runner, subject = bench
    scores = eap_ig(runner.scope, runner.sides, runner.nodes, 2).mean(0)
    effects = pair_effects(runner.scope, subject.pairs, 2)
    for row in np.flatnonzero(runner.nodes.is_feature)[::7]:
        role = effects.roles.index(runner.nodes.roles[runner.nodes.role[row]])
        layer, index = runner.nodes.feature(row)
        assert scores[row] == pytest.approx(float(effects.effect[layer][role, index]), abs=1e-9)


def test_activation_change_is_what_is_written(bench) -> None:
    runner, _ = bench
    change = activation_change(runner.scope.transcoders, runner.sides, runner.nodes)
    assert (change > 0).all()
    assert order_of(np.array([1.0, -3.0, 2.0, 3.0])).tolist() == [1, 3, 2, 0]


def test_edges_into_a_target_add_up_to_its_score(bench) -> None:
    runner, _ = bench
    nodes = runner.nodes
    targets = np.flatnonzero(nodes.is_feature)[::3]
    pairs = pair_edges(runner.scope, runner.sides, nodes, targets, 2, 2)
    table = edge_table(pairs)
    scores = eap_ig(runner.scope, runner.sides, nodes, 2)[:2]
    assert set(table.target.tolist()) <= {*targets.tolist(), -1}
    for target in set(table.target.tolist()) - {-1}:
        incoming = table.score[:, table.target == target].sum(1)
        assert incoming == pytest.approx(scores[:, target], abs=1e-8)
    assert (table.source == REST).any()
    every = set(zip(table.source.tolist(), table.target.tolist(), strict=True))
    whole, listed, none = run_edges(pairs, [None, every, set()])
    ends = [[getattr(pair, end) for pair in pairs] for end in ("clean", "corrupt")]
    assert whole == pytest.approx(ends[0], abs=1e-9)
    assert listed == pytest.approx(ends[0], abs=1e-9)
    assert none == pytest.approx(ends[1], abs=1e-9)


def test_mistakes_are_named(bench) -> None:
    _, subject = bench
    with pytest.raises(UserError, match="contrast is empty"):
        CircuitSubject(replace(subject.pairs, other_tokens=subject.pairs.tokens), subject.originals, subject.others)
    with pytest.raises(UserError, match="do not match"):
        CircuitSubject(subject.pairs, subject.originals[:2], subject.others)


def candidates(count: int) -> Nodes:
    """An embedding and `count` features, half of them of each of two layers, at one role."""
    keys = [(int(Kind.FEATURE), i * 2 // count, 0, i) for i in range(count)]
    return Nodes.of(("image",), [(int(Kind.EMBEDDING), -1, 0, -1), *keys])


def test_a_matched_circuit_is_as_large_and_shares_no_feature() -> None:
    nodes, members = candidates(20), np.arange(9)
    for seed in range(5):
        drawn = matched_circuit(nodes, members, np.ones(21), seed)
        assert len(set(drawn.tolist())) == len(members)
        assert set(drawn.tolist()) & set(members.tolist()) == {0}  # an embedding has no other like it


def test_seeds_share_no_draw() -> None:
    nodes, members, change = candidates(400), np.arange(9), np.ones(401)
    drawn = [matched_circuits(nodes, members, change, seed, 3) for seed in (0, 1, 2)]
    assert len({tuple(one.tolist()) for some in drawn for one in some}) == 9
    for draw, one in enumerate(drawn[0]):
        assert np.array_equal(one, matched_circuit(nodes, members, change, draw))


def test_a_circuit_of_most_features_has_no_matched_ones() -> None:
    members = np.arange(7)  # six features
    assert [len(one) for one in matched_circuits(candidates(12), members, np.ones(13), 0, 2)] == [7, 7]
    assert matched_circuits(candidates(11), members, np.ones(12), 0, 2) == []


def node(role: str, influences: list[float], layer: int) -> Supernode:
    members = [CircuitFeature(FeatureId(layer, i), role, 1.0, influence) for i, influence in enumerate(influences)]
    return Supernode(f"name_{role}", tuple(members), Positions((role,)), "discovery")


def of(*nodes: Supernode) -> Circuit:
    return Circuit({one.name: one for one in nodes}, {})


def names(found: Circuit) -> dict[str, list[int]]:
    return {name: [member.feature.index for member in one.features] for name, one in found.supernodes.items()}


def test_features_of_the_last_position_are_grouped_by_the_answer_that_they_write() -> None:
    words = {FeatureId(1, 0): "mars", FeatureId(1, 1): "dust", FeatureId(1, 2): "earth", FeatureId(1, 3): "mars"}
    found = by_answer(of(node("image", [1.0], 0), node("last", [1, 2, -9, 1], 1)), ["mars", "earth"], words)
    assert names(found) == {"picture": [0], "last position": [1], "earth": [2], "mars": [0, 3]}
    assert found.node("mars").chosen == "discovery, writes mars" and found.node("mars").positions == Positions(
        ("last",)
    )
    assert found.node("picture").chosen == "discovery"


def test_only_so_many_answers_get_a_supernode_and_names_of_surroundings_are_avoided() -> None:
    answers = [f"a{i}" for i in range(NAMED + 2)]
    words = {FeatureId(1, i): answer for i, answer in enumerate(answers)}
    found = by_answer(of(node("last", [float(i) for i in range(NAMED + 2)], 1)), answers, words)
    assert names(found)["last position"] == [0, 1] and len(found.supernodes) == NAMED + 1
    found = by_answer(
        of(node("last", [1.0, 1.0], 1)),
        ["picture", "errors"],
        {FeatureId(1, 0): "picture", FeatureId(1, 1): "errors"},
    )
    assert names(found) == {"writes picture": [0], "writes errors": [1]}


def test_pairs_of_different_answers_come_first() -> None:
    def pair(number: int, answer: str) -> Pair:
        image = Image.new("RGB", (2, 2))
        return Pair(str(number), "q", "planet", Side("what ?", (image,), answer), Side("what ?", (image,), "moon"))

    pairs = [pair(i, answer) for i, answer in enumerate(["mars", "mars", "earth", "mars", "venus"])]
    assert [one.id for one in spread_answers(pairs, 3)] == ["0", "2", "4"]
    assert [one.id for one in spread_answers(pairs, 9)] == ["0", "2", "4", "1", "3"]
