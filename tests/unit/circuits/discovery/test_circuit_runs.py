"""Running circuits of nodes and of edges: exact at both ends, complete, and alike where they must be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmscope.activations.capture import mlp_inputs
from vlmscope.circuits.discovery.edges import REST, edge_table, run_edges
from vlmscope.circuits.discovery.nodes import Kind, opposite, read
from vlmscope.circuits.discovery.pair_edges import pair_edges
from vlmscope.circuits.discovery.run import circuit, mask_effects
from vlmscope.circuits.discovery.scores import activation_change, eap_ig, order_of
from vlmscope.circuits.discovery.search import Runner
from vlmscope.circuits.discovery.sides import CircuitSubject, changing_nodes, measure
from vlmscope.circuits.pairs import pair_effects, pair_subject
from vlmscope.core.errors import UserError
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
    whole, none = (runner.run(runner.whole(value), mode) for value in (True, False))
    assert np.abs(whole - runner.sides.clean.gaps).max() < 1e-9
    if mode == "free":
        assert np.abs(none - runner.sides.corrupt.gaps).max() < 1e-9
    listed = runner.run(runner.kept(np.ones(len(runner.nodes), bool)), mode)
    assert np.abs(listed - whole).max() < 1e-9  # what is no node differs on neither side


def test_a_circuit_and_its_complement_are_run_apart(bench) -> None:
    runner, _ = bench
    half = runner.kept(np.arange(len(runner.nodes)) % 2 == 0)
    one, other = runner.run(half), runner.run(opposite(half))
    assert np.abs(one - other).min() > 1e-9
    back = opposite(opposite(half))
    assert np.array_equal(runner.run(back), one)


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
    kept = runner.kept(np.ones(len(runner.nodes), bool))
    worth = read(runner.nodes, mask_effects(runner.scope, runner.sides, kept, 16))
    whole = (runner.sides.clean.gaps - runner.sides.corrupt.gaps).mean()
    # Supports change on the way, and the midpoint rule sees jumps of TopK only roughly.
    assert worth.sum() == pytest.approx(whole, abs=0.15 * np.abs(worth).sum())
    few = runner.kept(np.arange(4))
    found = read(runner.nodes, mask_effects(runner.scope, runner.sides, few, 3))
    assert (found[4:] == 0).all()


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
