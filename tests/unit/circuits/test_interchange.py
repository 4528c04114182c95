"""Interchange interventions do what they say, and effects are estimated as they are measured."""

from dataclasses import replace

import pytest
import torch
from tests.unit.circuits.subjects import carried, cases_of

from vlmscope.activations import mlp_inputs
from vlmscope.circuits.operations import Carry, all_features
from vlmscope.circuits.pairs import PairSubject, gap_gradients, pair_effects, pair_subject
from vlmscope.core.errors import UserError
from vlmscope.interventions.controls import matched_pools
from vlmscope.interventions.run import Norms, edit_changes, editing, generate_batch, run_edited
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this planet ?"
WIDTH = 24


@pytest.fixture(scope="module", params=["gemma3", "cross_layer", "skip"])
def bench(request: pytest.FixtureRequest):
    """(vlm, transcoders, subject): four pairs of pictures; the answers are what the random model says."""
    with exact_float64():
        vlm = tiny_vlm("gemma3", 5, dtype=torch.float64)
        adapter = vlm.adapter
        transcoders = random_set(
            adapter.n_layers,
            adapter.d_model,
            WIDTH,
            5,
            seed=6,
            dtype=torch.float64,
            cross_layer=request.param == "cross_layer",
            skip=request.param == "skip",
        ).requires_grad_(False)
        sides = [[vlm.prepare(PROMPT, [tiny_image(i)]) for i in some] for some in (range(4), range(4, 8))]
        logits = [
            torch.cat([adapter.forward(i.tensors, use_cache=False).logits[:, -1] for i in side]) for side in sides
        ]
        tokens = [found.argmax(-1) for found in logits]
        found = pair_subject(Scope(vlm, transcoders), "name", *sides, *tokens, 2)
    # A random model says the same of every picture: any other word serves as the answer that should follow.
    second = logits[0][:, : adapter.vocab_size].topk(2).indices[:, 1]
    return Scope(vlm, transcoders), replace(found, other_tokens=second)


@pytest.fixture(autouse=True)
def exact():
    with exact_float64():
        yield


def gaps(subject: PairSubject, logits: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(subject.size)
    return logits[rows, subject.other_tokens] - logits[rows, subject.tokens]


def test_carried_features_have_the_counterfactuals_activations(bench) -> None:
    scope, subject = bench
    plan = carried(scope, subject, all_features(scope.transcoders))
    inputs = mlp_inputs(scope.adapter, subject.other, scope.transcoders.layers)
    for layer, edit in plan.items():
        wanted = scope.transcoders[layer].encode(inputs[layer]).dense(WIDTH)
        assert torch.equal(edit.scale * 7.0 + edit.value, wanted)


@pytest.mark.parametrize("mode", ["direct", "frozen_attention", "free"])
def test_carrying_every_feature_needs_no_table_of_them(bench, mode: str) -> None:
    scope, subject = bench
    everything = all_features(scope.transcoders)
    for where in (None, torch.from_numpy(subject.batch.roles == "image")):
        dense, whole = (carried(scope, subject, features, where) for features in (everything, None))
        assert [len(edit.features) for edit in whole.values()] == [len(edit.features) for edit in dense.values()]
        for plans in ((dense, whole), *(({n: dense[n]}, {n: whole[n]}) for n in (1, 3))):
            expected, found = (run_edited(scope, subject.batch, plan, mode, subject.base) for plan in plans)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            if where is None and len(plans[0]) > 1:
                assert not torch.allclose(found, subject.base.logits, rtol=0, atol=1e-6)


def test_every_feature_is_carried_into_generated_tokens_and_by_random_directions(bench) -> None:
    scope, subject = bench
    inputs = [scope.vlm.prepare(PROMPT, [tiny_image(i)]) for i in range(4)]
    dense, whole = (carried(scope, subject, features) for features in (all_features(scope.transcoders), None))
    answers = [generate_batch(scope.adapter, inputs, 4, editing(scope, plan)) for plan in (dense, whole)]
    assert answers[0] == answers[1]
    for layer, edit in whole.items():
        x = mlp_inputs(scope.adapter, subject.batch, [layer])[layer][:, :1]
        length = subject.batch.length
        found, expected = (edit_changes(scope.transcoders[layer], x, e, length) for e in (edit, dense[layer]))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    norms: list[Norms] = [[], []]
    for plan, filled in zip((dense, whole), norms, strict=True):
        run_edited(scope, subject.batch, plan, norms=filled)
    torch.testing.assert_close(*norms, rtol=1e-9, atol=1e-9)
    # There are no others to draw a control from.
    every = Carry(all_features(scope.transcoders))
    with pytest.raises(UserError, match="no control can be drawn"):
        matched_pools(scope, every, cases_of(subject), 1.0, dense)


def test_estimated_effects_are_the_slopes_of_measured_ones(bench) -> None:
    scope, subject = bench
    effects = pair_effects(scope, subject, steps=1)
    before = gaps(subject, subject.base.logits)
    step = 1e-5
    checked = 0
    for layer in scope.transcoders.layers:
        plan = carried(scope, subject, all_features(scope.transcoders))[layer]
        for index in effects.effect[layer].abs().sum(0).topk(3).indices.tolist():
            # A small step on the way from the original's activation to the counterfactual's.
            edit = replace(
                plan,
                features=torch.tensor([index]),
                value=step * plan.value[..., [index]],
                scale=torch.tensor([1 - step], dtype=torch.float64),
                generated=None,
            )
            after = gaps(subject, run_edited(scope, subject.batch, {layer: edit}))
            slope = float((after - before).mean()) / step
            assert float(effects.effect[layer][:, index].sum()) == pytest.approx(slope, rel=1e-3, abs=1e-9)
            checked += slope != 0
    assert checked > 3


def test_effects_equal_the_dense_product_pair_by_pair(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, subject = bench
    gradients, _ = gap_gradients(scope, subject, 3)
    monkeypatch.setattr("vlmscope.circuits.pairs.CHUNK", 3)  # of four pairs
    found = pair_effects(scope, subject, 3)
    sides = [mlp_inputs(scope.adapter, side, scope.transcoders.layers) for side in (subject.batch, subject.other)]
    for layer in scope.transcoders.layers:
        one = scope.transcoders[layer]
        before, after = (one.encode(side[layer]).dense(WIDTH) for side in sides)
        slope = sum(gradients[layer + m] @ one.decoder(m).T for m in range(one.config.writes))
        for row, role in enumerate(found.roles):
            there = torch.from_numpy(subject.batch.roles == role)
            for table, values in ((found.effect, (after - before) * slope), (found.change, after - before)):
                expected = values[:, there].sum(1).mean(0)
                torch.testing.assert_close(table[layer][row], expected, rtol=1e-9, atol=1e-9)
