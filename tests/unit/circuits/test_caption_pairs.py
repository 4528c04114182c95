"""Levels and features of captions that differ in some words."""

import pytest
import torch

from vlmscope.circuits.caption_pairs import CaptionPair, levels_of, prompt_only, whole, word_features
from vlmscope.interventions.named import donor_activations
from vlmscope.interventions.run import editing, generate_batch, run_edited
from vlmscope.models.base import exact_float64
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this ?"
IDS = ((10, 11, 12), (10, 13, 14))


@pytest.fixture(scope="module")
def bench():
    """(vlm, transcoders, pairs): three pairs of pictures whose captions differ in the last two of three words."""
    with exact_float64():
        vlm = tiny_vlm("gemma3", 9, dtype=torch.float64)
        shape = (vlm.adapter.n_layers, vlm.adapter.d_model, 24, 5)
        transcoders = random_set(*shape, seed=6, dtype=torch.float64).requires_grad_(False)
        pairs = [
            CaptionPair(vlm.prepare(PROMPT, [tiny_image(i)]), vlm.prepare(PROMPT, [tiny_image(i + 3)]), IDS)
            for i in range(3)
        ]
    return Scope(vlm, transcoders), pairs


@pytest.fixture(autouse=True)
def exact():
    with exact_float64():
        yield


def test_features_are_chosen_for_every_word_that_differs(bench) -> None:
    scope, pairs = bench
    assert pairs[0].differs == (1, 2)
    found = word_features(scope, pairs, 4, 2)
    assert list(found) == [1, 2]
    assert all(len(set(some)) == 4 for some in found.values())


def test_levels_are_means_at_every_position_and_the_plan_goes_from_one_side_to_the_other(bench) -> None:
    scope, pairs = bench
    features = {1: torch.tensor([3, 0, 7])}
    levels = levels_of(scope, pairs, features)
    batch = whole(scope, pairs, 1)
    _, values = donor_activations(scope, batch, features)[1]
    torch.testing.assert_close(levels.counterfactual[1], values.mean(0))
    prompt = len(pairs[0].original)
    for strength, side in ((0.0, levels.original), (1.0, levels.counterfactual)):
        edit = levels.plan(strength)[1]
        assert edit.generated is not None
        torch.testing.assert_close(edit.value, side[1][:prompt])
        torch.testing.assert_close(edit.generated[:, 0], side[1][prompt:])
    assert (levels.plan(-5.0)[1].value >= 0).all()
    assert prompt_only(levels.plan())[1].generated is None


def test_a_gated_plan_opens_by_the_features_of_originals_alone(bench) -> None:
    scope, pairs = bench
    features = {layer: torch.arange(24) for layer in scope.transcoders.layers}
    levels = levels_of(scope, pairs, features)
    plan = levels.plan(1.0, 0.5)
    for layer, edit in plan.items():
        assert edit.gate is not None
        own = levels.original[layer].sum(0) > levels.counterfactual[layer].sum(0)
        assert edit.gate.features.tolist() == torch.nonzero(own).flatten().tolist()
    silent = {layer: torch.zeros_like(values) for layer, values in levels.original.items()}
    assert not type(levels)(features, silent, levels.counterfactual, levels.prompt).plan(1.0, 0.5)


def test_each_generated_token_gets_its_own_value(bench) -> None:
    """Token by token with a cache, against one forward of the whole in which every position has its value."""
    scope, pairs = bench
    features = {layer: torch.arange(6) for layer in scope.transcoders.layers}
    levels = levels_of(scope, pairs, features)
    plan = levels.plan(3.0)
    inputs = [pair.original for pair in pairs]
    together = generate_batch(scope.adapter, inputs, 4, editing(scope, plan))
    one_by_one = [generate_batch(scope.adapter, [one], 4, editing(scope, plan))[0] for one in inputs]
    assert together == one_by_one
    said = [CaptionPair(i, i, (tuple(ids[:3]), tuple(ids[:3]))) for i, ids in zip(inputs, together, strict=True)]
    batch = whole(scope, said, 0)
    everywhere = {}
    for layer, edit in plan.items():
        assert edit.generated is not None
        value = torch.cat([edit.value, edit.generated[:, 0]])
        everywhere[layer] = type(edit)(edit.features, value, edit.scale, torch.ones(len(value), dtype=torch.bool))
    logits = run_edited(scope, batch, everywhere)
    assert logits.argmax(-1).tolist() == [ids[3] for ids in together]
    constant = levels.plan(3.0)
    for layer, edit in constant.items():
        assert edit.generated is not None
        constant[layer] = type(edit)(edit.features, edit.value, edit.scale, edit.where, edit.generated[0])
    others = generate_batch(scope.adapter, inputs, 4, editing(scope, constant))
    assert [ids[:2] for ids in others] == [ids[:2] for ids in together], "the first two tokens have the same values"
