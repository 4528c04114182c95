"""Controls change as much as what they stand for, against plain loops; draws differ and never touch the edited."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.interventions.conftest import PROMPT

from vlmscope.circuits.operations import Ablate, Carry, Shift, Toward
from vlmscope.core.records import control_draws
from vlmscope.interventions.controls import NEAREST, SLACK, matched_plan, matched_pools
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import base_run, editing, run_edited
from vlmscope.interventions.trials import Cases, Setting, Trial, run_trials
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

WIDTH = 40
SOME = {1: torch.tensor([2, 7]), 3: torch.tensor([5])}


@pytest.fixture(scope="module")
def subject() -> tuple[Scope, Cases]:
    """Four prompts, each with the next one as its donor."""
    with exact_float64():
        vlm = tiny_gemma3(11, dtype=torch.float64)
        sets = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, WIDTH, 6, seed=6, dtype=torch.float64)
        scope = Scope(vlm, sets.requires_grad_(False))
        inputs = [vlm.prepare(PROMPT, [tiny_image(i)]) for i in range(4)]
        batch = make_batch(vlm.adapter, inputs)
        base = base_run(scope, batch)
    turned = [1, 2, 3, 0]
    answer = base.logits.argmax(-1)
    ids = ("a", "b", "c", "d")
    return scope, Cases("test", "name", batch, base, answer, answer[turned], ids, batch.select(turned))


def sizes(scope: Scope, cases: Cases, new: Any, layer: int, feature: int, places: np.ndarray) -> np.ndarray:
    """By role, from dense activations: what setting a feature to `new(own, donor)` at some places writes."""
    own, donor = (c[layer].dense(WIDTH)[..., feature] for c in (cases.codes(scope), cases.donor_codes(scope)))
    change = (new(own, donor) - own) * scope.transcoders[layer].W_dec[feature].norm()
    roles = dict.fromkeys(cases.batch.roles.tolist())
    return np.array([float(change[:, (cases.batch.roles == role) & places].norm()) for role in roles])


@pytest.mark.parametrize(
    ("do", "strength", "new"),
    [
        (Carry(SOME), 3.0, lambda own, donor: 3 * donor),
        (Toward(SOME), 0.5, lambda own, donor: (own + donor) / 2),
        (Ablate(SOME), 1.0, lambda own, donor: 0 * own),
    ],
)
def test_candidates_are_ranked_by_what_their_own_change_writes(subject, do: Any, strength: float, new: Any) -> None:
    scope, cases = subject
    plan: Any = dict(do.plan(scope, cases, strength))
    roles = cases.batch.roles
    plan[1] = replace(plan[1], where=torch.from_numpy(roles != "special"))
    at = np.stack([roles == "image", roles == "last"], 1)  # two features with places of their own
    plan[1] = replace(plan[1], at=torch.from_numpy(at), at_generated=torch.ones(2, dtype=torch.bool))
    pools = matched_pools(scope, do, cases, strength, plan)
    for layer, features in SOME.items():
        pool = pools[layer]
        for row, feature in enumerate(features.tolist()):
            places = at[:, row] if layer == 1 else np.ones(len(roles), dtype=bool)
            mine = sizes(scope, cases, new, layer, feature, places)
            assert pool.size[row] == pytest.approx(np.linalg.norm(mine))
            for other, gap in zip(pool.order[row], pool.gaps[row], strict=True):
                theirs = sizes(scope, cases, new, layer, int(other), places)
                whole = np.linalg.norm(mine) or 1.0
                assert gap == pytest.approx(np.linalg.norm(theirs - mine) / whole, rel=1e-7, abs=1e-7)
            assert (np.diff(pool.gaps[row]) >= 0).all()
        active = cases.codes(scope)[layer].dense(WIDTH) + cases.donor_codes(scope)[layer].dense(WIDTH)
        live = set(torch.nonzero(active.sum((0, 1))).flatten().tolist())
        assert {int(f) for f in pool.order[0]} == live - set(features.tolist())


def test_draws_are_near_distinct_and_of_other_features(subject) -> None:
    scope, cases = subject
    do = Carry({1: torch.tensor([0, 3, 9]), 2: torch.arange(0)})
    plan: Any = do.plan(scope, cases, 1.0)
    pools = matched_pools(scope, do, cases, 1.0, plan)
    assert list(pools) == [1]
    seen = set()
    for draw in range(30):
        control = matched_plan(scope, do, cases, 1.0, plan, pools, draw)[1]
        again = matched_plan(scope, do, cases, 1.0, plan, pools, draw)[1]
        drawn = control.features.tolist()
        assert drawn == again.features.tolist()
        assert len(set(drawn)) == 3 and not set(drawn) & {0, 3, 9}
        for row, feature in enumerate(drawn):
            gaps = pools[1].gaps[row]
            gap = gaps[pools[1].order[row].tolist().index(feature)]
            assert gap <= gaps[NEAREST + 2] + SLACK  # two may be taken
        seen.add(tuple(drawn))
    assert len(seen) > 20


def test_without_values_of_their_own_others_write_the_same_change(subject) -> None:
    scope, cases = subject
    slope = torch.linspace(-1, 2, cases.batch.length, dtype=torch.float64)[:, None]
    change = {layer: (features, slope.repeat(1, len(features))) for layer, features in SOME.items()}
    do = Shift(change)
    plan: Any = do.plan(scope, cases, 2.0)
    pools = matched_pools(scope, do, cases, 2.0, plan)
    control = matched_plan(scope, do, cases, 2.0, plan, pools, 4)
    handles = []
    for layer, (features, delta) in change.items():
        drawn = control[layer].written_by
        assert drawn is not None and not set(drawn.tolist()) & set(features.tolist())
        added = 2.0 * delta @ scope.transcoders[layer].W_dec[drawn]
        hook: Any = lambda _m, _a, out, added=added: out + added  # noqa: E731
        handles.append(scope.adapter.mlp(layer).register_forward_hook(hook))
    expected = scope.forward(cases.batch)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(run_edited(scope, cases.batch, control), expected, rtol=1e-9, atol=1e-12)
    # Those of the nearest norms that are used where the change is, first.
    norms = scope.transcoders[1].write_norms()
    used = (cases.codes(scope)[1].dense(WIDTH) + cases.donor_codes(scope)[1].dense(WIDTH)).sum(0) > 0  # [T, F]
    weight = change[1][1][:, 0].square()
    roles = {role: cases.batch.roles == role for role in dict.fromkeys(cases.batch.roles.tolist())}
    for other, gap in zip(pools[1].order[0], pools[1].gaps[0], strict=True):
        share = sum(float(weight[at].sum()) for at in roles.values() if used[at][:, other].any()) / float(weight.sum())
        assert gap == pytest.approx(abs(float(norms[other] / norms[2]) - 1) + 1 - share, abs=1e-7)


@pytest.mark.parametrize("mode", ["free", "frozen_attention", "direct", "generate"])
def test_trials_run_the_drawn_controls_on_the_first_cases(subject, mode: str) -> None:
    scope, cases = subject
    inputs = tuple(scope.vlm.prepare(PROMPT, [tiny_image(i)]) for i in range(4))
    cases = replace(cases, inputs=inputs)
    setting, do = Setting(mode=mode, matched=2, random_direction=2, positions="image", draws_on=2), Carry(SOME)
    table = run_trials(scope, [Trial("do", do, [cases], [setting])], seed=3)
    assert table.groupby(["control", "draw"], sort=False).case.apply("".join).tolist() == ["abcd", *["ab"] * 4]
    few = cases.first(2)
    assert few is cases.first(2) and cases.first(9) is cases
    plan: Any = setting.restrict(do.plan(scope, few, 1.0), few.batch.roles, scope.adapter.n_layers)
    pools = matched_pools(scope, do, few, 1.0, plan)
    for draw in control_draws(3, 2):
        drawn = matched_plan(scope, do, few, 1.0, plan, pools, draw)
        others = Carry({layer: edit.features for layer, edit in drawn.items()})
        expected = setting.restrict(others.plan(scope, few, 1.0), few.batch.roles, scope.adapter.n_layers)
        rows = table[(table.control == "matched") & (table.draw == draw)]
        if mode != "generate":
            logits = run_edited(scope, few.batch, expected, mode, few.base)
            before, after = few.base.logits.log_softmax(-1), logits.log_softmax(-1)
            np.testing.assert_allclose(rows.kl, (before.exp() * (before - after)).sum(-1), rtol=1e-9, atol=1e-15)
    # Random directions are as long as the edit at every layer and position, though they change what comes after.
    own = table[table.control == ""].displacement_by_layer.iloc[:2]
    for _, rows in table[table.control == "random_direction"].groupby("draw"):
        np.testing.assert_allclose(np.stack(rows.displacement_by_layer), np.stack(own), rtol=1e-9)


def test_known_codes_spare_the_lowest_edited_layer_its_encoding(subject, monkeypatch) -> None:
    scope, cases = subject
    plan: Any = Carry(SOME).plan(scope, cases, 1.0)
    expected, encoded = run_edited(scope, cases.batch, plan), []
    for layer, transcoder in scope.transcoders.transcoders.items():
        encode = transcoder.encode
        monkeypatch.setattr(
            transcoder, "encode", lambda x, layer=layer, encode=encode: encoded.append(layer) or encode(x)
        )
    with editing(scope, plan, known=cases.codes(scope)):
        found = scope.forward(cases.batch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert encoded == [3] and isinstance(plan[1], LayerEdit)
