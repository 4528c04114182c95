"""Ablating and patching across kinds of prompt do what they say, on a tiny random model."""

import numpy as np
import pytest
import torch

from vlmscope.activations.capture import mlp_inputs
from vlmscope.circuits.shared_effects import Asked, Outcome, ablate, ask, carried_plan, fall, patch_across
from vlmscope.core.records import FeatureId
from vlmscope.interventions.named import by_layer, mean_activations
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import log_softmax
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PATCHES = ("shared", "no_last_layer", "every_question", "everything", "everything_no_last_layer")


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 30, 6, seed=6).requires_grad_(False)
    pictures = make_batch(vlm.adapter, [vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in range(4)])
    text = make_batch(vlm.adapter, [vlm.prepare("what is the other planet in this ?")])
    return Scope(vlm, transcoders), pictures, text


def asked(bench, kind: str) -> Asked:
    """The prompts with whatever the random model says as the right answer."""
    scope, pictures, text = bench
    batch = pictures if kind == "picture" else text
    answer = int(run_edited(scope, batch, {}, "free")[0].argmax())
    found = ask(scope, batch, [f"{kind} {i}" for i in range(batch.size)], answer)
    assert found is not None and found.batch.size >= 1
    return found


def test_only_right_answers_are_kept_with_their_names(bench) -> None:
    scope, pictures, _ = bench
    logits = run_edited(scope, pictures, {}, "free")
    answer = int(logits[2].argmax())
    rows = [i for i in range(4) if int(logits[i].argmax()) == answer]
    found = ask(scope, pictures, list("abcd"), answer)
    assert found is not None and found.names == tuple("abcd"[i] for i in rows)
    torch.testing.assert_close(found.logits, logits[rows])
    never = next(i for i in range(logits.shape[1]) if i not in logits.argmax(-1).tolist())
    assert ask(scope, pictures, list("abcd"), never) is None


def test_ablation_is_a_run_with_the_features_at_zero(bench) -> None:
    scope, _, _ = bench
    case = asked(bench, "picture")
    features = [FeatureId(0, i) for i in range(0, 30, 2)] + [FeatureId(2, i) for i in range(15)]
    means = mean_activations(scope, [case.batch], scope.transcoders.layers)
    into = Outcome()
    ablate(scope, case, features, means, 2, into)
    where = torch.ones(case.batch.length, dtype=torch.bool)
    from vlmscope.interventions.edits import set_features

    plan = {
        layer: set_features(of, torch.zeros(len(of)), where)
        for layer, of in by_layer(scope.transcoders, features).items()
    }
    logits = run_edited(scope, case.batch, plan, "free")
    assert into.hits == (logits.argmax(-1) != case.answer).tolist()
    before, after = (log_softmax(one.double().numpy())[:, case.answer] for one in (case.logits, logits))
    np.testing.assert_allclose(into.drops, before - after)
    assert np.abs(into.drops).max() > 1e-4
    assert into.sizes == [30] and len(into.controls) == 2 and into.groups == list(case.names)
    nothing = Outcome()
    ablate(scope, case, [], means, 1, nothing)
    assert not any(nothing.hits) and np.abs(nothing.drops).max() == 0


@pytest.mark.parametrize("kind", ["picture", "text"])
def test_a_patch_carries_the_donors_activations_to_the_last_position_alone(bench, kind: str) -> None:
    scope, _, _ = bench
    recipient, donor = asked(bench, kind), asked(bench, "text" if kind == "picture" else "picture")
    features = {layer: torch.arange(30) for layer in scope.transcoders.layers}
    plan = carried_plan(scope.transcoders, recipient, donor, features)
    codes = {layer: scope.transcoders[layer].encode(x).dense(30) for layer, x in donor.last.items()}
    for layer, edit in plan.items():
        assert edit.where.nonzero().flatten().tolist() == [recipient.batch.length - 1]
        torch.testing.assert_close(edit.value[:, 0], codes[layer])
    into = {name: Outcome() for name in PATCHES}
    means = mean_activations(scope, [recipient.batch], scope.transcoders.layers)
    patch_across(scope, recipient, donor, [FeatureId(1, 3), FeatureId(3, 4)], [FeatureId(0, 1)], means, into)
    pictures = recipient if kind == "picture" else donor
    cases = max(recipient.batch.size, donor.batch.size)
    for name, outcome in into.items():
        assert len(outcome.hits) == cases, name
        assert outcome.groups == list(pictures.names), name
    last = scope.adapter.n_layers - 1
    assert [into[name].sizes[0] for name in PATCHES] == [2, 1 if last == 3 else 2, 1, 30 * (last + 1), 30 * last]
    assert len(into["shared"].controls) == 1


def test_a_patch_from_the_same_prompts_changes_nothing(bench) -> None:
    scope, _, _ = bench
    case = asked(bench, "picture")
    plan = carried_plan(scope.transcoders, case, case, {layer: torch.arange(30) for layer in scope.transcoders.layers})
    logits = run_edited(scope, case.batch, plan, "free")
    assert np.abs(fall(case, logits)).max() < 1e-4
    x = mlp_inputs(scope.adapter, case.batch, [0])[0]
    torch.testing.assert_close(case.last[0], x[:, -1])


def test_controls_are_weighted_by_cases() -> None:
    first, second = Outcome(), Outcome()
    first.add(np.array([True]), np.zeros(1), ["a"], 3, [np.array([True])])
    second.add(np.zeros(3, bool), np.zeros(3), ["b", "c", "d"], 5, [np.zeros(3)])
    assert Outcome().control is None
    first.join(second)
    assert first.control == pytest.approx(0.25) and first.groups == ["a", "b", "c", "d"]
