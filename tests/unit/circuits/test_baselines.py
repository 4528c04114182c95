"""Baselines of trials: writers of a planted circuit, parts of edits that add up, and where they act."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tests.maths.planted import ANSWERS, WIDTH, Planted, planted

from vlmscope.circuits import baselines
from vlmscope.circuits.baselines import Baselines, answer_writers, mean_outputs
from vlmscope.circuits.config import BASELINES, SettingConfig, TrialConfig, baselines_of, check_baselines
from vlmscope.circuits.operations import Ablate, Carry, Toward
from vlmscope.core.errors import UserError
from vlmscope.interventions.edits import AnyPlan
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
        pairs = self.made.subject
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
        pairs = made.subject
        base = base_run(made.scope, pairs.batch)
    cases = Cases("test", "planted", pairs.batch, base, pairs.tokens, pairs.other_tokens, ("a", "b", "c"), pairs.other,
                  pairs.other_logits)  # fmt: skip
    return Bench(made, cases, Baselines(made.scope, Pairs(made)))


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


def test_writers_are_the_same_when_a_part_of_the_vocabulary_is_read_first(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    scope, material = bench.made.scope, bench.baselines.material
    with exact_float64():
        asked = material.answers(bench.cases), material.prompts(bench.cases)
        usual = answer_writers(scope, *asked)
        monkeypatch.setattr(baselines, "TRIED", 3)
        less = answer_writers(scope, *asked)
    assert any((found >= 0).any() for found in usual.by_decoder.values())
    for layer in range(3):
        assert torch.equal(usual.by_decoder[layer], less.by_decoder[layer])
        torch.testing.assert_close(usual.logit[layer], less.logit[layer])


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
