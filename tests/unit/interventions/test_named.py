"""Plans from named features and donors do what they say; controls are of the same size and never the same features."""

import pytest
import torch

from vlmscope.activations import mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.interventions.edits import (
    by_layer,
    donor_activations,
    patch_plan,
    set_features,
    steer_plan,
)
from vlmscope.interventions.run import Norms, adding_random, run_edited


def dense(scope, batch, layer: int) -> torch.Tensor:
    """Activations [B, T, F] of every feature of a layer."""
    x = mlp_inputs(scope.adapter, batch, [layer])[layer]
    return scope.transcoders[layer].encode(x).dense(scope.transcoders[layer].config.n_features)


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


def test_random_direction_moves_as_far_elsewhere(bench) -> None:
    scope, _, batch = bench
    layer = scope.adapter.n_layers - 1
    where = torch.ones(batch.length, dtype=torch.bool)
    plan = {layer: set_features(torch.arange(5), torch.full((5,), 2.0), where)}
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str):
        # A change of what the last MLP adds is one of what the final norm reads; not all families have post norms.
        after = scope.adapter.norms(layer).mlp_out_post or scope.adapter.final_norm()
        return after.register_forward_hook(lambda _m, args, _o: outputs.__setitem__(name, args[0]))

    norms: Norms = []

    def random() -> None:
        with adding_random(scope, norms, 0):
            scope.forward(batch)

    for name, go in (
        ("base", lambda: run_edited(scope, batch, {})),
        ("edit", lambda: run_edited(scope, batch, plan, norms=norms)),
        ("random", random),
    ):
        handle = watch(name)
        go()
        handle.remove()
    edit, random = outputs["edit"] - outputs["base"], outputs["random"] - outputs["base"]
    assert torch.allclose(edit.norm(dim=-1), random.norm(dim=-1), rtol=1e-6)
    assert torch.nn.functional.cosine_similarity(edit, random, dim=-1).abs().mean() < 0.6
