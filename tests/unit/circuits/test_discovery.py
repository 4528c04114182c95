"""Discovery: circuits of nodes and of edges are exact at both ends, controls are alike, supernodes get names."""

import numpy as np
import pytest
import torch

from vlmscope.activations import mlp_inputs
from vlmscope.circuits.discovery.edges import edge_table, pair_edges, run_edges
from vlmscope.circuits.discovery.nodes import (
    REST,
    Kind,
    Nodes,
    changing_nodes,
    eap_ig,
    measure,
)
from vlmscope.circuits.discovery.search import Runner, circuit, matched_circuit
from vlmscope.circuits.pairs import pair_effects, pair_subject
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

WIDTH = 24


@pytest.fixture(autouse=True)
def exact():
    with exact_float64():
        yield


@pytest.fixture(scope="module", params=["gemma3", "qwen3_vl"])
def bench(request: pytest.FixtureRequest):
    """(runner, subject): three pairs of pictures, with cross-layer transcoders or DeepStack and skip connections."""
    with exact_float64(), torch.no_grad():
        vlm = tiny_vlm(request.param, 5, dtype=torch.float64)
        shape, cross_layer = (vlm.adapter.n_layers, vlm.adapter.d_model, WIDTH, 5), request.param == "gemma3"
        kind = {"skip": not cross_layer, "cross_layer": cross_layer}
        scope = Scope(vlm, random_set(*shape, seed=6, dtype=torch.float64, **kind).requires_grad_(False))
        inputs = [vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in range(6)]
        first, second = (torch.tensor([i, i + 1, i + 2]) for i in (3, 7))
        subject = pair_subject(scope, "name", inputs[:3], inputs[3:], first, second, 2, answerable=False)
        measured = measure(scope, subject)
        return Runner(scope, measured, changing_nodes(measured, scope.transcoders)), subject


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
    ends = [mlp_inputs(runner.scope.adapter, batch, [1])[1] for batch in (subject.batch, subject.other)]
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
    effects = pair_effects(runner.scope, subject, 2)
    for row in np.flatnonzero(runner.nodes.is_feature)[::7]:
        role = effects.roles.index(runner.nodes.roles[runner.nodes.role[row]])
        layer, index = runner.nodes.feature(row)
        assert scores[row] == pytest.approx(float(effects.effect[layer][role, index]), abs=1e-9)


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


def candidates(count: int) -> Nodes:
    """An embedding and `count` features, half of them of each of two layers, at one role."""
    keys = [(int(Kind.FEATURE), i * 2 // count, 0, i) for i in range(count)]
    return Nodes.from_keys(("image",), [(int(Kind.EMBEDDING), -1, 0, -1), *keys])


def test_a_matched_circuit_is_as_large_and_shares_no_feature() -> None:
    nodes, members = candidates(20), np.arange(9)
    for seed in range(5):
        drawn = matched_circuit(nodes, members, np.ones(21), seed)
        assert len(set(drawn.tolist())) == len(members)
        assert set(drawn.tolist()) & set(members.tolist()) == {0}  # an embedding has no other like it
