"""Edits do what they say in each of the three modes, also token by token."""

import pytest
import torch
from tests.unit.interventions.conftest import scaled

from vlmscope.core.errors import UserError
from vlmscope.interventions.edits import (
    merge,
    position_mask,
    set_features,
)
from vlmscope.interventions.run import base_run, editing, generate_batch, generate_edited, run_edited
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_image
from vlmscope.replacement import build_replacement

MODES = ("direct", "frozen_attention", "free")


def everywhere(batch) -> torch.Tensor:
    return torch.ones(batch.length, dtype=torch.bool)


@pytest.mark.parametrize("mode", MODES)
def test_setting_features_to_what_they_are_changes_nothing(bench, mode: str) -> None:
    scope, _, batch = bench
    base = base_run(scope, batch)
    plan = {}
    for layer, x in base.mlp_in.items():
        width = scope.transcoders[layer].config.n_features
        plan[layer] = set_features(
            torch.arange(width), scope.transcoders[layer].encode(x).dense(width), everywhere(batch)
        )
    edited = run_edited(scope, batch, plan, mode, base)
    assert torch.allclose(edited, base.logits, rtol=0, atol=1e-10)


def test_direct_equals_the_replacement_model(bench) -> None:
    """Two implementations: hooks on Hugging Face's modules, and the explicit affine replay."""
    scope, inputs, _ = bench
    batch = make_batch(scope.adapter, inputs[1:2])
    base = base_run(scope, batch)
    replacement = build_replacement(scope, inputs[1])
    table = replacement.feature_activations
    for rows in ([0], [3, 17], list(range(len(table)))):
        delta, plan = {}, {}
        for row in rows:
            layer, position, feature = int(table.layer[row]), int(table.position[row]), int(table.index[row])
            value = float(table.activation[row])
            delta[layer, position, feature] = 1.5 * value
            where = torch.zeros(batch.length, dtype=torch.bool)
            where[position] = True
            plan.setdefault((layer, position), []).append((feature, where))
        expected = replacement.direct(delta).logits[-1]
        total = torch.zeros_like(expected)
        for (layer, _), found in plan.items():  # direct effects add up: one run for each (layer, position)
            features = torch.tensor([f for f, _ in found])
            edit = scaled(features, 2.5, found[0][1])
            total += (run_edited(scope, batch, {layer: edit}, "direct", base) - base.logits)[0]
        assert torch.allclose(total, expected, rtol=0, atol=1e-9)
        assert expected.abs().max() > 1e-3


def test_free_mode_adds_the_decoder_rows(bench) -> None:
    """Against a hook written out by hand."""
    scope, _, batch = bench
    layer, features = 1, torch.tensor([4, 9, 30])
    where = everywhere(batch)
    where[0] = False
    plan = {layer: set_features(features, torch.tensor([2.0, 0.0, 1.0]), where)}
    transcoder = scope.transcoders[layer]
    seen = {}

    def hook(_module, args, out):
        current = transcoder.encode(args[0]).dense(40)[..., features]
        seen["current"] = current
        delta = (torch.tensor([2.0, 0.0, 1.0]) - current) * where[:, None]
        return out + delta @ transcoder.W_dec[features]

    handle = scope.adapter.mlp(layer).register_forward_hook(hook)
    expected = scope.vlm.model(**batch.tensors).logits[:, -1]
    handle.remove()
    got = run_edited(scope, batch, plan, "free")
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert (got - run_edited(scope, batch, {}, "free")).abs().max() > 1e-4


def test_generation_with_a_cache_equals_generation_without(bench) -> None:
    """Greedy tokens under edits of prompt and generated tokens, against a full forward for each token."""
    scope, inputs, _ = bench
    one = inputs[0]
    where = torch.ones(len(one), dtype=torch.bool)
    features = torch.arange(10)
    value = torch.linspace(1.0, 12.0, 10, dtype=torch.float64)
    plan = {layer: set_features(features, value, where, value) for layer in scope.transcoders.layers}
    ids = generate_batch(scope.adapter, [one], 5, editing(scope, plan))[0]
    tensors = dict(one.tensors)
    tokens = []
    for _ in range(5):
        length = tensors["input_ids"].shape[1]
        whole = {
            layer: set_features(features, value, torch.ones(length, dtype=torch.bool))
            for layer in scope.transcoders.layers
        }
        with torch.no_grad(), editing(scope, whole):
            token = int(scope.vlm.model(**tensors, use_cache=False).logits[0, -1].argmax())
        tokens.append(token)
        if token in (scope.vlm.tokenizer.eos_token_id,):
            break
        # PaliGemma's prompt (0) sees all of itself, its answer (1) what came before; in Gemma 3 text is 0.
        kind = int(scope.vlm.model.config.model_type == "paligemma")
        added = {"input_ids": token, "attention_mask": 1, "token_type_ids": kind, "mm_token_type_ids": 0}
        for name, extra in added.items():
            if name in tensors:
                tensors[name] = torch.cat([tensors[name], torch.tensor([[extra]])], 1)
    assert ids == tokens
    assert generate_batch(scope.adapter, [one], 5)[0] != ids
    text = generate_edited(scope, one, plan, max_new_tokens=5)
    assert text == scope.vlm.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_merge_lets_the_later_edit_win() -> None:
    where = torch.ones(4, dtype=torch.bool)
    first = set_features(torch.tensor([1, 2]), torch.zeros(2), where, torch.zeros(2))
    second = set_features(torch.tensor([2, 5]), torch.arange(8.0).view(4, 2), where, torch.tensor([9.0, 8.0]))
    merged = merge({0: first, 1: first}, {0: second})
    assert merged[0].features.tolist() == [1, 2, 5]
    assert (merged[0].scale * 7.0 + merged[0].value).tolist() == [[0, 0, 1], [0, 2, 3], [0, 4, 5], [0, 6, 7]]
    assert merged[0].generated is not None
    assert merged[0].generated.tolist() == [0, 9, 8]
    assert merged[1] is first


def test_bad_requests_are_named(bench) -> None:
    scope, inputs, batch = bench
    with pytest.raises(UserError, match="mode=frozen: no such choice"):
        run_edited(scope, batch, {}, "frozen")
    with pytest.raises(UserError, match="no position has role 'answer'"):
        position_mask(batch.roles, "answer")
    longer = scope.vlm.prepare("what is this red planet ?", [tiny_image(0)] if inputs[0].is_image.any() else [])
    with pytest.raises(UserError, match="must align"):
        make_batch(scope.adapter, [inputs[0], longer])


def test_a_base_run_keeps_what_its_modes_freeze(bench) -> None:
    scope, _, batch = bench
    whole = base_run(scope, batch)
    plan = {1: scaled(torch.arange(40), 2.0, everywhere(batch))}
    for mode in MODES:
        base = base_run(scope, batch, [mode])
        assert torch.allclose(base.logits, whole.logits, rtol=0, atol=1e-9)
        assert bool(base.patterns) == (mode != "free")
        assert bool(base.written) == bool(base.mlp_in) == bool(base.inverse_rms) == (mode == "direct")
        found, expected = (run_edited(scope, batch, plan, mode, one) for one in (base, whole))
        assert torch.allclose(found, expected, rtol=0, atol=1e-9)
        for other in set(MODES[: MODES.index(mode)]):
            with pytest.raises(AssertionError, match="not recorded for"):
                run_edited(scope, batch, plan, other, base)
    assert all(rms.shape[-1] == 1 for rms in whole.inverse_rms.values())


def test_attention_masks_of_an_earlier_forward_change_no_logit(bench) -> None:
    scope, inputs, _ = bench
    batch, fresh = (make_batch(scope.adapter, inputs) for _ in range(2))
    first = scope.forward(batch)
    assert bool(batch._masks) == (scope.adapter.takes_masks and scope.adapter.has_vision)
    recorded = base_run(scope, batch, ["frozen_attention"])  # another implementation, whose masks are numbers
    assert torch.equal(scope.forward(batch), first)
    assert torch.equal(base_run(scope, batch, ["frozen_attention"]).logits, recorded.logits)
    assert torch.equal(base_run(scope, fresh, ["frozen_attention"]).logits, recorded.logits)
