"""From an experiment's declaration to trials: case sets, features, operations and settings.

Two sources of cases: pictures of two concepts under some questions (`ConceptSource`), whose circuit is found by
contrast; and counterfactual pairs (`PairSource`), whose features are chosen by estimated effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import CircuitConfig
from vlmscope.circuits.interchange import all_features
from vlmscope.circuits.interchange_config import InterchangeConfig
from vlmscope.circuits.operations import Ablate, Carry, Exchange, Shift, Toward
from vlmscope.circuits.pair_effects import pair_effects
from vlmscope.circuits.pair_subject import PairSubject, pair_subject
from vlmscope.circuits.plans import union
from vlmscope.circuits.trial_config import SettingConfig, TrialConfig
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitFeature, Supernode
from vlmscope.data.config import PairsConfig
from vlmscope.data.images import png_bytes
from vlmscope.data.pairs import Pair, Side, load_pairs
from vlmscope.interventions.named import by_layer, donor_activations, mean_activations
from vlmscope.interventions.run import base_run
from vlmscope.interventions.trials import Cases, Features, Operation, Setting, Trial, run_trials
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope

ALL, OWN, EACH = "all", "own", "each"  # sets of features that a trial may name besides questions and supernodes
Pictures = Callable[[str, str, int], Sequence[Image.Image]]  # concept, split, count
Metrics = Callable[[pd.DataFrame, Mapping[str, TrialConfig], Mapping[str, SettingConfig]], dict[str, float]]


@dataclass(frozen=True)
class Declared:
    """What the declared trials run on.

    Attributes:
        cases: case set -> its questions' cases.
        operation: makes the operation of a trial for a case set, at most `limit` features.
        means: layer -> [F], by which controls are matched; or what gives those of a trial on a case set.
        sets: names of the sets of features that `features: each` goes through, as trials `<trial>/<set>`.
        pairs: the source, where the cases are counterfactual pairs.
        metrics: what is reported of the table; None for the rates of each trial (see `trial_metrics`).
        settled: question -> the strength of trials that leave it open.
    """

    cases: Mapping[str, Sequence[Cases]]
    operation: Callable[[TrialConfig, Cases, int | None], Operation]
    means: Mapping[int, Tensor] | Callable[[TrialConfig, Cases], Mapping[int, Tensor]]
    sets: Sequence[str] = ()
    pairs: PairSource | None = None
    metrics: Metrics | None = None
    settled: Mapping[str, float] = field(default_factory=dict)

    def trials(self, trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]) -> Iterator[Trial]:
        """Every trial in its settings, in the order of the declaration.

        Raises:
            UserError: a setting names a trial or a case set that is not there.
        """
        for name, setting in settings.items():
            if setting.cases not in self.cases:
                raise UserError(f"settings.{name}.cases={setting.cases}: the case sets are {', '.join(self.cases)}")
            for one in setting.of or trials:
                if one not in trials:
                    raise UserError(f"settings.{name}.of: no trial {one!r}; there are {', '.join(trials)}")
                for called, declared in self.spread(one, trials[one]).items():
                    for cases in self.cases[setting.cases]:
                        yield from self._settings(called, declared, cases, name, setting)

    def spread(self, name: str, trial: TrialConfig) -> dict[str, TrialConfig]:
        """The trial itself, or one for each set of features."""
        if trial.features != EACH:
            return {name: trial}
        return {f"{name}/{found}": replace(trial, features=found) for found in self.sets}

    def _settings(
        self, called: str, declared: TrialConfig, cases: Cases, name: str, setting: SettingConfig
    ) -> Iterator[Trial]:
        some = cases if setting.first is None else cases.select(range(min(setting.first, cases.batch.size)))
        means = self.means(declared, cases) if callable(self.means) else self.means
        strength = self.settled.get(cases.question) if declared.strength is None else declared.strength
        if strength is None and not setting.strength:
            raise UserError(f"trials.{called}.strength=null, but no trial has `settle`")
        more = {key: getattr(setting, key) for key in ("matched", "random_direction", "new_tokens")}
        for found in setting.combinations(strength):
            do = self.operation(declared, cases, found["limit"])
            yield Trial(called, do, [some], [Setting(name, **found, **more)], means)


def settle(
    scope: Scope, declared: Declared, trials: Mapping[str, TrialConfig], settings: Mapping[str, SettingConfig]
) -> Declared:
    """The same with the strengths of trials that have `settle`: the least with most hits on the validation cases.

    They run in the first setting of the trial, everywhere and without controls.

    Raises:
        UserError: there are no validation cases, or no setting runs the trial.
    """
    found: dict[str, float] = {}
    for name, trial in trials.items():
        if not trial.settle:
            continue
        used = [one for one in settings.values() if name in (one.of or trials)]
        if not used or "validation" not in declared.cases:
            raise UserError(f"trials.{name}.settle: it needs a setting that runs {name}, and validation cases")
        first = replace(used[0], cases="validation", mode=used[0].mode[:1], strength=sorted(trial.settle), matched=0)
        first = replace(first, of=[name], positions=["all"], layers=["all"], random_direction=0)
        table = run_trials(scope, declared.trials(trials, {"settle": first}))
        for question, of in table.groupby("question", sort=False):
            found[str(question)] = float(of.groupby("strength").hit.mean().idxmax())
    return replace(declared, settled=found)


def answer_token(scope: Scope, word: str) -> int:
    """The id of an answer word.

    Raises:
        UserError: the tokenizer does not have it as one token.
    """
    tokenizer = scope.vlm.tokenizer
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(f"the answer {word!r} is not one token of this model: choose one that is")
    return int(ids[0])


def most_probable(scope: Scope, logits: Tensor) -> str:
    """The word of the most probable token of logits [V]."""
    return scope.vlm.tokenizer.decode([int(logits.argmax())]).strip()


def right_cases(
    scope: Scope, config: CircuitConfig, name: str, concept: str, images: Sequence[Image.Image], modes: Sequence[str]
) -> tuple[Cases, list[int], InputBatch]:
    """A concept's test pictures that are answered rightly to a question, without target or donors.

    Returns:
        The cases, the numbers of their pictures, and all pictures as a batch.

    Raises:
        UserError: fewer than `config.least` are.
    """
    question = config.questions[name]
    inputs = [scope.inputs(question.prompt, [image]) for image in images]
    own = answer_token(scope, question.answers[concept])
    everything = scope.batch(inputs)
    logits = scope.forward(everything)
    rows = torch.nonzero(logits.argmax(-1) == own).flatten()
    if len(rows) < config.least:
        said = ", ".join(sorted({most_probable(scope, row) for row in logits}))
        raise UserError(
            f"{f'only {len(rows)}' if len(rows) else 'none'} of the {len(images)} pictures of {concept} is answered "
            f"{question.answers[concept]!r} to {question.prompt!r} (the model says: {said}): nothing to flip; give "
            "other pictures"
        )
    kept = rows.tolist()
    batch = everything.select(rows)
    answers = torch.full((len(kept),), own, device=rows.device)
    cases = Cases(
        "test",
        name,
        batch,
        base_run(scope, batch, [mode for mode in modes if mode != "generate"]),
        answers,
        torch.full_like(answers, -1),
        tuple(f"{concept} {row}" for row in kept),
        inputs=tuple(inputs[row] for row in kept),
        prompt=question.prompt,
        pngs=tuple(png_bytes(images[row], 128) for row in kept),
    )
    return cases, kept, everything


def concept_cases(
    scope: Scope, config: CircuitConfig, pictures: Pictures, count: int, modes: Sequence[str]
) -> list[Cases]:
    """The recipient's test pictures that are answered rightly, a case set per question; donors row by row."""
    recipient, donor = config.concepts
    images = pictures(recipient, "test", count)
    gifts = pictures(donor, "test", max(len(images), 1))
    found = []
    for name, question in config.questions.items():
        target = answer_token(scope, question.answers[donor])
        cases, rows, _ = right_cases(scope, config, name, recipient, images, modes)
        donors = scope.batch([scope.inputs(question.prompt, [gifts[row % len(gifts)]]) for row in rows])
        found.append(replace(cases, target=torch.full_like(cases.answer, target), donors=donors))
    return found


def matrix_cases(
    scope: Scope, config: CircuitConfig, pictures: Pictures, count: int, modes: Sequence[str]
) -> dict[str, list[Cases]]:
    """Every ordered pair of concepts, tagged `recipient` and `donor`, under each question that tells them apart.

    Returns:
        "test": the recipients that are answered rightly, with donors row by row; "third": all pictures of each concept
        outside the pair, under the first question; a hit is the donor's word.

    Raises:
        UserError: no question tells two concepts apart, or too few pictures of a concept are answered rightly.
    """
    images = {concept: pictures(concept, "test", count) for concept in config.concepts}
    test: list[Cases] = []
    third: list[Cases] = []
    for number, (name, question) in enumerate(config.questions.items()):
        token = {concept: answer_token(scope, question.answers[concept]) for concept in images}
        right = {concept: right_cases(scope, config, name, concept, of, modes) for concept, of in images.items()}
        asked = {}
        for concept, of in images.items() if number == 0 else ():
            inputs = [scope.inputs(question.prompt, [image]) for image in of]
            asked[concept] = bystanders(scope, "third", name, inputs, [f"{concept} {i}" for i in range(len(of))])
        for recipient, donor in permutations(images, 2):
            tags = {"recipient": recipient, "donor": donor}

            def turned(cases: Cases, tags: Mapping[str, str] = tags, target: int = token[donor]) -> Cases:
                return replace(cases, target=torch.full_like(cases.answer, target), tags=tags)

            third += [turned(one) for concept, one in asked.items() if concept not in (recipient, donor)]
            if token[recipient] != token[donor]:
                cases, rows, _ = right[recipient]
                at = [row % len(images[donor]) for row in rows]
                test.append(replace(turned(cases), donors=right[donor][2].select(torch.tensor(at))))
    if not test:
        raise UserError(f"no question of {', '.join(config.questions)} tells two of circuit.concepts apart")
    return {"test": test, "third": third}


def bystanders(
    scope: Scope, name: str, question: str, inputs: Sequence[ModelInputs], ids: Sequence[str], target: int = -1
) -> Cases:
    """Prompts about something else, whatever they are answered; hits are answers `target`."""
    batch = scope.batch(list(inputs))
    base = base_run(scope, batch, ["free"])
    answer = base.logits.argmax(-1)
    return Cases(name, question, batch, base, answer, torch.full_like(answer, target), tuple(ids), inputs=tuple(inputs))


def concept_operation(
    circuit: Circuit, config: CircuitConfig, pair: Sequence[str] = ()
) -> Callable[[TrialConfig, Cases, int | None], Operation]:
    """Operations between the two supernodes of a circuit found by contrast: `pair`, or the two concepts."""
    recipient, donor = pair or config.concepts

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
            return Carry(union(circuit, limit), trial.pooled, last=trial.last)
        if trial.do == "ablate":
            return Ablate(circuit.indices(trial.features or recipient, limit))
        raise UserError(f"trials: do={trial.do} needs pairs; with two concepts choose exchange, carry or ablate")

    return made


def pairs_by_question(config: PairsConfig, split: str) -> dict[str, list[Pair]]:
    """The pairs of a split by question. Of a question whose answer differs in some pairs, only those count."""
    found: dict[str, list[Pair]] = {}
    for pair in load_pairs(config, split):
        found.setdefault(pair.question, []).append(pair)
    return {name: [p for p in some if p.moves] or some for name, some in found.items()}


def subject_of_pairs(
    scope: Scope,
    question: str,
    pairs: Sequence[Pair],
    least: int,
    answerable: bool = True,
    modes: Collection[str] = ("free",),
) -> PairSubject:
    """Both sides of a question's pairs, run once.

    Args:
        scope: the model and its transcoders.
        question: its name.
        pairs: its pairs.
        least: how many must be left.
        answerable: keep only pairs that are answered rightly on both sides; else all.
        modes: those that the originals will be edited in.
    """

    def tokens(sides: Sequence[Side]) -> Tensor:
        known = {word: answer_token(scope, word) for word in {side.answer for side in sides}}
        return torch.tensor([known[side.answer] for side in sides], device=scope.adapter.device)

    originals, others = [pair.original for pair in pairs], [pair.counterfactual for pair in pairs]
    first, second = ([scope.inputs(side.prompt, list(side.images)) for side in sides] for sides in (originals, others))
    return pair_subject(scope, question, first, second, tokens(originals), tokens(others), least, answerable, modes)


def pair_cases(scope: Scope, subject: PairSubject, pairs: Sequence[Pair], name: str = "test") -> Cases:
    """The originals as recipients and the counterfactuals as donors; `pairs` are those that the subject chose from."""
    kept = [pairs[row] for row in subject.rows.tolist()]
    return Cases(
        name,
        subject.question,
        subject.batch,
        subject.base,
        subject.tokens,
        subject.other_tokens,
        tuple(pair.id for pair in kept),
        subject.other,
        subject.other_logits,
        inputs=tuple(scope.inputs(pair.original.prompt, list(pair.original.images)) for pair in kept),
        prompt=kept[0].original.prompt,
        pngs=tuple(_both_sides(pair) for pair in kept),
    )


def _both_sides(pair: Pair) -> bytes:
    """Original and counterfactual in one picture, the original alone where they differ in height."""
    sides = [np.asarray(side.images[0]) for side in (pair.original, pair.counterfactual) if side.images]
    if not sides:
        return png_bytes(np.full((8, 8, 3), 255, np.uint8))
    same = len({side.shape[0] for side in sides}) == 1
    return png_bytes(np.concatenate(sides, 1) if same else sides[0], 256)


@dataclass
class PairSource:
    """Counterfactual pairs: case sets, the features of each question, and operations on them.

    Features are chosen, for each question whose answers differ, by estimated effect on training pairs; or they are
    the supernodes of a given circuit, which keep to their positions.

    Attributes:
        scope: the model and its transcoders.
        pairs: which pairs.
        config: how features are chosen.
        circuit: a given circuit, instead of choosing.
        deepest: the most features that any setting asks for.
        accuracy: once there are cases, `base/<question>/<side>/accuracy` and how many pairs are used.
    """

    scope: Scope
    pairs: PairsConfig
    config: InterchangeConfig
    circuit: Circuit | None = None
    deepest: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    _sides: list[InputBatch] = field(default_factory=list)
    _subjects: dict[str, PairSubject] = field(default_factory=dict)
    _ranked: dict[str, list[CircuitFeature]] = field(default_factory=dict)
    _matched: dict[str | None, Mapping[int, Tensor]] = field(default_factory=dict)

    def cases(self, modes: Mapping[str, Collection[str]]) -> dict[str, list[Cases]]:
        """Case sets "test" (questions whose answers differ within pairs), "counterfactual" (the other side of these
        pairs, with the same target) and "stays" (questions whose answers do not differ: the target is the answer).

        Args:
            modes: case set -> modes that it will be edited in.

        Raises:
            UserError: no question's answer differs, or too few pairs are answered rightly.
        """
        found: dict[str, list[Cases]] = {"test": [], "stays": [], "counterfactual": []}
        for question, pairs in pairs_by_question(self.pairs, "test").items():
            name = "test" if pairs[0].moves else "stays"
            subject = self.subject(question, pairs, modes.get(name, ("free",)))
            cases = pair_cases(self.scope, subject, pairs, name)
            found[name].append(cases)
            self._sides += [subject.batch, subject.other]
            self.accuracy[f"base/{question}/pairs"] = float(subject.size)
            for side, rate in zip(("original", "counterfactual", "both"), subject.accuracy, strict=True):
                self.accuracy[f"base/{question}/{side}/accuracy"] = rate.value
            if name == "test" and "counterfactual" in modes:
                base = base_run(self.scope, subject.other, modes["counterfactual"])
                other = replace(
                    cases,
                    name="counterfactual",
                    batch=subject.other,
                    base=base,
                    inputs=(),
                    donors=None,
                    donor_logits=None,
                )
                found["counterfactual"].append(other)
        if not found["test"]:
            raise UserError("no question's answer differs within a pair: there is nothing that could follow")
        return found

    def subject(self, question: str, pairs: Sequence[Pair], modes: Collection[str] = ("free",)) -> PairSubject:
        """The pairs that count, as `interchange` has it."""
        return subject_of_pairs(self.scope, question, pairs, self.config.least, self.config.answerable, modes)

    @cached_property
    def _training(self) -> dict[str, list[Pair]]:
        return pairs_by_question(self.pairs, "train")

    @cached_property
    def questions(self) -> list[str]:
        """Those whose answers differ within training pairs, so that features can be chosen for them."""
        return [name for name, pairs in self._training.items() if pairs[0].moves]

    def training(self, question: str) -> PairSubject:
        """The training pairs of a question, kept for the next call.

        Raises:
            UserError: it has none.
        """
        if question not in self._training:
            raise UserError(f"question {question!r} has no training pairs to choose features by: raise pairs.train")
        if question not in self._subjects:
            self._subjects[question] = self.subject(question, self._training[question])
        return self._subjects[question]

    def ranked(self, question: str) -> list[CircuitFeature]:
        """The features of a question by estimated effect on its training pairs, best first.

        Raises:
            UserError: it has no training pairs, or their answers do not differ.
        """
        if question not in self._ranked:
            subject = self.training(question)
            if not subject.moves:
                raise UserError(
                    f"question {question!r}: its answer is the same on both sides, so no feature changes it"
                )
            effects = pair_effects(self.scope, subject, self.config.steps)
            self._ranked[question] = effects.ranked(max(self.config.features, self.deepest))
        return self._ranked[question]

    @property
    def sets(self) -> tuple[str, ...]:
        """The sets of features by name: supernodes of the given circuit, or questions."""
        return tuple(self.questions if self.circuit is None else self.circuit.supernodes)

    def chosen(self, named: str | None, question: str, limit: int | None) -> tuple[Features, tuple[Supernode, ...]]:
        """A set of features, at most `limit`, and the supernodes whose positions they keep to.

        Args:
            named: a question or a supernode; OWN or None: those of the case set's question, or the whole circuit.
            question: that of the case set.
            limit: how many; `config.features` of those chosen here, and all of a circuit, when None.

        Raises:
            UserError: there is no such set.
        """
        if named == ALL:
            return all_features(self.scope.transcoders), ()
        own = named in (None, OWN)
        if self.circuit is not None and (own or named in self.circuit.supernodes):
            nodes = [node for name, node in self.circuit.supernodes.items() if own or name == named]
            members = [member for node in nodes for member in node.features[:limit]]
            return self._by_layer(members), tuple(nodes)
        wanted = question if own else str(named)
        if self.circuit is not None or wanted not in self.questions:
            there = ", ".join((ALL, OWN, EACH, *self.sets))
            raise UserError(f"trials: features={named}: no such set for question {question!r}; choose from {there}")
        return self._by_layer(self.ranked(wanted)[: limit or self.config.features]), ()

    def _by_layer(self, members: Sequence[CircuitFeature]) -> Features:
        return by_layer(self.scope.transcoders, [member.feature for member in members])

    def operation(self, trial: TrialConfig, cases: Cases, limit: int | None) -> Operation:
        """The operation of a trial on a case set.

        Raises:
            UserError: it needs two concepts, or features that are not there.
        """
        if trial.do == "carry" and trial.features == ALL and not trial.pooled and trial.strength == 1:
            return Carry(None)
        features, nodes = self.chosen(trial.features, cases.question, limit)
        if trial.do == "carry":
            return Carry(features, trial.pooled, nodes)
        if trial.do == "toward":
            return Toward(features, nodes)
        if trial.do == "ablate":
            return Ablate(features, nodes)
        if trial.do == "shift":
            return Shift(self.change(cases.question, features), nodes)
        raise UserError(f"trials: do={trial.do} needs two concepts; with pairs choose carry, toward, shift or ablate")

    def change(self, question: str, features: Features) -> dict[int, tuple[Tensor, Tensor]]:
        """Layer -> (features [n], mean change [T, n] of activation from original to counterfactual, training pairs)."""
        train = self.training(question)
        before, after = (donor_activations(self.scope, side, features) for side in (train.batch, train.other))
        return {layer: (found, (after[layer][1] - values).mean(0)) for layer, (found, values) in before.items()}

    def transfer(self, question: str, fact: str, count: int) -> Iterator[Trial]:
        """Features of a question chosen on pairs of one value of another fact, carried on test pairs of each value.

        Trials are called `over_<fact>/<value chosen on>`, case sets by the value tested on; the setting is "same", with
        matched features, where these are equal, else "another".

        Args:
            question: whose answers differ within pairs.
            fact: a question whose answers do not.
            count: pairs of each split, before they are grouped; values with fewer than `config.least` are left out.

        Raises:
            UserError: fewer than two values are left.
        """
        groups: dict[str, dict[str, list[Pair]]] = {}
        for split in ("train", "test"):
            found = pairs_by_question(replace(self.pairs, train=count, test=count), split)
            value_of = {pair.id: pair.original.answer for pair in found[fact]}
            for pair in found[question]:
                if pair.id in value_of:
                    groups.setdefault(value_of[pair.id], {}).setdefault(split, []).append(pair)
        sizes = {
            value: min(len(sides.get(split, ())) for split in ("train", "test")) for value, sides in groups.items()
        }
        enough = sorted(value for value, size in sizes.items() if size >= self.config.least)
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
                yield Trial(f"over_{fact}/{value}", Carry(features), [cases], [setting], self.matched())

    def means(self, trial: TrialConfig, cases: Cases) -> Mapping[int, Tensor]:
        """Mean activations by which controls are matched: on both sides of the pairs that its values come from."""
        if trial.do == "shift":
            train = self.training(cases.question)
            return self._means(cases.question, [train.batch, train.other])
        return self.matched()

    def matched(self) -> Mapping[int, Tensor]:
        """Mean activations over both sides of all test pairs."""
        return self._means(None, self._sides)

    def _means(self, key: str | None, batches: Sequence[InputBatch]) -> Mapping[int, Tensor]:
        if key not in self._matched:
            self._matched[key] = mean_activations(self.scope, batches, self.scope.transcoders.layers)
        return self._matched[key]
