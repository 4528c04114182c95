"""Plans from named features and what they do: levels reached, donors carried, controls counted."""

import numpy as np
import pytest
import torch

from vlmscope.activations.capture import mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.interventions.effects import measure_effect
from vlmscope.interventions.named import by_layer, donor_activations, mean_activations, patch_plan, steer_plan
from vlmscope.interventions.run import activations, base_run, run_edited
from vlmscope.metrics.causal import kl_divergence
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


def dense(scope, batch, layer: int) -> torch.Tensor:
    """Activations [B, T, F] of every feature of a layer."""
    x = mlp_inputs(scope.adapter, batch, [layer])[layer]
    return activations(scope.transcoders[layer], x, torch.arange(scope.transcoders[layer].config.n_features))


def test_features_are_grouped_once_and_checked(bench) -> None:
    transcoders = bench[0].transcoders
    found = by_layer(transcoders, [FeatureId(1, 7), FeatureId(0, 3), FeatureId(1, 7), FeatureId(1, 2)])
    assert {layer: chosen.tolist() for layer, chosen in found.items()} == {1: [7, 2], 0: [3]}
    with pytest.raises(UserError, match="L1/40: layer 1 has 40 features"):
        by_layer(transcoders, [FeatureId(1, 40)])
    with pytest.raises(UserError, match="L99/0: the transcoders have layers"):
        by_layer(transcoders, [FeatureId(99, 0)])


def test_setting_every_feature_to_what_it_is_changes_nothing(bench) -> None:
    scope, _, batch = bench
    one = batch.select([0])
    levels = dense(scope, one, 1)[0]
    last = batch.length - 1
    values = {FeatureId(1, i): float(levels[last, i]) for i in range(levels.shape[1])}
    same = steer_plan(scope, values, batch.length, [last])
    other = steer_plan(scope, {f: v + 1.0 for f, v in values.items()}, batch.length, [last])
    before, kept, moved = (run_edited(scope, one, plan) for plan in ({}, same, other))
    assert torch.allclose(before, kept, rtol=0, atol=1e-9)
    assert (before - moved).abs().max() > 1e-3
    assert same[1].generated is None
    assert steer_plan(scope, values, batch.length)[1].generated is not None
    with pytest.raises(UserError, match="position 99: the prompt has positions 0 to"):
        steer_plan(scope, values, batch.length, [99])


def test_a_donor_of_oneself_changes_nothing_and_another_does(bench) -> None:
    scope, _, batch = bench
    features = by_layer(scope.transcoders, [FeatureId(0, i) for i in range(40)])
    recipient, donor = batch.select([0]), batch.select([1])
    before = run_edited(scope, recipient, {})
    for given, moves in ((recipient, False), (donor, bool(batch.is_image.any()))):
        carried = donor_activations(scope, given, features)
        after = run_edited(scope, recipient, patch_plan(carried, batch.roles))
        assert ((before - after).abs().max() > 1e-6) == moves


def test_means_are_over_positions_and_batches(bench) -> None:
    scope, _, batch = bench
    parts = [batch.select([0]), batch.select([1])]
    found = mean_activations(scope, parts, [1])[1]
    expected = torch.cat([dense(scope, part, 1) for part in parts]).mean((0, 1))
    assert torch.allclose(found, expected.double(), atol=1e-12)
    assert (found > 0).any() and (found == 0).any()


def test_an_effect_counts_itself_and_its_controls(bench) -> None:
    scope, _, batch = bench
    base = base_run(scope, batch)
    means = mean_activations(scope, [batch], [0, 1])
    strong = {FeatureId(0, 1): 40.0, FeatureId(1, 2): 40.0}
    for mode in ("direct", "frozen_attention", "free"):
        plan = steer_plan(scope, strong, batch.length)
        effect, logits = measure_effect(scope, batch, base, plan, mode, means, 2)
        assert torch.equal(logits, run_edited(scope, batch, plan, mode, base))
        assert effect.change.kl == pytest.approx(kl_divergence(base.logits.numpy(), logits.numpy()).mean())
        changed = (base.logits.argmax(-1) != logits.argmax(-1)).double().mean()
        assert effect.change.top1_changed == pytest.approx(float(changed))
        assert effect.matched is not None and effect.matched.kl > 0
        assert effect.matched != effect.change
        assert (effect.direction is not None) == (mode == "free")
    nothing = steer_plan(scope, {}, batch.length)
    effect, _ = measure_effect(scope, batch, base, nothing, "free", means, 0)
    assert effect.change.kl == pytest.approx(0.0, abs=1e-12) and effect.change.top1_changed == 0
    assert effect.matched is None and effect.direction is None


def test_a_control_needs_features_that_are_not_edited(bench) -> None:
    scope, _, batch = bench
    base = base_run(scope, batch)
    means = {0: torch.from_numpy(np.linspace(0.0, 1.0, 40))}
    plan = steer_plan(scope, {FeatureId(0, i): 1.0 for i in range(21)}, batch.length)
    with pytest.raises(UserError, match="21 of the 40 features of layer 0 are edited"):
        measure_effect(scope, batch, base, plan, "free", means, 1)


def test_a_bfloat16_model_is_edited_too() -> None:
    vlm = tiny_vlm("llava", 3, dtype=torch.bfloat16)
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 6, False, 1, torch.bfloat16, "random")
    batch = make_batch(adapter, [vlm.prepare("what is this ?", [tiny_image(0)])])
    donor = make_batch(adapter, [vlm.prepare("what is this ?", [tiny_image(1)])])
    base = base_run(Scope(vlm, transcoders), batch)
    means = mean_activations(Scope(vlm, transcoders), [batch], [0, 1])
    named = [FeatureId(0, i) for i in range(12)]
    carried = donor_activations(Scope(vlm, transcoders), donor, by_layer(transcoders, named))
    plans = (
        steer_plan(Scope(vlm, transcoders), {FeatureId(0, 1): 20.0, FeatureId(1, 2): 20.0}, batch.length),
        patch_plan(carried, batch.roles, 5.0),
    )
    for plan in plans:
        for mode in ("direct", "frozen_attention", "free"):
            effect, logits = measure_effect(Scope(vlm, transcoders), batch, base, plan, mode, means, 1)
            assert logits.dtype == torch.bfloat16 and effect.change.kl > 0
