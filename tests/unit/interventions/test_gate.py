"""A gate lets an edit act as far as its features are active, in the prompt and at generated tokens."""

from dataclasses import replace

import pytest
import torch

from vlmscope.interventions.edits import Gate, LayerEdit, set_features
from vlmscope.interventions.run import base_run, edit_changes, run_edited

LAYER = 1


@pytest.fixture
def case(bench):
    """(transcoder, MLP inputs [B, T, d], an edit without a gate, features active somewhere, their activations)."""
    scope, _, batch = bench
    x = base_run(scope, batch).mlp_in[LAYER]
    dense = scope.transcoders[LAYER].encode(x).dense(scope.transcoders[LAYER].config.n_features)
    active = dense.sum((0, 1)).argsort(descending=True)[:3]
    where = torch.ones(batch.length, dtype=torch.bool)
    edit = set_features(torch.tensor([5, 9]), torch.tensor([2.0, 0.5]), where, torch.tensor([2.0, 0.5]))
    return scope.transcoders[LAYER], x, edit, active, dense[..., active]


def gated(edit: LayerEdit, features: torch.Tensor, level: float, full: float, length: int) -> LayerEdit:
    levels = torch.full((length, len(features)), level, dtype=torch.float64)
    return replace(edit, gate=Gate(features, levels, levels[0], full))


@pytest.mark.parametrize("offset", ["prompt", "generated"])
def test_acts_in_proportion_to_the_norm_weighted_activation(case, offset: str) -> None:
    transcoder, x, edit, features, current = case
    length = x.shape[1]
    start = 0 if offset == "prompt" else length
    (whole,) = edit_changes(transcoder, x, edit, start)
    level = 3.0 * float(current.max())
    (some,) = edit_changes(transcoder, x, gated(edit, features, level, 0.5, length), start)
    norms = transcoder.W_dec[features].norm(dim=1)
    g = (current * norms).sum(-1) / (0.5 * level * norms.sum())
    assert 0 < float(g.max()) < 1
    assert whole is not None
    assert torch.allclose(some, g.unsqueeze(-1) * whole, rtol=0, atol=1e-12)


def test_inactive_features_or_no_level_change_nothing(bench, case) -> None:
    scope, _, batch = bench
    _, x, edit, features, _ = case
    dense = scope.transcoders[LAYER].encode(x).dense(scope.transcoders[LAYER].config.n_features)
    silent = (dense.amax((0, 1)) == 0).nonzero().flatten()[:2]
    base = run_edited(scope, batch, {})
    assert not torch.equal(run_edited(scope, batch, {LAYER: edit}), base)
    for closed in (gated(edit, silent, 1.0, 0.5, batch.length), gated(edit, features, 0.0, 0.5, batch.length)):
        assert torch.equal(run_edited(scope, batch, {LAYER: closed}), base)
