"""Pairs of whole answers: features and levels of words that differ, steered while answers are generated."""

from dataclasses import replace

import pytest
import torch

from vlmscope.circuits.cases import TextPair, text_cases
from vlmscope.circuits.experiment import text_level
from vlmscope.circuits.operations import Level
from vlmscope.interventions.controls import matched_plan, matched_pools
from vlmscope.interventions.edits import LayerEdit, donor_activations
from vlmscope.interventions.run import editing, generate_batch, run_edited
from vlmscope.interventions.trials import Setting
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import continued
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this ?"
IDS = ([10, 11, 12], [10, 13, 14])


@pytest.fixture(scope="module")
def bench():
    """(scope, pairs): three pairs of pictures whose answers differ in the last two of three words."""
    with exact_float64():
        vlm = tiny_vlm("gemma3", 9, dtype=torch.float64)
        shape = (vlm.adapter.n_layers, vlm.adapter.d_model, 24, 5)
        transcoders = random_set(*shape, seed=6, dtype=torch.float64).requires_grad_(False)
        texts = tuple(vlm.tokenizer.decode(ids).strip() for ids in IDS)
        sides = [[vlm.prepare(PROMPT, [tiny_image(i + start)]) for i in range(3)] for start in (0, 3)]
        pairs = [TextPair(str(i), both, IDS, texts) for i, both in enumerate(zip(*sides, strict=True))]
    return Scope(vlm, transcoders), pairs


@pytest.fixture(autouse=True)
def exact():
    with exact_float64():
        yield


@pytest.fixture
def level(bench) -> Level:
    scope, pairs = bench
    made = text_level(scope, pairs, 4, 2)
    return replace(made, features={layer: torch.arange(6) for layer in scope.transcoders.layers})


def test_levels_are_means_at_every_place_and_go_from_one_side_to_the_other(bench, level: Level) -> None:
    scope, pairs = bench
    cases = text_cases(scope, "test", "x", pairs)
    for strength, side in ((0.0, 0), (1.0, 1)):
        whole = scope.batch([continued(scope.adapter, p.sides[side], p.ids[side], scope.vlm.tokenizer) for p in pairs])
        _, values = donor_activations(scope, whole, level.features)[1]
        edit = level.plan(scope, cases, strength)[1]
        assert isinstance(edit, LayerEdit) and edit.generated is not None
        torch.testing.assert_close(torch.cat([edit.value, edit.generated[:, 0]]), values.mean(0))
    assert all((edit.value >= 0).all() for edit in level.plan(scope, cases, -5.0).values())
    for positions in ("prompt", "image", "no_last"):
        plan = Setting(positions=positions).restrict(level.plan(scope, cases, 1.0), cases.batch.roles, 4)
        assert all(edit.generated is None for edit in plan.values()), "generated tokens are at no place of the prompt"


def test_a_gate_opens_by_the_features_of_originals_alone_in_controls_too(bench, level: Level) -> None:
    scope, pairs = bench
    cases, gated = text_cases(scope, "test", "x", pairs), replace(level, gate=0.5)
    starts, ends = (donor_activations(scope, side, level.features) for side in level.sides)
    plan = gated.plan(scope, cases, 1.0)
    for layer in scope.transcoders.layers:
        own = (starts[layer][1].mean(0).sum(0) > ends[layer][1].mean(0).sum(0)).nonzero().flatten()
        assert (layer in plan) == bool(len(own))
        if layer in plan:
            assert plan[layer].gate.features.tolist() == own.tolist()
    pools = matched_pools(scope, gated, cases, 1.0, plan)
    for layer, edit in matched_plan(scope, gated, cases, 1.0, plan, pools, 0).items():
        assert edit.gate is plan[layer].gate and edit.written_by is not None


def test_each_generated_token_gets_its_own_value(bench, level: Level) -> None:
    """Token by token with a cache, against one forward of the whole in which every position has its value."""
    scope, pairs = bench
    cases = text_cases(scope, "test", "x", pairs)
    plan = level.plan(scope, cases, 3.0)
    together = generate_batch(scope.adapter, cases.inputs, 4, editing(scope, plan))
    assert together == [generate_batch(scope.adapter, [one], 4, editing(scope, plan))[0] for one in cases.inputs]
    rows = zip(cases.inputs, together, strict=True)
    begun = [continued(scope.adapter, one, ids[:3], scope.vlm.tokenizer) for one, ids in rows]
    everywhere = {}
    for layer, edit in plan.items():
        value = torch.cat([edit.value, edit.generated[:, 0]])
        everywhere[layer] = LayerEdit(edit.features, value, edit.scale, torch.ones(len(value), dtype=torch.bool))
    logits = run_edited(scope, scope.batch(begun), everywhere)
    assert logits.argmax(-1).tolist() == [ids[3] for ids in together]
