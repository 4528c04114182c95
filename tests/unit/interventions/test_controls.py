"""Controls are of the same size and activity, and never the features that they control for."""

import torch

from vlmscope.interventions.edits import set_features
from vlmscope.interventions.named import matched_features
from vlmscope.interventions.run import run_edited


def test_matched_features_are_near_in_activation_and_disjoint() -> None:
    means = {0: torch.cat([torch.zeros(50), torch.linspace(0.1, 5.0, 150)])}
    features = torch.tensor([60, 120, 199])
    plan = {0: set_features(features, torch.tensor([1.0, 2.0, 3.0]), torch.ones(4, dtype=torch.bool))}
    drawn = set()
    for seed in range(10):
        control = matched_features(plan, means, seed)[0]
        assert len(set(control.features.tolist())) == 3
        assert not set(control.features.tolist()) & set(features.tolist())
        assert torch.equal(control.value, plan[0].value)
        gap = (means[0][control.features] - means[0][features]).abs()
        assert gap.max() < 0.4
        assert (means[0][control.features] > 0).all()
        drawn.add(tuple(control.features.tolist()))
    assert len(drawn) > 5
    assert torch.equal(matched_features(plan, means, 3)[0].features, matched_features(plan, means, 3)[0].features)


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

    for name, go in (
        ("base", lambda: run_edited(scope, batch, {})),
        ("edit", lambda: run_edited(scope, batch, plan)),
        ("random", lambda: run_edited(scope, batch, plan, direction=0)),
    ):
        handle = watch(name)
        go()
        handle.remove()
    edit, random = outputs["edit"] - outputs["base"], outputs["random"] - outputs["base"]
    assert torch.allclose(edit.norm(dim=-1), random.norm(dim=-1), rtol=1e-6)
    assert torch.nn.functional.cosine_similarity(edit, random, dim=-1).abs().mean() < 0.6
