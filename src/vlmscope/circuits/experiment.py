"""From an experiment's declaration to trials: case sets, features, operations and settings.

Two sources of cases: pictures of two concepts under some questions, whose circuit is found by contrast; and
counterfactual pairs (`PairSource`), whose features are chosen by estimated effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from vlmscope.circuits.baselines import Baselines, RoleVectors, mean_outputs
from vlmscope.circuits.cases import (
    TO_PICTURE,
    TO_TEXT,
    TextPair,
    answer_tokens,
    ask_pair,
    concept_questions,
    crossed_cases,
    pair_cases,
    subject_of_pairs,
    told_apart_alike,
)
from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import CircuitConfig, InterchangeConfig, SettingConfig, TrialConfig, baselines_of
from vlmscope.circuits.operations import Ablate, Carry, Exchange, Level, Shift, Toward, all_features
from vlmscope.circuits.pairs import PairEffects, PairSubject, most_changed, pair_effects, pair_subject
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitFeature, Supernode
from vlmscope.data.config import PairsConfig
from vlmscope.data.icons import read_relations
from vlmscope.data.inputs import Pair
from vlmscope.interventions.edits import by_layer, donor_activations
from vlmscope.interventions.run import base_run
from vlmscope.interventions.trials import Cases, Features, Operation, Setting, Trial, run_trials
from vlmscope.metrics.prediction import prior
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope

# Sets of features that a trial may name besides questions and supernodes. Of those chosen for the questions, `common`
# are chosen for every question, `particular` for the case set's question alone.
ALL, OWN, EACH, COMMON, PARTICULAR = "all", "own", "each", "common", "particular"
Metrics = Callable[[pd.DataFrame, Mapping[str, TrialConfig], Mapping[str, SettingConfig]], dict[str, float]]


@dataclass(frozen=True)
class Declared:
    """What the declared trials run on."""

    cases: Mapping[str, Sequence[Cases]]  # case set -> its questions' cases
    operation: Callable[[TrialConfig, Cases, int | None], Operation]  # at most so many features
    sets: Sequence[str] = ()  # sets of features that `features: each` goes through, as trials `<trial>/<set>`
    pairs: PairSource | None = None  # where the cases are counterfactual pairs
    metrics: Metrics | None = None  # of the table; None for the rates of each trial (`metrics.rates.trial_metrics`)
    settled: Mapping[str, float] = field(default_factory=dict)  # question -> strength of trials that leave it open
    baselines: Baselines | None = None

    def trials(self, trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]) -> Iterator[Trial]:
        """Every trial with every case set in every combination of a setting's values, each before its baselines.

        Raises:
            UserError: a setting names a trial or a case set that is not there.
        """
        for name, setting in settings.items():
            more = {key: getattr(setting, key) for key in ("matched", "random_direction", "draws_on", "new_tokens")}
            if setting.cases not in self.cases:
                raise UserError(f"settings.{name}.cases={setting.cases}: the case sets are {', '.join(self.cases)}")
            for called in setting.of or trials:
                if called not in trials:
                    raise UserError(f"settings.{name}.of: no trial {called!r}; there are {', '.join(trials)}")
                each = {f"{called}/{features}": replace(trials[called], features=features) for features in self.sets}
                for operation, trial in (each if trials[called].features == EACH else {called: trials[called]}).items():
                    for cases in self.cases[setting.cases]:
                        subset = cases.first(setting.first)
                        for axes in setting.combinations(self._strength(operation, trial, cases, setting)):
                            yield from self._with_baselines(
                                operation, trial, setting, Setting(name, **axes, **more), subset
                            )

    def _strength(self, operation: str, trial: TrialConfig, cases: Cases, setting: SettingConfig) -> float | None:
        """The trial's strength, or the one settled for the question; None where the setting has its own."""
        strength = trial.strength
        if strength is None:  # questions without validation cases (unrelated scenes) take the largest
            strength = self.settled.get(cases.question, max(self.settled.values(), default=None))
        if strength is None and not setting.strength:
            raise UserError(f"trials.{operation}.strength=null, but no trial has `settle`")
        return strength

    def _with_baselines(
        self, operation: str, trial: TrialConfig, setting: SettingConfig, where: Setting, cases: Cases
    ) -> Iterator[Trial]:
        do = self.operation(trial, cases, where.limit)
        yield Trial(operation, do, [cases], [where])
        few = cases.first(setting.baselines_on)
        for baseline in baselines_of(trial, setting):
            if self.baselines is None:
                raise UserError(
                    f"settings.{where.name}.baselines: the cases of this experiment have none; leave it out"
                )
            variant = self.baselines.operation(baseline, trial, do, few, where.limit)
            yield Trial(operation, variant, [few], [replace(where, matched=0, random_direction=0)], baseline)


def settle(
    scope: Scope, declared: Declared, trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]
) -> Declared:
    """Add the strengths of trials that have `settle`: of each, the least with most hits on the validation cases.

    Validation runs in the first setting of the trial, at all positions and layers and without controls.

    Raises:
        UserError: there are no validation cases, or no setting runs the trial.
    """
    strengths: dict[str, float] = {}
    for name, trial in trials.items():
        if not trial.settle:
            continue
        used = [setting for setting in settings.values() if name in (setting.of or trials)]
        if not used or "validation" not in declared.cases:
            raise UserError(f"trials.{name}.settle: it needs a setting that runs {name}, and validation cases")
        first = SettingConfig(
            [name], "validation", used[0].mode[:1], strength=sorted(trial.settle), limit=used[0].limit, matched=0,
            first=used[0].first, measures=used[0].measures, new_tokens=used[0].new_tokens,
        )  # fmt: skip
        table = run_trials(scope, declared.trials(trials, {"settle": first}))
        for question, part in table.groupby("question", sort=False):
            strengths[str(question)] = float(part.groupby("strength").hit.mean().idxmax())
    return replace(declared, settled=strengths)


def concept_operation(
    circuit: Circuit, config: CircuitConfig, pair: Sequence[str] = ()
) -> Callable[[TrialConfig, Cases, int | None], Operation]:
    """Operations between the two supernodes of a circuit found by contrast: `pair`, or the two concepts."""
    recipient, donor = pair or config.concepts
    nodes = tuple(circuit.supernodes.values())

    def made(trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        if trial.features is not None and trial.do != "ablate":
            raise UserError(
                f"trials: features={trial.features}: of two concepts, only ablate can act on one; leave it out"
            )
        if trial.do == "exchange":
            return Exchange(
                circuit, recipient, donor, trial.gate, limit, by_question=cases.question in config.questions
            )
        if trial.do == "carry":
            return Carry(circuit.union(limit), nodes, last=trial.last)
        if trial.do == "ablate":
            node = circuit.node(trial.features or recipient)
            return Ablate(circuit.indices(node.name, limit), (node,))
        raise UserError(f"trials: do={trial.do} needs pairs; with two concepts choose exchange, carry or ablate")

    return made


@dataclass(frozen=True)
class ConceptMaterial:
    """What baselines need where cases are pictures of concepts, as `PairSource` has it where they are pairs.

    Questions that are not the circuit's own, of unrelated cases, stand for all of them.
    """

    scope: Scope
    config: CircuitConfig
    train: Mapping[str, Mapping[str, InputBatch]]  # concept -> question -> training pictures
    circuit: Callable[[Sequence[str]], Circuit]  # of a pair of concepts, the circuit by contrast alone

    def _pair(self, cases: Cases) -> tuple[str, ...]:
        """The recipient and the donor."""
        if "donor" in cases.tags:
            return cases.tags["recipient"], cases.tags["donor"]
        return tuple(self.config.concepts)

    def _questions(self, cases: Cases) -> list[str]:
        known = self.config.questions
        return [cases.question] if cases.question in known else list(known)

    def answers(self, cases: Cases) -> list[int]:
        """The tokens of all concepts' words that answer the question."""
        return sorted({token for name in self._questions(cases) for token in self._words(name)})

    def _words(self, name: str) -> Iterator[int]:
        """The token that stands for each answer of a question: the deciding one."""
        begin = concept_questions(self.scope, self.config)[name].begin
        for word in self.config.questions[name].answers.values():
            ids = answer_tokens(self.scope, word)
            yield ids[len(begin)] if ids[: len(begin)] == begin and len(ids) > len(begin) else ids[0]

    def prompts(self, cases: Cases) -> list[tuple[InputBatch, Tensor]]:
        """Training pictures of the recipient and of the donor under the question, with their answers."""
        asked = []
        for name in self._questions(cases):
            for concept in self._pair(cases):
                batch = self.train[concept][name]
                token = concept_questions(self.scope, self.config)[name].token(concept)
                asked.append((batch, torch.full((batch.size,), token, device=self.scope.adapter.device)))
        return asked

    def difference(self, cases: Cases) -> RoleVectors:
        """Mean output on the donor's training pictures minus that on the recipient's."""
        pair, questions = self._pair(cases), self._questions(cases)
        batches = [self.train[concept][name] for concept in pair for name in questions]
        sides = [torch.full((batch.size,), i // len(questions)) for i, batch in enumerate(batches)]
        recipient, donor = mean_outputs(self.scope, batches, sides).values()
        return {
            role: {layer: (mean - recipient[role][layer])[None] for layer, mean in by_layer.items()}
            for role, by_layer in donor.items()
        }

    def unconfirmed(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        """The operation with the circuit that contrast alone chooses."""
        pair = self._pair(cases)
        return concept_operation(self.circuit(pair), self.config, pair)(trial, cases, limit)


def text_level(scope: Scope, pairs: Sequence[TextPair], count: int, steps: int) -> Level:
    """The `count` features of most estimated effect (of `steps`) on each token that differs within every pair, as an
    operation that sets their levels.
    """
    differ = [{place for place, (a, b) in enumerate(zip(*pair.ids, strict=True)) if a != b} for pair in pairs]
    features: list[FeatureId] = []
    for place in sorted(set.intersection(*differ)):
        a, b = ([pair.begun(scope, side, place) for pair in pairs] for side in (0, 1))
        right, other = (
            torch.tensor([pair.ids[side][place] for pair in pairs], device=scope.adapter.device) for side in (0, 1)
        )
        subject = pair_subject(scope, f"word {place}", a, b, right, other, least=1, answerable=False, modes=())
        features += [member.feature for member in pair_effects(scope, subject, steps).ranked(count)]
    if not features:
        raise UserError("no word differs within every training pair's answers, so no feature can be chosen")
    steps = len(pairs[0].ids[0])
    first, second = (scope.batch([pair.begun(scope, side, steps) for pair in pairs]) for side in (0, 1))
    return Level(by_layer(scope.transcoders, features), (first, second), first.length - steps)


@dataclass
class PairSource:
    """Counterfactual pairs: case sets, the features of each question, and operations on them.

    Features are chosen, for each question whose answers differ, by estimated effect on training pairs; or they are
    the supernodes of a given circuit, which keep to their positions.

    Attributes:
        deepest: the most features that any setting asks for.
        accuracy: once there are cases, `base/<question>/<side>/accuracy`, how many pairs are used, and `prior`, the
            share of the most frequent right answer over both sides.
    """

    scope: Scope
    pairs: PairsConfig
    load: Callable[[str, PairsConfig], Mapping[str, list[Pair]]]  # pairs of a split by question
    config: InterchangeConfig
    circuit: Circuit | None = None
    deepest: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    _loaded: dict[str, Mapping[str, list[Pair]]] = field(default_factory=dict)
    _subjects: dict[str, PairSubject] = field(default_factory=dict)
    _effects: dict[str, PairEffects] = field(default_factory=dict)

    def cases(self, modes: Mapping[str, Collection[str]]) -> dict[str, list[Cases]]:
        """Case sets "test" (questions whose answers differ within pairs), "counterfactual" (the other side of these
        pairs, with the same target) and "stays" (questions whose answers do not differ: the target is the answer); of
        relations those of `crossed_cases` too.

        `modes` has, for each case set, those that it will be edited in.
        """
        case_sets: dict[str, list[Cases]] = {"test": [], "stays": [], "counterfactual": []}
        for question, pairs in self.loaded("test").items():
            name = "test" if pairs[0].moves else "stays"
            subject = self.subject(question, pairs, modes.get(name, ("free",)))
            cases = pair_cases(self.scope, subject, pairs, name)
            case_sets[name].append(cases)
            self.accuracy[f"base/{question}/pairs"] = float(subject.size)
            answers = [side.answer for pair in pairs for side in (pair.original, pair.counterfactual)]
            self.accuracy[f"base/{question}/prior"] = prior(answers)
            for side, rate in zip(("original", "counterfactual", "both"), subject.accuracy, strict=True):
                self.accuracy[f"base/{question}/{side}/accuracy"] = rate.value
            if name == "test" and "counterfactual" in modes:
                base = base_run(self.scope, subject.other, modes["counterfactual"])
                other = replace(cases, name="counterfactual", batch=subject.other, base=base, inputs=())
                case_sets["counterfactual"].append(replace(other, donors=None, donor_logits=None))
            if name == "test" and {TO_PICTURE, TO_TEXT} & {*modes}:
                relation = read_relations(self.pairs.relations)[question]
                for crossed in crossed_cases(self.scope, cases, relation, self.config.answerable):
                    case_sets.setdefault(crossed.name, []).append(crossed)
        if not case_sets["test"]:
            raise UserError("no question's answer differs within a pair: there is nothing that could follow")
        return case_sets

    def subject(self, question: str, pairs: Sequence[Pair], modes: Collection[str] = ("free",)) -> PairSubject:
        """The pairs that count under `config`."""
        return subject_of_pairs(self.scope, question, pairs, self.config.least, self.config.answerable, modes)

    def loaded(self, split: str) -> Mapping[str, list[Pair]]:
        """The pairs of a split by question; of each those whose answers are told apart by the same token."""
        if split not in self._loaded:
            groups = self.load(split, self.pairs)
            self._loaded[split] = {name: told_apart_alike(self.scope, pairs) for name, pairs in groups.items()}
        return self._loaded[split]

    @cached_property
    def questions(self) -> list[str]:
        """Questions whose answers differ within training pairs, so that features can be chosen for them."""
        return [name for name, pairs in self.loaded("train").items() if pairs[0].moves]

    def training(self, question: str) -> PairSubject:
        """The training pairs of a question, run once."""
        if question not in self.loaded("train"):
            raise UserError(f"question {question!r} has no training pairs to choose features by: raise pairs.train")
        if question not in self._subjects:
            self._subjects[question] = self.subject(question, self.loaded("train")[question])
        return self._subjects[question]

    def effects(self, question: str) -> PairEffects:
        """Estimated effect of each feature on a question's answers on its training pairs, which must differ."""
        if question not in self._effects:
            subject = self.training(question)
            if not subject.moves:
                raise UserError(
                    f"question {question!r}: its answer is the same on both sides, so no feature changes it"
                )
            self._effects[question] = pair_effects(self.scope, subject, self.config.steps)
        return self._effects[question]

    def ranked(self, question: str) -> list[CircuitFeature]:
        """The features of a question by estimated effect, best first."""
        return self.effects(question).ranked(max(self.config.features, self.deepest))

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of features by name: supernodes of the given circuit, or questions."""
        return tuple(self.questions if self.circuit is None else self.circuit.supernodes)

    def chosen(self, named: str | None, question: str, limit: int | None) -> tuple[Features, tuple[Supernode, ...]]:
        """A set of features, at most `limit` (None: `config.features` of those chosen here, all of a circuit), and the
        supernodes whose positions they keep to.

        `named` is a question or a supernode; OWN or None: those of the case set's question, or the whole circuit.
        """
        if named == ALL:
            return all_features(self.scope.transcoders), ()
        if named in (COMMON, PARTICULAR) and self.circuit is None:
            members = self.common() if named == COMMON else self.particular(question)
            return self._by_layer(members[:limit]), ()
        own = named in (None, OWN)
        if self.circuit is not None and (own or named in self.circuit.supernodes):
            nodes = [node for name, node in self.circuit.supernodes.items() if own or name == named]
            return self._by_layer(member for node in nodes for member in node.features[:limit]), tuple(nodes)
        source = question if own else str(named)
        if self.circuit is not None or source not in self.questions:
            there = ", ".join((ALL, OWN, EACH, COMMON, PARTICULAR, *self.sets))
            raise UserError(f"trials: features={named}: no such set for question {question!r}; choose from {there}")
        return self._by_layer(self.ranked(source)[: limit or self.config.features]), ()

    def common(self) -> list[CircuitFeature]:
        """The features that are chosen for every question, those first whose worst place in the rankings is best."""
        ranks = [
            {m.feature: rank for rank, m in enumerate(self.ranked(name)[: self.config.features])}
            for name in self.questions
        ]
        first = self.ranked(self.questions[0])[: self.config.features]
        shared = [member for member in first if all(member.feature in rank for rank in ranks)]
        return sorted(shared, key=lambda member: max(rank[member.feature] for rank in ranks))

    def particular(self, question: str) -> list[CircuitFeature]:
        """The features that are chosen for this question alone, best first."""
        others = [name for name in self.questions if name != question]
        taken = {m.feature for name in others for m in self.ranked(name)[: self.config.features]}
        return [m for m in self.ranked(question)[: self.config.features] if m.feature not in taken]

    def _by_layer(self, members: Iterable[CircuitFeature]) -> Features:
        return by_layer(self.scope.transcoders, [member.feature for member in members])

    def operation(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        """The operation of a trial on a case set."""
        if trial.do == "carry" and trial.features == ALL and trial.strength == 1:
            return Carry(None)
        return self._of(trial, cases, *self.chosen(trial.features, cases.question, limit))

    def answers(self, cases: Cases) -> list[int]:
        """Every token that answers the question in a training or a test pair."""
        pairs = [*self.loaded("train").get(cases.question, ()), *self.loaded("test")[cases.question]]
        return sorted({side.token("") for pair in pairs for side in ask_pair(self.scope, pair)})

    def prompts(self, cases: Cases) -> list[tuple[InputBatch, Tensor]]:
        """Both sides of the training pairs, with their answers."""
        train = self.training(cases.question)
        return [(train.batch, train.tokens), (train.other, train.other_tokens)]

    def difference(self, cases: Cases) -> RoleVectors:
        """Of each case, mean output on training prompts with its target's answer minus that on those with its own;
        nothing where no training prompt has one of the two.
        """
        train = self.training(cases.question)
        means = mean_outputs(self.scope, [train.batch, train.other], [train.tokens, train.other_tokens])
        ends = list(zip(cases.answer.tolist(), cases.target.tolist(), strict=True))
        roles = next(iter(means.values()))

        def change(answer: int, target: int, role: str, layer: int) -> Tensor:
            if answer not in means or target not in means:
                return torch.zeros_like(roles[role][layer])
            return means[target][role][layer] - means[answer][role][layer]

        return {
            role: {layer: torch.stack([change(*both, role, layer) for both in ends]) for layer in by_layer}
            for role, by_layer in roles.items()
        }

    def unconfirmed(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        """The operation on as many features, those whose activations differ most within training pairs times the norm
        of what they write, whatever their effect.
        """
        features, _ = self.chosen(trial.features, cases.question, limit)
        size = sum(map(len, features.values()))
        named = trial.features if trial.features in self.questions else cases.question
        features = by_layer(self.scope.transcoders, most_changed(self.scope, self.training(named), size))
        return self._of(trial, cases, features, ())

    def _of(self, trial: TrialConfig, cases: Cases, features: Features, nodes: tuple[Supernode, ...]) -> Operation:
        if trial.do == "carry":
            return Carry(features, nodes)
        if trial.do == "toward":
            return Toward(features, nodes)
        if trial.do == "ablate":
            return Ablate(features, nodes)
        if trial.do != "shift":
            raise UserError(
                f"trials: do={trial.do} needs two concepts; with pairs choose carry, toward, shift or ablate"
            )
        train = self.training(cases.question)
        before, after = (donor_activations(self.scope, side, features) for side in (train.batch, train.other))
        change = {layer: (chosen, (after[layer][1] - values).mean(0)) for layer, (chosen, values) in before.items()}
        return Shift(change, nodes)

    def transfer(self, question: str, fact: str, count: int) -> Iterator[Trial]:
        """Features of a question chosen on pairs of one value of another fact, carried on test pairs of each value.

        Trials are called `over_<fact>/<value chosen on>`, case sets by the value tested on; the setting is "same", with
        matched features, where these are equal, else "another". Of `count` pairs of each split, values with fewer than
        `config.least` are left out.
        """
        groups: dict[str, dict[str, list[Pair]]] = {}
        for split in ("train", "test"):
            pairs = self.load(split, replace(self.pairs, train=count, test=count))
            value_of = {pair.id: pair.original.answer for pair in pairs[fact]}
            for pair in pairs[question]:
                if pair.id in value_of:
                    groups.setdefault(value_of[pair.id], {"train": [], "test": []})[split].append(pair)
        enough = sorted(v for v, sides in groups.items() if min(map(len, sides.values())) >= self.config.least)
        if len(enough) < 2:
            raise UserError(f"{fact}: fewer than two values have {self.config.least} pairs; raise interchange.transfer")
        chosen, tested = [], []
        for value in enough:
            train, test = (self.subject(question, groups[value][split]) for split in ("train", "test"))
            effects = pair_effects(self.scope, train, self.config.steps)
            chosen.append(self._by_layer(effects.ranked(self.config.features)))
            tested.append(pair_cases(self.scope, test, groups[value]["test"], value))
        for value, features in zip(enough, chosen, strict=True):
            for cases in tested:
                setting = Setting("same", matched=1) if cases.name == value else Setting("another", matched=0)
                yield Trial(f"over_{fact}/{value}", Carry(features), [cases], [setting])
