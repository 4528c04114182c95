"""Interchange interventions do what they say, and effects are estimated as they are measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vlmscope.activations.capture import mlp_inputs
from vlmscope.circuits.interchange import (
    all_features,
    carried_controls,
    direction_controls,
    interchange_plan,
    layer_role_grid,
    outcome,
    recovered,
    run_interchange,
    whole_plan,
)
from vlmscope.circuits.pair_effects import between, gap_gradients, interpolation, pair_effects
from vlmscope.circuits.pair_subject import PairSubject, pair_subject, part_of
from vlmscope.core.errors import UserError
from vlmscope.interventions.edits import at_positions
from vlmscope.interventions.named import matched_features, mean_activations, run_random_direction
from vlmscope.interventions.run import edit_changes, generate_ids, run_edited
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
    plan = interchange_plan(scope, subject, all_features(scope.transcoders))
    inputs = mlp_inputs(scope.adapter, subject.other, scope.transcoders.layers)
    for layer, edit in plan.items():
        wanted = scope.transcoders[layer].encode(inputs[layer]).dense(WIDTH)
        assert torch.equal(edit.new(torch.full_like(wanted, 7.0)), wanted)


@pytest.mark.parametrize("mode", ["direct", "frozen_attention", "free"])
def test_carrying_every_feature_needs_no_table_of_them(bench, mode: str) -> None:
    scope, subject = bench
    everything = all_features(scope.transcoders)
    for where in (None, torch.from_numpy(subject.batch.roles == "image")):
        dense = interchange_plan(scope, subject, everything, where)
        whole = whole_plan(scope, subject.other, where=where)
        assert [len(edit.features) for edit in whole.values()] == [len(edit.features) for edit in dense.values()]
        for plans in ((dense, whole), *(({n: dense[n]}, {n: whole[n]}) for n in (1, 3))):
            expected, found = (run_edited(scope, subject.batch, plan, mode, subject.base) for plan in plans)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            if where is None and len(plans[0]) > 1:
                assert not torch.allclose(found, subject.base.logits, rtol=0, atol=1e-6)


def test_every_feature_is_carried_into_generated_tokens_and_by_random_directions(bench) -> None:
    scope, subject = bench
    one = part_of(subject, [0])
    inputs = scope.vlm.prepare(PROMPT, [tiny_image(0)])
    dense = interchange_plan(scope, one, all_features(scope.transcoders))
    whole = whole_plan(scope, one.other)
    assert generate_ids(scope, inputs, dense, 4) == generate_ids(scope, inputs, whole, 4)
    for layer, edit in whole.items():
        x = mlp_inputs(scope.adapter, one.batch, [layer])[layer][:, :1]
        found, expected = (edit_changes(scope.transcoders[layer], x, e, one.batch.length) for e in (edit, dense[layer]))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    pair = [run_random_direction(scope, one.batch, plan, 3) for plan in (dense, whole)]
    torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-9)
    # There are no others to draw a control from, however the plan is held.
    means = mean_activations(scope, [subject.batch], scope.transcoders.layers)
    with pytest.raises(UserError, match="no control can be drawn"):
        matched_features(dense, means, 0)


def test_carrying_from_itself_changes_nothing(bench) -> None:
    scope, subject = bench
    same = replace(subject, other=subject.batch)
    whole = whole_plan(scope, same.other)
    for plan in (interchange_plan(scope, same, all_features(scope.transcoders)), whole):
        for mode in ("direct", "frozen_attention", "free"):
            logits = run_edited(scope, subject.batch, plan, mode, subject.base)
            torch.testing.assert_close(logits, subject.base.logits, rtol=1e-9, atol=1e-9)


def test_recovered_is_0_at_the_original_and_1_at_the_counterfactual(bench) -> None:
    _, subject = bench
    assert np.abs(recovered(subject, subject.base.logits)).max() < 1e-12
    assert np.abs(recovered(subject, subject.other_logits) - 1).max() < 1e-12
    middle = (subject.base.logits + subject.other_logits) / 2
    assert np.abs(recovered(subject, middle) - 0.5).max() < 1e-9


def test_outcome_counts_what_follows_and_what_changed(bench) -> None:
    _, subject = bench
    logits = subject.base.logits.clone()
    rows = torch.arange(subject.size)
    logits[0, subject.other_tokens[0]] = 1e3
    third = next(i for i in range(logits.shape[1]) if i not in (int(subject.tokens[1]), int(subject.other_tokens[1])))
    logits[1, third] = 1e3
    found = outcome(subject, logits)
    assert (found.follows.value, found.changed.value) == (1 / len(rows), 2 / len(rows))
    still = outcome(replace(subject, other_tokens=subject.tokens), logits)
    assert (still.changed.value, still.recovered) == (2 / len(rows), None)


def test_estimated_effects_are_the_slopes_of_measured_ones(bench) -> None:
    scope, subject = bench
    effects = pair_effects(scope, subject, steps=1)
    before = gaps(subject, subject.base.logits)
    step = 1e-5
    checked = 0
    for layer in scope.transcoders.layers:
        plan = interchange_plan(scope, subject, all_features(scope.transcoders))[layer]
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


def test_effects_over_many_steps_add_up_to_the_whole_way(bench) -> None:
    """Integrated over the embeddings' path, the gradient is complete; what features miss is the errors' share."""
    scope, subject = bench
    one, many = (pair_effects(scope, subject, steps) for steps in (1, 8))
    assert one.roles == many.roles
    assert any(not torch.equal(one.effect[layer], many.effect[layer]) for layer in scope.transcoders.layers)
    assert all(torch.equal(one.change[layer], many.change[layer]) for layer in scope.transcoders.layers)
    assert interpolation(1) == [0.0]
    assert interpolation(2) == [0.25, 0.75]
    half = between(subject.batch, subject.other, 0.5).tensors["inputs_embeds"]
    torch.testing.assert_close(
        half * 2, subject.batch.tensors["inputs_embeds"] + subject.other.tensors["inputs_embeds"]
    )


def test_effects_equal_the_dense_product_pair_by_pair(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, subject = bench
    gradients = gap_gradients(scope, subject, 3).writes
    monkeypatch.setattr("vlmscope.circuits.pair_effects.CHUNK", 3)  # of four pairs
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


def test_ranking_is_by_effect_and_leaves_out_features_without_one(bench) -> None:
    scope, subject = bench
    effects = pair_effects(scope, subject)
    ranked = effects.ranked(10_000)
    sizes = [abs(member.influence) for member in ranked]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0
    assert len({member.feature for member in ranked}) == len(ranked)
    assert effects.ranked(3) == ranked[:3]
    best = ranked[0]
    table = effects.effect[best.feature.layer][:, best.feature.index]
    assert best.influence == float(table.sum())
    assert best.role == effects.roles[int(table.abs().argmax())]


def test_controls_are_as_many_other_features_at_the_same_positions(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scope, subject = bench
    features = {0: torch.tensor([1, 4]), 1: torch.tensor([2])}
    where = torch.from_numpy(subject.batch.roles == "last")
    plan = interchange_plan(scope, subject, features, where)
    means = mean_activations(scope, [subject.batch, subject.other], scope.transcoders.layers)
    seen = []
    real = run_interchange

    def spy(scope, subject, plan, mode="free"):
        seen.append(plan)
        return real(scope, subject, plan, mode)

    monkeypatch.setattr("vlmscope.circuits.interchange.run_interchange", spy)
    assert len(carried_controls(scope, subject, plan, "free", means, 2)) == 2
    for control in seen:
        for layer, edit in control.items():
            assert len(edit.features) == len(features[layer])
            assert not set(edit.features.tolist()) & set(features[layer].tolist())
            assert torch.equal(edit.where, where)
            inputs = mlp_inputs(scope.adapter, subject.other, [layer])[layer]
            own = scope.transcoders[layer].encode(inputs).select(edit.features, WIDTH)
            assert torch.equal(edit.value, own)  # the controls' own activations, not those of the controlled
    assert len(direction_controls(scope, subject, plan, 2)) == 2


def test_grid_is_the_interchange_of_one_layer_and_role(bench) -> None:
    scope, subject = bench
    features = {1: torch.tensor([0, 3, 5])}
    grid = layer_role_grid(scope, subject, features, ("image", "last", "answer"))
    where = torch.from_numpy(subject.batch.roles == "image")
    plan = at_positions(interchange_plan(scope, subject, features), where)
    found = run_interchange(scope, subject, plan)
    assert found.recovered is not None
    assert grid[1, 0].tolist() == [found.recovered.value, found.follows.value]
    assert np.isnan(grid[0]).all() and np.isnan(grid[1, 2]).all()


def test_too_few_answerable_pairs_are_one_line(bench) -> None:
    scope, subject = bench
    sides = [[scope.vlm.prepare(PROMPT, [tiny_image(i)]) for i in some] for some in (range(3), range(3, 6))]
    wrong = torch.full((3,), int(subject.other_tokens[0]))
    with pytest.raises(UserError, match=r"on 0 of 3 pairs, too few for an interval") as error:
        pair_subject(scope, "name", *sides, wrong, wrong, 2)
    assert "\n" not in str(error.value)
    longer = [scope.vlm.prepare("what is the other planet here ?", [tiny_image(i)]) for i in range(3)]
    with pytest.raises(UserError, match="must align"):
        pair_subject(scope, "name", sides[0], longer, wrong, wrong, 2)
