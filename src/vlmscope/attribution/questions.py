"""From what the user asks to the targets of a graph: words become tokens, an answer continues the prompt."""

from dataclasses import dataclass
from typing import Protocol

from vlmscope.activations.capture import HasAdapter
from vlmscope.attribution.config import AttributionConfig, parse_feature
from vlmscope.attribution.targets import (
    Targets,
    answer_targets,
    choose_logits,
    difference_target,
    feature_target,
    token_targets,
)
from vlmscope.attribution.words import Tokenizer, answer_ids, token_ids
from vlmscope.core.ids import FeatureId
from vlmscope.models.answers import continued, greedy_answer
from vlmscope.models.base import ModelInputs
from vlmscope.models.positions import token_strings
from vlmscope.replacement.model import ReplacementModel


class TraceableModel(HasAdapter, Protocol):
    """What `trace` needs of a loaded model; `vlmscope.models.loading.VLM` is one."""

    @property
    def name(self) -> str:
        """Short name for records."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns token ids into strings and back."""
        ...


@dataclass(frozen=True)
class Question:
    """What is explained, with words as token ids.

    Attributes:
        inputs: the prompt, continued by all tokens of an answer but the last.
        ids: of `tokens`, `difference`, or the answer.
    """

    inputs: ModelInputs
    ids: tuple[int, ...] = ()


def ask(vlm: TraceableModel, inputs: ModelInputs, config: AttributionConfig) -> Question:
    """Read the question of a configuration, before the model runs (an answer of its own it must give first).

    Raises:
        UserError: a word is no token.
    """
    tokenizer = vlm.tokenizer
    match config.asked:
        case "tokens":
            return Question(inputs, tuple(token_ids(tokenizer, config.tokens, "attribution.tokens")))
        case "difference":
            return Question(inputs, tuple(token_ids(tokenizer, config.difference, "attribution.difference")))
        case "answer":
            ids = answer_ids(tokenizer, config.answer or "")
        case "answer_tokens":
            ids = greedy_answer(vlm.adapter, inputs, config.answer_tokens)
        case _:
            return Question(inputs)
    return Question(continued(vlm.adapter, inputs, ids[:-1], tokenizer), tuple(ids))


def choose_targets(
    replacement: ReplacementModel, config: AttributionConfig, tokenizer: Tokenizer, ids: tuple[int, ...] = ()
) -> Targets:
    """The targets of a question, but for an attention score (`vlmscope.attribution.scores_of_heads`).

    Args:
        replacement: at the question's inputs.
        config: the settings.
        tokenizer: names tokens.
        ids: the question's.

    Raises:
        UserError: the model has not what is asked for.
    """
    match config.asked:
        case "tokens":
            return token_targets(replacement, ids, config.weights)
        case "difference":
            first, second = ids
            shown = f"{_shown(tokenizer, first)} - {_shown(tokenizer, second)}"
            return difference_target(replacement, first, second, shown)
        case "answer" | "answer_tokens":
            return answer_targets(replacement, ids, config.weights)
        case "feature":
            name, where = parse_feature(config.feature or "")
            return feature_target(replacement, FeatureId.parse(name), where)
        case _:
            return choose_logits(replacement, config.logit_mass, config.max_logits, config.token_ids)


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token]).strip() or f"id:{token}"


def labels_of(targets: Targets, tokenizer: Tokenizer | None) -> list[str]:
    """What the ends are called: their tokens, or their own labels."""
    if targets.labels:
        return list(targets.labels)
    assert tokenizer is not None, "targets without labels are named by a tokenizer"
    return token_strings(tokenizer, targets.token_ids)
