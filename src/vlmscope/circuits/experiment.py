"""From an experiment's declaration to trials: case sets, features, operations and settings.

Two sources of cases: pictures of two concepts under some questions (`ConceptSource`), whose circuit is found by
contrast; and counterfactual pairs (`PairSource`), whose features are chosen by estimated effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlmscope.circuits.circuit import Circuit
from vlmscope.circuits.config import CircuitConfig
from vlmscope.circuits.operations import Ablate, Carry, Exchange
from vlmscope.circuits.plans import union
from vlmscope.circuits.trial_config import SettingConfig, TrialConfig
from vlmscope.core.errors import UserError
from vlmscope.data.images import png_bytes
from vlmscope.interventions.run import base_run
from vlmscope.interventions.trials import Cases, Operation, Setting, Trial
from vlmscope.models.base import ModelInputs
from vlmscope.scope import Scope

Pictures = Callable[[str, str, int], Sequence[Image.Image]]  # concept, split, count


@dataclass(frozen=True)
class Declared:
    """What the declared trials run on.

    Attributes:
        cases: case set -> its questions' cases.
        operation: makes the operation of a trial for a case set, at most `limit` features.
        means: layer -> [F], by which controls are matched.
    """

    cases: Mapping[str, Sequence[Cases]]
    operation: Callable[[TrialConfig, Cases, int | None], Operation]
    means: Mapping[int, Tensor]

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
                declared = trials[one]
                for cases in self.cases[setting.cases]:
                    some = cases if setting.first is None else cases.select(range(min(setting.first, cases.batch.size)))
                    for found in setting.combinations(declared.strength):
                        limit = found["limit"]
                        where = Setting(
                            name, **found, matched=setting.matched, random_direction=setting.random_direction
                        )
                        yield Trial(one, self.operation(declared, cases, limit), [some], [where], self.means)


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


def concept_cases(
    scope: Scope, config: CircuitConfig, pictures: Pictures, count: int, modes: Sequence[str]
) -> list[Cases]:
    """The recipient's test pictures that are answered rightly, a case set per question; donors row by row.

    Raises:
        UserError: none of them is.
    """
    recipient, donor = config.concepts
    images = pictures(recipient, "test", count)
    gifts = pictures(donor, "test", max(len(images), 1))
    found = []
    for name, question in config.questions.items():
        inputs = [scope.inputs(question.prompt, [image]) for image in images]
        own, target = (answer_token(scope, question.answers[concept]) for concept in (recipient, donor))
        everything = scope.batch(inputs)
        logits = scope.forward(everything)
        rows = torch.nonzero(logits.argmax(-1) == own).flatten()
        if not len(rows):
            said = ", ".join(sorted({most_probable(scope, row) for row in logits}))
            raise UserError(
                f"none of the {len(images)} pictures of {recipient} is answered {question.answers[recipient]!r} to "
                f"{question.prompt!r} (the model says: {said}): nothing to flip; give other pictures"
            )
        kept = rows.tolist()
        batch = everything.select(rows)
        donors = scope.batch([scope.inputs(question.prompt, [gifts[row % len(gifts)]]) for row in kept])
        answers = torch.full((len(kept),), own, device=rows.device)
        found.append(
            Cases(
                "test",
                name,
                batch,
                base_run(scope, batch, [mode for mode in modes if mode != "generate"]),
                answers,
                torch.full_like(answers, target),
                tuple(f"{recipient} {row}" for row in kept),
                donors,
                inputs=tuple(inputs[row] for row in kept),
                prompt=question.prompt,
                pngs=tuple(png_bytes(images[row], 128) for row in kept),
            )
        )
    return found


def bystanders(
    scope: Scope, name: str, question: str, inputs: Sequence[ModelInputs], ids: Sequence[str], target: int = -1
) -> Cases:
    """Prompts about something else, whatever they are answered; hits are answers `target`."""
    batch = scope.batch(list(inputs))
    base = base_run(scope, batch, ["free"])
    answer = base.logits.argmax(-1)
    return Cases(name, question, batch, base, answer, torch.full_like(answer, target), tuple(ids))


def concept_operation(circuit: Circuit, config: CircuitConfig) -> Callable[[TrialConfig, Cases, int | None], Operation]:
    """Operations between the two supernodes of a circuit found by contrast."""
    recipient, donor = config.concepts

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
            return Carry(union(circuit, limit), trial.pooled)
        if trial.do == "ablate":
            return Ablate(circuit.indices(trial.features or recipient, limit))
        raise UserError(f"trials: do={trial.do} needs pairs; with two concepts choose exchange, carry or ablate")

    return made
