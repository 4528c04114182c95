"""Pairs of prompts with whole answers: right ones, features chosen word by word, and what a steered answer is worth.

The answers of a pair are equally long and differ in some tokens. For each such token the pair is either prompt with its
answer up to there, and the two tokens are the answers (`pair_effects`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.experiment import bystanders
from vlmscope.circuits.operations import Level
from vlmscope.circuits.pair_effects import pair_effects
from vlmscope.circuits.pair_subject import pair_subject
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.interventions.named import by_layer, mean_activations
from vlmscope.interventions.run import log_likelihoods, whole_answers, without_special
from vlmscope.interventions.trials import Cases
from vlmscope.models.base import ModelInputs
from vlmscope.models.conversations import continued
from vlmscope.scope import Scope


@dataclass(frozen=True)
class TextPair:
    """Two prompts of equal length and the model's whole answers to them, equally many tokens, of which some differ."""

    name: str
    sides: tuple[ModelInputs, ModelInputs]
    ids: tuple[list[int], list[int]]
    texts: tuple[str, str]
    png: bytes = b""

    def begun(self, scope: Scope, side: int, tokens: int) -> ModelInputs:
        """A side's prompt with the first tokens of its answer."""
        return continued(scope.adapter, self.sides[side], self.ids[side][:tokens], scope.vlm.tokenizer)


def text_cases(scope: Scope, name: str, question: str, pairs: Sequence[TextPair], prompt: str = "") -> Cases:
    """The first sides; the second sides' whole answers are their targets.

    A generated answer has the column `log_likelihood`: of a token of it, in nats, after the second side's prompt in the
    unedited model. It is high where the answer is both fluent and true of that side.
    """
    others = {pair.name: pair.sides[1] for pair in pairs}

    def score(ids: Sequence[str], answers: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        said = [without_special(scope.vlm.tokenizer, answer) for answer in answers]
        return {"log_likelihood": log_likelihoods(scope, [others[one] for one in ids], said)}

    cases = bystanders(scope, name, question, [pair.sides[0] for pair in pairs], list(others))
    texts, targets = zip(*(pair.texts for pair in pairs), strict=True)
    pngs = tuple(pair.png for pair in pairs)
    return replace(cases, texts=texts, target_texts=targets, score=score, prompt=prompt, pngs=pngs)


def text_pairs(
    scope: Scope,
    sides: Sequence[Sequence[ModelInputs]],
    right: Sequence[Sequence[str]],
    new_tokens: int,
    pngs: Sequence[bytes] = (),
) -> list[TextPair]:
    """The pairs whose whole answers are right on both sides, all answers equally long.

    Args:
        scope: the model and its transcoders.
        sides: [2][n] prompts.
        right: [2][n] right answers.
        new_tokens: length of an answer, at most.
        pngs: n small pictures, for reports.
    """
    said = [whole_answers(scope, inputs, new_tokens) for inputs in sides]
    found: list[TextPair] = []
    for row, answers in enumerate(zip(*said, strict=True)):
        ids, texts = (answers[0][0], answers[1][0]), (answers[0][1], answers[1][1])
        lengths = {*map(len, ids), len(found[0].ids[0]) if found else len(ids[0])}
        if texts == (right[0][row], right[1][row]) and len(lengths) == 1:
            inputs = (sides[0][row], sides[1][row])
            found.append(TextPair(str(row), inputs, ids, texts, pngs[row] if pngs else b""))
    return found


def text_level(scope: Scope, pairs: Sequence[TextPair], count: int, steps: int) -> tuple[Level, dict[int, Tensor]]:
    """The `count` features of most estimated effect on each token that differs within every pair, and their levels.

    Args:
        scope: the model and its transcoders.
        pairs: all equally long.
        count: features a token.
        steps: inputs at which gradients are taken (see `pair_effects`).

    Returns:
        The operation, and layer -> [F] mean activations in the prompts, by which controls are matched.

    Raises:
        UserError: no token differs within every pair.
    """
    differ = [{at for at, (a, b) in enumerate(zip(*pair.ids, strict=True)) if a != b} for pair in pairs]
    found: list[FeatureId] = []
    for at in sorted(set.intersection(*differ)):
        a, b = ([pair.begun(scope, side, at) for pair in pairs] for side in (0, 1))
        own, other = (
            torch.tensor([pair.ids[side][at] for pair in pairs], device=scope.adapter.device) for side in (0, 1)
        )
        subject = pair_subject(scope, f"word {at}", a, b, own, other, least=1, answerable=False, modes=())
        found += [member.feature for member in pair_effects(scope, subject, steps).ranked(count)]
    if not found:
        raise UserError("no word differs within every training pair's answers, so no feature can be chosen")
    prompts, whole = (
        [scope.batch([pair.begun(scope, side, tokens) for pair in pairs]) for side in (0, 1)]
        for tokens in (0, len(pairs[0].ids[0]))
    )
    level = Level(by_layer(scope.transcoders, found), (whole[0], whole[1]), prompts[0].length)
    return level, mean_activations(scope, prompts, scope.transcoders.layers)
