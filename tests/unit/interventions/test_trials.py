"""Trials: restricted plans, outcomes and controls against plain loops, and tables of rates by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.unit.interventions.conftest import PROMPT

from vlmscope.circuits.operations import Ablate, Carry, Shift, Toward
from vlmscope.core.records import ROLES
from vlmscope.interventions.edits import set_features
from vlmscope.interventions.run import base_run, run_edited
from vlmscope.interventions.trials import FUTILE, Cases, Setting, Trial, layer_range, run_trials
from vlmscope.metrics.rates import rates, share_rate, trial_metrics, worst
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

MODES = ("free", "frozen_attention", "direct")


@pytest.fixture(scope="module")
def cases(exact_model) -> tuple[Scope, Cases]:
    """Three prompts, each with the next one as its donor; the target is what the donor is answered."""
    scope, inputs = exact_model
    batch = make_batch(scope.adapter, inputs)
    with exact_float64():
        base = base_run(scope, batch, MODES)
    donors, answer = batch.select([1, 2, 0]), base.logits.argmax(-1)
    target = base.logits[[1, 2, 0]].topk(3).indices[:, 2]
    ids = ("a", "b", "c")
    return scope, Cases(
        "test", "name", batch, base, answer, target, ids, donors, base.logits[[1, 2, 0]], tuple(inputs), PROMPT
    )


@pytest.fixture(scope="module")
def exact_model():
    with exact_float64():
        vlm = tiny_gemma3(11, dtype=torch.float64)
        width = vlm.adapter.d_model
        transcoders = random_set(vlm.adapter.n_layers, width, 40, 6, seed=6, dtype=torch.float64).requires_grad_(False)
        return Scope(vlm, transcoders), [vlm.prepare(PROMPT, [tiny_image(i)]) for i in range(3)]


SOME = {1: torch.tensor([2, 7]), 3: torch.tensor([5])}


@pytest.mark.parametrize(
    ("text", "ends"),
    [("all", (0, 7)), ("no_last", (0, 6)), ("3", (3, 3)), ("0-0", (0, 0)), ("0-5", (0, 5)), ("3-", (3, 7))],
)
def test_ranges_of_layers_have_both_ends(text: str, ends: tuple[int, int]) -> None:
    assert layer_range(text, 8) == ends


def test_a_setting_keeps_its_layers_and_positions(cases: tuple[Scope, Cases]) -> None:
    roles = cases[1].batch.roles
    every = torch.ones(len(roles), dtype=torch.bool)
    plan = {layer: set_features(torch.tensor([1]), torch.ones(1), every) for layer in range(4)}
    assert list(Setting(layers="no_last").restrict(plan, roles, 4)) == [0, 1, 2]
    assert list(Setting(layers="1-2").restrict(plan, roles, 4)) == [1, 2]
    for positions, kept in (("no_last", roles != "last"), ("image", roles == "image"), ("all", roles != "")):
        for edit in Setting(positions=positions).restrict(plan, roles, 4).values():
            assert edit.where.tolist() == kept.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_carrying_from_itself_changes_nothing(mode: str, cases: tuple[Scope, Cases]) -> None:
    scope, made = cases
    same = replace(made, donors=made.batch, donor_logits=None)
    nothing = Shift({1: (SOME[1], torch.zeros(made.batch.length, 2))})
    for do in (Carry(None), Carry(SOME), Toward(SOME), nothing):
        table = run_trials(scope, [Trial("same", do, [same], [Setting(mode=mode, matched=0)])])
        assert np.abs(table[["kl", "drop"]].to_numpy()).max() < 1e-12 and not table.changed.any()


def test_in_mode_direct_logits_are_affine_in_what_is_added(cases: tuple[Scope, Cases]) -> None:
    scope, made = cases
    do = Shift({1: (SOME[1], torch.ones(made.batch.length, 2)), 3: (SOME[3], torch.ones(made.batch.length, 1))})
    once, twice = (
        run_edited(scope, made.batch, do.plan(scope, made, strength), "direct", made.base) - made.base.logits
        for strength in (1.0, 2.0)
    )
    assert once.abs().max() > 1e-3
    torch.testing.assert_close(twice, 2 * once, rtol=1e-9, atol=1e-12)


def test_outcomes_are_those_of_a_plain_loop(cases: tuple[Scope, Cases]) -> None:
    scope, made = cases
    table = run_trials(scope, [Trial("patch", Carry(SOME), [made], [Setting(matched=0, strength=3.0)])])
    logits = run_edited(scope, made.batch, Carry(SOME).plan(scope, made, 3.0))
    found: Any
    for row, found in enumerate(table.itertuples()):
        before, after = (x[row].log_softmax(-1) for x in (made.base.logits, logits))
        own, goal = int(made.answer[row]), int(made.target[row])
        assert found.case == made.ids[row] and found.said == int(logits[row].argmax())
        assert found.hit == (found.said == goal) and found.changed == (found.said != own)
        assert found.drop == pytest.approx(float(before[own] - after[own]), rel=1e-9)
        assert found.kl == pytest.approx(float((before.exp() * (before - after)).sum()), rel=1e-9)
        assert made.donor_logits is not None
        gap = [float(x[row, goal] - x[row, own]) for x in (made.base.logits, logits, made.donor_logits)]
        assert found.recovered == pytest.approx((gap[1] - gap[0]) / (gap[2] - gap[0]), rel=1e-9)
    assert (table.features == 3).all() and (table.operation == "patch").all()


@pytest.mark.parametrize("cross_layer", [False, True])
@pytest.mark.parametrize("mode", [*MODES, "generate"])
def test_displacement_is_what_is_added_at_each_layer(mode: str, cross_layer: bool, cases: tuple[Scope, Cases]) -> None:
    """Against what the modules before and after each edit see."""
    scope, made = cases
    n_layers, setting = scope.adapter.n_layers, Setting(mode=mode, random_direction=1, positions="no_last")
    if cross_layer:
        sets = random_set(n_layers, scope.adapter.d_model, 40, 6, seed=6, dtype=torch.float64, cross_layer=True)
        scope = Scope(scope.vlm, sets.requires_grad_(False))
        made = replace(made, base=base_run(scope, made.batch, MODES))
    before: list[dict[int, torch.Tensor]] = []  # of each run
    after: list[dict[int, torch.Tensor]] = []
    handles = []

    def watch(module: torch.nn.Module, seen: list[dict[int, torch.Tensor]], layer: int, output: bool) -> None:
        def hook(_module: Any, args: tuple, out: torch.Tensor) -> None:
            if len(args[0][0]) == made.batch.length:  # not a generated token
                if layer == 0:
                    seen.append({})
                seen[-1][layer] = out if output else args[0]

        handles.append(module.register_forward_hook(hook))

    made.codes(scope), made.donor_codes(scope)  # so that only runs are watched
    for layer in range(n_layers):
        watch(scope.adapter.mlp(layer), before, layer, output=True)
        watch(scope.adapter.norms(layer).mlp_out_post, after, layer, output=False)
    table = run_trials(scope, [Trial("patch", Shift(shifts(made)), [made], [setting])])
    for handle in handles:
        handle.remove()
    # Mode direct does not keep what the MLPs compute.
    written = [made.base.written if mode == "direct" and run < 2 else found for run, found in enumerate(before)]
    assert len(written) == 3
    for (_, rows), raw, edited in zip(table.groupby("control", sort=False), written, after, strict=True):
        by_layer = [(edited[layer] - raw[layer]).norm(dim=(1, 2)).tolist() for layer in range(n_layers)]
        found = np.stack(rows.displacement_by_layer.to_list())
        np.testing.assert_allclose(found, np.transpose(by_layer), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(rows.displacement, np.linalg.norm(found, axis=1), rtol=1e-12)
        squares = np.square(np.stack(rows.displacement_by_role.to_list()))
        np.testing.assert_allclose(rows.displacement**2, squares.sum(1), rtol=1e-12)
        assert not squares[:, ROLES.index("last")].any()
        expected = {1, 2, 3} if cross_layer else {1, 3}
        assert set(np.flatnonzero(found.any(0)).tolist()) == expected & set(range(n_layers))
    first, random = (table[table.control == control].displacement for control in ("", "random_direction"))
    np.testing.assert_allclose(first, random, rtol=1e-9)


def test_controls_that_move_next_to_nothing_are_refused(cases: tuple[Scope, Cases], capsys) -> None:
    """The strongest half of a layer's features, ablated next to the others."""
    scope, made = cases
    strength = made.codes(scope)[1].dense(40).square().sum((0, 1))
    setting = Setting(matched=2, random_direction=1)
    do = Ablate({1: strength.topk(20).indices})
    table = run_trials(scope, [Trial("off", do, [made], [setting])])
    moved: Any = table.groupby(["control", "draw"])[["moved", "weak"]].agg(["min", "max"])
    assert (moved["moved"]["min"] == moved["moved"]["max"]).all()
    assert moved["weak"]["max"].to_dict() == moved["weak"]["min"].to_dict() == {
        ("", 0): False, ("matched", 0): True, ("matched", 1): True, ("random_direction", 0): False,
    }  # fmt: skip
    share = np.median(moved["moved"]["min"]["matched"])
    said = f"one must move at least 50% of what the edit moves: off/main matched: 2 of 2 draws move {share:.2g} of it"
    assert capsys.readouterr().out.strip() == f"controls refused, since {said}"
    more = run_trials(scope, [Trial("off", do, [made], [Setting(matched=30)])])
    assert more[more.control == "matched"].draw.nunique() == FUTILE  # the others would be refused too
    # By hand: the least over the roles that count.
    parts = {key: np.median(np.stack(rows.displacement_by_role), 0) for key, rows in table.groupby(["control", "draw"])}
    whole = parts["", 0]
    counted = whole**2 >= 0.1 * (whole**2).sum()
    assert (parts["matched", 1] / whole)[counted].min() == pytest.approx(moved["moved"]["min"]["matched", 1])


def shifts(made: Cases) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Changes that do not depend on the run, so that a random direction is as long at every layer."""
    return {layer: (rows, torch.ones(made.batch.length, len(rows))) for layer, rows in SOME.items()}


def test_answers_are_generated_and_cases_can_be_chosen(cases: tuple[Scope, Cases]) -> None:
    scope, made = cases
    few = made.select([2, 0])
    assert few.ids == ("c", "a") and torch.equal(few.answer, made.answer[[2, 0]])
    table = run_trials(scope, [Trial("none", Ablate({1: SOME[1][:0]}), [few], [Setting(mode="generate", matched=0)])])
    assert table.said.tolist() == few.answer.tolist() and not table.changed.any() and not table.hit.any()


def tidy(hits: dict[tuple[str, str, int], list[bool]]) -> pd.DataFrame:
    """A table of (question, control, draw) -> hits."""
    return pd.DataFrame(
        {"question": question, "control": control, "draw": draw, "hit": hit, "features": 4}
        for (question, control, draw), found in hits.items()
        for hit in found
    )


def test_rates_worst_and_corrected_p_values_are_those_by_hand() -> None:
    name, none = [True] * 9 + [False], [False] * 10
    half, some = [True] * 5 + [False] * 5, [True] * 2 + [False] * 8
    controls = {("name", "matched", 0): none, ("name", "matched", 1): some, ("colour", "matched", 0): some}
    table = tidy({("name", "", 0): name, ("colour", "", 0): half} | controls)
    found = rates(table, ["question"])
    expected = share_rate(name)
    assert (found.value["name"], found.ci_low["name"], found.ci_high["name"]) == (
        0.9,
        expected.ci_low,
        expected.ci_high,
    )
    assert (found.cases["name"], found.edited["name"], found.matched["name"]) == (10, 4, 0.1)
    assert found.p["name"] == 1 / 3 and found.p["colour"] == 1 / 2  # above two draws, above one
    assert found.q.isna().all()  # so few draws test nothing
    row = worst(rates(table.assign(setting="main"), ["setting", "question"])).loc["main"]
    assert (row.value, row.matched) == (0.5, 0.2)  # the least rate next to the highest control


def test_baselines_count_only_where_they_are_asked_for() -> None:
    rows = {"": [True, True, False, True], "only_writers": [False, True, False, False]}
    table: Any = pd.DataFrame(
        {"operation": "steer", "setting": "main", "mode": "free", "positions": "all", "layers": "all", "strength": 1.0,
         "limit": None, "question": question, "control": "", "draw": 0, "features": 3, "case": case, "hit": hit,
         "baseline": name}
        for name, hits in rows.items()
        for question in ("name", "colour")
        for case, hit in enumerate(hits if question == "name" else [*hits[:3], False])
    )  # fmt: skip
    assert rates(table, ["question"]).value.to_dict() == {"name": 0.75, "colour": 0.5}
    assert rates(table, ["question", "baseline"]).value["name", "only_writers"] == 0.25
    found = trial_metrics(table, {}, {})
    assert (found["steer/main"], found["steer/main/only_writers"]) == (0.5, 0.25)
    assert set(found) == {"steer/main", "steer/main_ci_low", "steer/main_ci_high", "steer/main/only_writers",
                          "steer/main/name", "steer/main/colour"}  # fmt: skip
