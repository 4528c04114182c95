"""Baselines of trials: writers of a planted circuit, parts of edits that add up, and where they act."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.maths.planted import ANSWERS, WIDTH, Planted, planted

from vlmscope.circuits.baselines import Baselines, answer_writers, mean_outputs
from vlmscope.circuits.config import BASELINES, SettingConfig, TrialConfig, baselines_of, check_baselines
from vlmscope.circuits.operations import Ablate, Carry, Shift, Toward
from vlmscope.circuits.pairs import most_changed
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.interventions.edits import AnyPlan, OutputEdit, WholeEdit
from vlmscope.interventions.run import base_run, run_edited
from vlmscope.interventions.trials import Cases, Operation, Setting, Trial, run_trials
from vlmscope.models.base import exact_float64

CARRY = TrialConfig("carry")


@dataclass
class Pairs:
    """What baselines need, of the planted pairs."""

    made: Planted
    seen: list[str] = field(default_factory=list)

    def answers(self, cases: Cases) -> list[int]:
        return [self.made.scope.vlm.tokenizer.convert_tokens_to_ids(word) for word in ANSWERS]

    def prompts(self, cases: Cases) -> list[tuple[Any, torch.Tensor]]:
        pairs = self.made.subject.pairs
        return [(pairs.batch, pairs.tokens), (pairs.other, pairs.other_tokens)]

    def difference(self, cases: Cases) -> Any:
        batches, tokens = zip(*self.prompts(cases), strict=True)
        before, after = mean_outputs(self.made.scope, batches, tokens).values()
        return {role: {n: (mean - before[role][n])[None] for n, mean in of.items()} for role, of in after.items()}

    def unconfirmed(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        self.seen.append(cases.question)
        return Carry({2: torch.tensor([0])})


@dataclass
class Bench:
    made: Planted
    cases: Cases
    baselines: Baselines

    def features(self, *names: str) -> dict[int, torch.Tensor]:
        table: dict[int, list[int]] = {}
        for layer, _, index in (self.made.features[name] for name in names):
            table.setdefault(layer, []).append(index)
        return {layer: torch.tensor(indices) for layer, indices in sorted(table.items())}

    def rows(self, do: Operation, names: tuple[str, ...], mode: str = "free", **setting: Any) -> dict[str, Any]:
        """Mean recovered share of the trial ("") and of baselines."""
        where = Setting(mode=mode, matched=0, **setting)
        trials = [Trial("carry", do, [self.cases], [where])]
        trials += [
            Trial("carry", self.baselines.operation(name, CARRY, do, self.cases, None), [self.cases], [where], name)
            for name in names
        ]
        return run_trials(self.made.scope, trials).groupby("baseline").recovered.mean().to_dict()

    def moved(self, plan: AnyPlan) -> torch.Tensor:
        """What a plan changes about the logits in mode direct."""
        base = self.cases.base
        return run_edited(self.made.scope, self.cases.batch, plan, "direct", base) - base.logits


@pytest.fixture(scope="module", params=[0, 3])
def bench(request: pytest.FixtureRequest) -> Bench:
    with exact_float64():
        made = planted(request.param)
        pairs = made.subject.pairs
        base = base_run(made.scope, pairs.batch)
    cases = Cases("test", "planted", pairs.batch, base, pairs.tokens, pairs.other_tokens, ("a", "b", "c"), pairs.other,
                  pairs.other_logits)  # fmt: skip
    return Bench(made, cases, Baselines(made.scope, Pairs(made)))


def test_writers_are_the_features_that_end_in_the_answer(bench: Bench) -> None:
    """C and C' write the answers, A and B feed them; I, which lowers one answer, raises all other words alike."""
    found = bench.baselines.writers(bench.cases)
    written = {
        name: {FeatureId(layer, int(index)) for layer, table in columns.items() for index in (table >= 0).nonzero()}
        for name, columns in (("decoder", found.by_decoder), ("measured", found.measured))
    }
    for writer, word in (("C", "one"), ("C'", "two")):
        layer, _, index = bench.made.features[writer]
        assert FeatureId(layer, index) in written["decoder"] & written["measured"]
        assert found.words[int(found.of(layer)[index])] == word
    others = {FeatureId(layer, index) for name, (layer, _, index) in bench.made.features.items() if name[0] in "AB"}
    assert not others & (written["decoder"] | written["measured"])
    # One more feature moves both answers, by way of attention.
    assert {layer for layer, _ in ((f.layer, f.index) for f in written["decoder"])} <= {0, 2}


def test_measured_effect_is_that_of_removing_a_feature(bench: Bench) -> None:
    scope, cases = bench.made.scope, bench.cases
    with exact_float64():
        found = answer_writers(scope, bench.baselines.material.answers(cases), bench.baselines.material.prompts(cases))
        token, number = int(cases.answer[0]), found.words.index("one")
        for layer in range(3):
            for index in range(0, WIDTH, 7):
                moved = bench.moved(Ablate({layer: torch.tensor([index])}).plan(scope, cases, 1.0))
                effect = -(moved[:, token] - moved.mean(-1)).mean()
                assert float(found.effect[layer][index, number]) == pytest.approx(float(effect), abs=1e-9)


def test_what_computes_the_answer_carries_it_without_its_writers(bench: Bench) -> None:
    """With B carried, C follows by itself unless MLPs are frozen; a circuit of C alone has nothing without it."""
    with exact_float64():
        whole = Carry(bench.features("A", "A'", "B", "B'", "C", "C'"))
        names = ("without_writers", "only_writers")
        free, direct = (bench.rows(whole, names, mode) for mode in ("free", "direct"))
        assert min(free.values()) > 0.5
        assert direct["only_writers"] > 0.5 and abs(direct["without_writers"]) < 1e-9
        copying = bench.rows(Carry(bench.features("C", "C'")), (*names, "complement"))
        assert copying["without_writers"] == pytest.approx(0, abs=1e-12) and copying["only_writers"] == copying[""]
        assert copying["complement"] > 0.5


def test_parts_of_an_edit_add_up(bench: Bench) -> None:
    """In mode direct the logits are affine in what is written: with and without writers, chosen and complement."""
    scope, cases, own = bench.made.scope, bench.cases, bench.features("A", "B'", "C", "C'")
    everything = {layer: torch.arange(WIDTH) for layer in range(3)}
    for do, whole in ((Carry(own), Carry(None)), (Ablate(own), Ablate(everything)),
                      (Toward(own, ()), Toward(everything, ()))):  # fmt: skip
        strength = 0.5 if isinstance(do, Toward) else 1.0
        with exact_float64():
            plan, every = (each.plan(scope, cases, strength) for each in (do, whole))
            parts = {
                name: bench.baselines.operation(name, CARRY, do, cases, None).plan(scope, cases, strength)
                for name in ("without_writers", "only_writers", "complement")
            }
            moved = {name: bench.moved(part) for name, part in parts.items()}
            assert torch.allclose(moved["without_writers"] + moved["only_writers"], bench.moved(plan), atol=1e-9)
            assert torch.allclose(moved["complement"] + bench.moved(plan), bench.moved(every), atol=1e-9)
            halves = [bench.baselines.operation(name, CARRY, whole, cases, None).plan(scope, cases, strength)
                      for name in ("without_writers", "only_writers")]  # fmt: skip
            assert torch.allclose(sum(map(bench.moved, halves)), bench.moved(every), atol=1e-9)
    assert sum(len(edit.features) for edit in parts["complement"].values()) == 3 * WIDTH - 4


def test_other_writers_write_the_same_words_at_the_same_level(bench: Bench) -> None:
    """Of a circuit with C alone, whose layer has one more writer of its word made for this."""
    layer, _, index = bench.made.features["C"]
    found, cases = bench.baselines.writers(bench.cases), bench.cases
    free = next(i for i in range(WIDTH) if found.of(layer)[i] < 0)
    altered = {layer: found.by_decoder[layer].clone()}
    altered[layer][free] = found.of(layer)[index]
    mine = Baselines(bench.made.scope, bench.baselines.material)
    mine._writers[("planted",)] = replace(found, by_decoder={**found.by_decoder, **altered})
    do = Carry({layer: torch.tensor([index, bench.made.features["C'"][2]])})
    first = do.plan(bench.made.scope, cases, 1.0)[layer]
    other = mine.operation("other_writers", CARRY, do, cases, None).plan(bench.made.scope, cases, 1.0)[layer]
    assert other.features.tolist() == [free]  # C' has no double outside
    assert torch.equal(other.value, first.value[..., :1])


def test_the_difference_of_means_is_added_where_the_trial_acts(bench: Bench) -> None:
    scope, cases, do = bench.made.scope, bench.cases, Carry(bench.features("B", "C"))
    variant = bench.baselines.operation("difference_of_means", CARRY, do, cases, None)
    with exact_float64():
        plan = variant.plan(scope, cases, 1.0)
        assert list(plan) == [1, 2] and all(isinstance(edit, OutputEdit) for edit in plan.values())
        both = Pairs(bench.made).difference(cases)
        expected = torch.stack([both[role][2][0] for role in cases.batch.roles.tolist()])
        assert torch.allclose(plan[2].value[0], expected)
        found = bench.rows(do, ("difference_of_means",), positions="last", layers="2")
        assert found["difference_of_means"] > 0.5
        moved = bench.moved(Setting(positions="last", layers="2").restrict(plan, cases.batch.roles, 3))
        last = torch.zeros(cases.batch.length, 1)
        last[-1] = 1
        by_hand = bench.moved(
            {2: OutputEdit((expected * last)[None], torch.ones(cases.batch.length, dtype=torch.bool))}
        )
        assert torch.allclose(moved, by_hand, atol=1e-12) and moved.abs().max() > 1e-3


@pytest.mark.parametrize(("read", "edited"), [((0, 1, 2, 3), [0]), ((0, 1, 1, 3), [0, 1]), ((0, 0, 0, 0), [0, 1, 2]),
                                              ((0, 2, 3, 3), [])])  # fmt: skip
def test_before_readable_stops_where_the_lens_reads_the_answer(
    read: tuple[int, ...], edited: list[int], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`read`: of three donors, in how many the target is first in the state before each layer and after the last."""
    ranks = [np.ones((3, 4, 1), int), 1 - (np.arange(3)[:, None] < np.array(read)).astype(int)[..., None]]
    monkeypatch.setattr("vlmscope.circuits.baselines.token_lens", lambda *_: ranks.pop(0))
    mine = Baselines(bench.made.scope, bench.baselines.material)
    variant = mine.operation("before_readable", CARRY, Carry(bench.features("A", "B", "C")), bench.cases, None)
    assert list(variant.plan(bench.made.scope, bench.cases, 1.0)) == edited
    lens = mine.tables()["lens"]
    assert lens[lens.run == "recipient"].read.max() == 0 and lens.after_layer.tolist() == [-1, 0, 1, 2] * 2
    donors = lens[lens.run == "donor"]
    assert donors.read.tolist() == [count / 3 for count in read] and donors.edited.sum() == len(edited)


def test_most_changed_features_are_the_distractors(bench: Bench) -> None:
    """Contrast alone prefers features with large decoder rows that nothing reads."""
    pairs = bench.made.subject.pairs
    found = most_changed(bench.made.scope, pairs, 12)
    truth = {FeatureId(layer, index) for layer, _, index in bench.made.features.values()}
    assert len(found) == 12 and len(truth & set(found)) < 6


def test_edits_without_features_are_left_out_of_generated_tokens_unless_asked(bench: Bench) -> None:
    code = Carry(None).plan(bench.made.scope, bench.cases, 1.0)[0]
    assert isinstance(code, WholeEdit) and len(replace(code, kept=torch.arange(WIDTH) < 5).features) == 5
    change = {0: (torch.tensor([1]), torch.ones(bench.cases.batch.length, 1))}
    variant = bench.baselines.operation("difference_of_means", CARRY, Shift(change), bench.cases, None)
    assert variant.plan(bench.made.scope, bench.cases, 1.0)[0].generated is None


@pytest.mark.parametrize(
    ("do", "features", "defined"),
    [
        ("exchange", None, {"without_writers", "only_writers", "other_writers", "unconfirmed", "difference_of_means",
                            "before_readable"}),
        ("carry", "all", {"without_writers", "only_writers", "difference_of_means", "before_readable"}),
        ("ablate", None, {"without_writers", "only_writers", "other_writers", "complement", "unconfirmed",
                          "before_readable"}),
        ("level", None, set()),
    ],
)  # fmt: skip
def test_baselines_are_run_where_they_are_defined(do: str, features: str | None, defined: set[str]) -> None:
    setting = SettingConfig(baselines=list(BASELINES))
    trial = TrialConfig(do, features)
    assert set(baselines_of(trial, setting)) == defined
    for name in BASELINES:
        if name in defined:
            check_baselines({"it": trial}, {"main": SettingConfig(baselines=[name])})
        else:
            with pytest.raises(UserError, match=rf"settings.main.baselines: {name} is defined of none"):
                check_baselines({"it": trial}, {"main": SettingConfig(baselines=[name])})


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(UserError, match="settings.baselines=without_writer: no such choice; did you mean"):
        SettingConfig(baselines=["without_writer"])
