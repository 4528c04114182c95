"""The claims of an experiment are right where the circuit is planted, and ten faults of an experiment do not go
unnoticed: a claim falls, a number leaves its range, or a control is refused.

A mean difference does as much as any of these circuits, since each answer is one direction of the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import pandas as pd
import pytest
import torch
from planted import ANSWERS, PROMPTS, WIDTH, Planted, planted
from torch import Tensor

from vlmscope.circuits import operations
from vlmscope.circuits.baselines import Baselines, mean_outputs
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import SettingConfig, TrialConfig
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.operations import Ablate, Carry, Exchange
from vlmscope.circuits.pairs import PairSubject, most_changed, pair_subject
from vlmscope.config.schema import HeadlineConfig, numbers_of
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.interventions import trials
from vlmscope.interventions.edits import by_layer, donor_activations
from vlmscope.interventions.run import base_run
from vlmscope.interventions.trials import Cases, Operation, run_trials
from vlmscope.metrics.claims import claims
from vlmscope.metrics.rates import counted, trial_metrics
from vlmscope.models.base import exact_float64
from vlmscope.scope import Scope

FORMS = (
    "in the other {} ?", "what and this {} ?", "is the other {} ?", "and this is {} ?", "what in the {} ?",
    "this is the {} ?", "the other is {} ?", "and the other {} ?", "what other is {} ?", "the one in {} ?",
)  # fmt: skip
SIDES, QUESTION = ("red", "blue"), "planted"
CALM = ("this", "is", "the", "in")  # in place of them, in unrelated prompts
TRIALS = {
    "carry": TrialConfig("carry"),
    "ablate": TrialConfig("ablate", measure="changed"),
    "steer": TrialConfig("exchange", gate=0.5, strength=5),
    "whole": TrialConfig("carry", features="all", measure="recovered"),
    "upstream": TrialConfig("carry", features="upstream"),
}
BASELINES = ["without_writers", "complement", "unconfirmed", "difference_of_means"]
SETTINGS = {
    "main": SettingConfig(of=["carry", "ablate"], matched=20, baselines=BASELINES),
    "one_way": SettingConfig(of=["steer"], cases="one_way", matched=20),
    "unrelated": SettingConfig(of=["steer"], cases="unrelated", matched=0, measures=["changed"]),
    "everything": SettingConfig(of=["whole"], mode=["direct"], matched=0),
    "frozen": SettingConfig(of=["upstream"], mode=["direct"], matched=0),
}
HEADLINE = {
    "whole/everything": HeadlineConfig(0.99, 1.01, "recovered share when every feature is carried"),
    "upstream/frozen": HeadlineConfig(0, 0.1, "answers that follow what feeds the writers, MLPs held"),
}


@dataclass
class Experiment:
    """An experiment on a planted model: pairs in both directions, some to choose on and others to test.

    `circuit` names the features that it calls its circuit.
    """

    made: Planted
    circuit: tuple[FeatureId, ...]
    settings: dict[str, SettingConfig] = field(default_factory=lambda: SETTINGS)
    carry_strength: float = 1.0
    change: Callable[[Cases], Cases] = lambda cases: cases

    @property
    def scope(self) -> Scope:
        return self.made.scope

    @cached_property
    def tokens(self) -> list[int]:
        """The answer of each side."""
        first = self.scope.forward(self.scope.batch(self._prompts(PROMPTS_OF, SIDES[0])))[0].argmax()
        tokens = [self.scope.vlm.tokenizer.convert_tokens_to_ids(word) for word in ANSWERS]
        return tokens if int(first) == tokens[0] else tokens[::-1]

    def _prompts(self, forms: tuple[str, ...], word: str) -> list[Any]:
        return [self.scope.vlm.prepare(form.format(word), []) for form in forms]

    def pairs(self, forms: tuple[str, ...]) -> PairSubject:
        """Each form in both directions."""
        one, two = (self._prompts(forms, word) for word in SIDES)
        tokens = torch.tensor(self.tokens).repeat_interleave(len(forms))
        modes = ("free", "direct")
        return pair_subject(self.scope, QUESTION, one + two, two + one, tokens, tokens.flip(0), 2, modes=modes)

    @cached_property
    def train(self) -> PairSubject:
        return self.pairs(PROMPTS_OF)

    def features(self, *names: str) -> dict[int, Tensor]:
        """The circuit by layer; of features that have names, those that start with one of these."""
        known = {FeatureId(layer, index): name for name, (layer, _, index) in self.made.features.items()}
        return by_layer(self.scope.transcoders, [f for f in self.circuit if not names or known.get(f, "")[:1] in names])

    # What baselines need.
    def answers(self, cases: Cases) -> list[int]:
        return self.tokens

    def prompts(self, cases: Cases) -> list[Any]:
        return [(self.train.batch, self.train.tokens), (self.train.other, self.train.other_tokens)]

    def difference(self, cases: Cases) -> Any:
        means = mean_outputs(self.scope, *zip(*self.prompts(cases), strict=True))
        ends = list(zip(cases.answer.tolist(), cases.target.tolist(), strict=True))
        return {
            role: {n: torch.stack([means[b][role][n] - means[a][role][n] for a, b in ends]) for n in by_layer}
            for role, by_layer in means[self.tokens[0]].items()
        }

    def unconfirmed(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        chosen = by_layer(self.scope.transcoders, most_changed(self.scope, self.train, len(self.circuit)))
        return Ablate(chosen) if trial.do == "ablate" else Carry(chosen)

    def exchange(self) -> Exchange:
        """From the first side's features of the circuit to the second's, at the levels of training prompts."""
        batch, roles = self.train.batch, self.train.batch.roles
        active = donor_activations(self.scope, batch, self.features())
        half = batch.size // 2
        nodes, levels = {}, {}
        for side, rows in zip(SIDES, (slice(None, half), slice(half, None)), strict=True):
            mine = []
            for layer, (features, values) in active.items():
                sums = values.sum(1)
                here, there = sums[rows].mean(0), sums.mean(0) * 2 - sums[rows].mean(0)
                mine += [FeatureId(layer, int(f)) for f in features[here > there]]
            nodes[side] = Supernode(side, tuple(CircuitFeature(f, "", 0.0, 1.0) for f in mine))
            mean = {n: v[rows].mean(0) for n, (_, v) in donor_activations(
                self.scope, batch, by_layer(self.scope.transcoders, mine)).items()}  # fmt: skip
            levels[side] = {
                f"{QUESTION}:{role}": {n: v[torch.from_numpy(roles == role)].mean(0) for n, v in mean.items()}
                for role in dict.fromkeys(roles.tolist())
            }
        return Exchange(Circuit(nodes, levels), *SIDES, 0.5, by_question=False)

    def operation(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        if trial.do == "exchange":
            return self.exchange()
        if trial.do == "ablate":
            return Ablate(self.features())
        if trial.features is not None:
            return Carry(None if trial.features == "all" else self.features("A", "B"))
        return Carry(self.features())

    def cases(self) -> dict[str, list[Cases]]:
        found = self.pairs(FORMS)
        ids = tuple(map(str, range(found.size)))
        test = Cases("test", QUESTION, found.batch, found.base, found.tokens, found.other_tokens, ids, found.other,
                     found.other_logits)  # fmt: skip
        test = self.change(test)
        half = found.size // 2
        calm = self.scope.batch([prompt for word in CALM for prompt in self._prompts(FORMS, word)])
        base = base_run(self.scope, calm, ["free"])
        other = torch.full((calm.size,), self.tokens[1])
        unrelated = Cases(
            "unrelated", QUESTION, calm, base, base.logits.argmax(-1), other, tuple(map(str, range(calm.size)))
        )
        one_way = replace(test.select(range(half)), name="one_way")
        return {"test": [test], "one_way": [one_way], "unrelated": [unrelated]}

    def run(self) -> tuple[dict[str, set[str]], dict[str, float], pd.DataFrame]:
        """The claims shown of each trial, the metrics, and all claims."""
        given = {name: replace(trial, strength=self.carry_strength) if name == "carry" else trial
                 for name, trial in TRIALS.items()}  # fmt: skip
        with exact_float64(), torch.no_grad():
            cases = self.cases()
            declared = Declared(cases, self.operation, baselines=Baselines(self.scope, self))
            trials = [*declared.trials(given, self.settings)]
            table = run_trials(self.scope, trials)
            planned = sum(trial.work(self.scope.transcoders.layers) for trial in trials)
            # What the progress bar counts to; draws of controls end early where none of them counts.
            assert len(table) == planned or (len(table) < planned and table.weak.any())
        measures = {f"{o}/{s}": counted(given, self.settings, o, s)[0]
                    for o, s in table[["operation", "setting"]].drop_duplicates().to_numpy()}  # fmt: skip
        found = claims(table, measures)
        shown = {name: set(rows.claim[rows.shown]) for name, rows in found.groupby("operation")}
        return shown, trial_metrics(table, given, self.settings), found


PROMPTS_OF = tuple(form for form, _, _ in PROMPTS)


def named(made: Planted, path: str = "") -> tuple[FeatureId, ...]:
    """Named features but the inhibitor; of the first path alone for "1"."""
    return tuple(
        FeatureId(layer, index)
        for name, (layer, _, index) in made.features.items()
        if name != "I" and not (path == "1" and "2" in name)
    )


@cache
def model(kind: str, seed: int) -> Planted:
    return planted(seed, kind="two steps" if kind == "none" else kind, says=True)


def experiment(kind: str, seed: int = 0) -> Experiment:
    with exact_float64(), torch.no_grad():
        made = model(kind, seed)
        if kind == "none":
            real = {FeatureId(layer, index) for layer, _, index in made.features.values()}
            whole = Experiment(made, ())
            changed = [f for f in most_changed(made.scope, whole.train, 100) if f not in real]
            return Experiment(made, tuple(changed[:6]))
        return Experiment(made, named(made, "1"))


EVERY = {"sufficient", "necessary", "specific", "more_than_copying", "found_by_the_graph"}
TRUTH = {  # kind -> claims of carrying the circuit, of removing it
    "two steps": (EVERY, EVERY - {"sufficient"}),
    "copying": (EVERY - {"more_than_copying"}, EVERY - {"sufficient", "more_than_copying"}),
    "redundant": ({"sufficient", "found_by_the_graph"}, set[str]()),  # a draw may be the other path
    "none": (set[str](), set[str]()),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", TRUTH)
def test_claims_are_right_where_the_circuit_is_known(kind: str, seed: int) -> None:
    made = experiment(kind, seed)
    # Of two paths the one that is carried is the weaker: at its own level the other one's answer wins.
    made.settings, made.carry_strength = {"main": SETTINGS["main"]}, 3.0 if kind == "redundant" else 1.0
    shown, _, found = made.run()
    assert (shown["carry"], shown["ablate"]) == TRUTH[kind], found.to_string()


Fault = Callable[[Experiment, pytest.MonkeyPatch], Experiment]


def no_fault(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    return made


def control_that_edits_nothing(made: Experiment, patch: pytest.MonkeyPatch) -> Experiment:
    patch.setattr(trials, "matched_plan", lambda *_: {})
    return made


def shuffled_circuit(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    order = torch.randperm(WIDTH, generator=torch.manual_seed(0)).tolist()
    return replace(made, circuit=tuple(FeatureId(f.layer, order[f.index]) for f in made.circuit))


def own_transcoders(made: Experiment, fault: Callable[[Any], Any]) -> Experiment:
    """Transcoders that no longer are what the model computes."""
    copied = deepcopy(made.scope.transcoders)
    for layer in copied.layers:
        fault(copied[layer])
    return replace(made, made=replace(made.made, scope=Scope(made.scope.vlm, copied)))


def dropped_bias(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    return own_transcoders(made, lambda transcoder: transcoder.b_enc.zero_())


def permuted_decoder_rows(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    return own_transcoders(made, lambda transcoder: transcoder.W_dec.copy_(transcoder.W_dec.roll(1, 0)))


def wrong_sign(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    return own_transcoders(made, lambda transcoder: transcoder.W_dec.neg_())


def ignored_gate(made: Experiment, patch: pytest.MonkeyPatch) -> Experiment:
    patch.setattr(made, "exchange", lambda do=made.exchange: replace(do(), gate=None))
    return made


def donors_of_other_recipients(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    def turned(cases: Cases) -> Cases:
        assert cases.donors is not None
        rows = torch.arange(cases.batch.size).roll(cases.batch.size // 2)
        return replace(cases, donors=cases.donors.select(rows))

    return replace(made, change=turned)


def shuffled_labels(made: Experiment, _: pytest.MonkeyPatch) -> Experiment:
    def shuffled(cases: Cases) -> Cases:
        return replace(cases, target=cases.target[torch.randperm(len(cases.target), generator=torch.manual_seed(1))])

    return replace(made, change=shuffled)


def averaged_donors(made: Experiment, patch: pytest.MonkeyPatch) -> Experiment:
    def averaged(*args: Any) -> Any:
        return {n: (f, a.mean(0, keepdim=True).expand_as(a)) for n, (f, a) in donor_activations(*args).items()}

    patch.setattr(operations, "donor_activations", averaged)
    return made


def mode_that_freezes_nothing(made: Experiment, patch: pytest.MonkeyPatch) -> Experiment:
    real = trials.run_edited
    patch.setattr(trials, "run_edited", lambda scope, batch, plan, mode, *rest: real(scope, batch, plan, "free", *rest))
    return made


# Fault -> the claim that must fall, or the number that must leave its range.
NOTICED: dict[Fault, str] = {
    no_fault: "",
    control_that_edits_nothing: "carry specific",
    shuffled_circuit: "carry sufficient",
    dropped_bias: "whole/everything",
    permuted_decoder_rows: "carry sufficient",
    wrong_sign: "steer sufficient",
    ignored_gate: "steer specific",
    donors_of_other_recipients: "carry sufficient",
    shuffled_labels: "carry sufficient",
    averaged_donors: "carry sufficient",
    mode_that_freezes_nothing: "upstream/frozen",
}


@pytest.mark.parametrize("fault", NOTICED, ids=lambda fault: fault.__name__)
def test_a_fault_does_not_go_unnoticed(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    with exact_float64(), torch.no_grad():
        made = fault(experiment("two steps"), monkeypatch)
    trial = NOTICED[fault].split()[0].partition("/")[0] if NOTICED[fault] else None
    made.settings = {name: where for name, where in SETTINGS.items() if trial is None or trial in where.of}
    shown, metrics, found = made.run()
    held = {f"{trial} {claim}" for trial, claims_of in shown.items() for claim in claims_of}
    held |= {number.metric for number in numbers_of(HEADLINE, metrics) if number.holds}
    known = zip(("carry", "ablate"), TRUTH["two steps"], strict=True)
    whole = {f"{trial} {claim}" for trial, claims_of in known for claim in claims_of}
    whole |= {"steer sufficient", "steer specific", *HEADLINE}
    if fault is no_fault:
        assert held == whole, found.to_string()
    else:
        assert NOTICED[fault] in whole - held, found.to_string()
    if fault is control_that_edits_nothing:
        reasons = set(found[found.claim == "specific"].reason)
        assert reasons == {"control too weak: it moves 0 of what the edit does"}
        assert not {"carry necessary", "carry more_than_copying"} & held  # these need controls too
