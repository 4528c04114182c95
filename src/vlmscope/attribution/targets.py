"""What a graph explains: from words to target vectors.

Tokens named by the user, as words or ids.

What a graph explains, and the vectors that read it from the residual stream.

A logit target is `W_U[t] - mean(W_U)` at the normed last state: the logit minus the mean logit, since a constant
added to all logits changes no probability; the difference of two logits is `W_U[a] - W_U[b]`. Of a model that caps its
logits, targets are of the logits before the cap, which are affine in the sources and keep the order; probabilities are
the model's own, after it. A feature's target is its pre-activation.

From what the user asks to the targets of a graph: words become tokens, an answer continues the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.capture import HasAdapter
from vlmscope.attribution.config import AttributionConfig, parse_feature
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.models.base import ModelInputs, token_strings
from vlmscope.models.conversations import continued, greedy_answer
from vlmscope.replacement.model import ReplacementModel


class Tokenizer(Protocol):
    """What is asked of a tokenizer."""

    unk_token_id: int | None

    def decode(self, token_ids: list[int]) -> str: ...  # a tokenizer's own words

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def get_vocab(self) -> dict[str, int]: ...


def token_id(tokenizer: Tokenizer, word: str, key: str) -> int:
    """The one token of a word; `id:17` is token 17.

    A word is taken as it stands; where it is no single token so, with a space before it, as inside a sentence.

    Args:
        tokenizer: the model's.
        word: as the user wrote it.
        key: the setting that has it, for messages.

    Raises:
        UserError: the word is no single token of the vocabulary; the message names the nearest that is.
    """
    prefix, _, number = word.partition("id:")
    if not prefix and number.isdecimal():
        return int(number)
    for text in (word, " " + word):
        found = _known(tokenizer, text)
        if len(found) == 1:
            return found[0]
    pieces = _known(tokenizer, word)
    vocabulary = {tokenizer.decode([token]).strip(): token for token in tokenizer.get_vocab().values()}
    near = get_close_matches(word.strip(), [text for text in vocabulary if text], n=1, cutoff=0.0)
    hint = f"the nearest is {near[0]!r}" if near else "write it as id:NUMBER"
    if len(pieces) > 1:
        raise UserError(
            f"{key}: {word!r} is {len(pieces)} tokens, not one; {hint} (a whole answer is attribution.answer=)"
        )
    raise UserError(f"{key}: {word!r} is no token of the model; {hint}")


def _known(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text; none if one of them is unknown."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return [] if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids else ids


def answer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of an answer, as they would follow the prompt.

    Raises:
        UserError: the answer is empty or has a word that the model does not know.
    """
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise UserError("attribution.answer is empty; write what the model would say, as in attribution.answer=mars")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        for word in text.split():
            token_id(tokenizer, word, "attribution.answer")
        raise UserError(f"attribution.answer: the model does not know every word of {text!r}; use other words")
    return ids


def token_ids(tokenizer: Tokenizer, words: Sequence[str], key: str) -> list[int]:
    """`token_id` of several."""
    return [token_id(tokenizer, word, key) for word in words]


@dataclass(frozen=True)
class Targets:
    """The ends of a graph: K affine functions of the sources below one place of the model.

    Attributes:
        what: the kind of question, for the record.
        kind: of their nodes, LOGIT or TARGET.
        layer: they read the stream before this layer's attention; L for logits.
        after_attention: they read it after that attention instead.
        positions: `[K]` int64.
        token_ids: `[K]` int64; a feature's index, -1 for what has none.
        probabilities: `[K]` float64, 1 for what has none.
        weights: `[K]` float64, what each is worth where influence starts.
        vectors: `[K, d]`, with the scale of the norm that they read through.
        constants: `[K]`, what the layer itself adds.
        values: `[K]`, the model's own numbers, which the edges must sum to.
        labels: K strings, empty where a token says it.
    """

    what: str
    kind: NodeKind
    layer: int
    after_attention: bool
    positions: np.ndarray
    token_ids: np.ndarray
    probabilities: np.ndarray
    weights: np.ndarray
    vectors: Tensor
    constants: Tensor
    values: Tensor
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)


@torch.no_grad()
def choose_logits(
    replacement: ReplacementModel, logit_mass: float, max_logits: int, token_ids: Sequence[int] = ()
) -> Targets:
    """The smallest set of logits whose probabilities reach `logit_mass`, at most `max_logits`, and `token_ids` besides.

    Raises:
        UserError: when a token id is outside the vocabulary.
    """
    _check_ids(replacement, token_ids)
    probabilities = replacement.capped(replacement.state.logits[-1].double()).softmax(-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    needed = int((ordered.cumsum(0) < logit_mass).sum()) + 1
    chosen = order[: min(needed, max_logits)].tolist()
    chosen += [token for token in dict.fromkeys(token_ids) if token not in chosen]
    return _logits(replacement, "logits", chosen, [replacement.n_positions - 1] * len(chosen))


def token_targets(replacement: ReplacementModel, token_ids: Sequence[int], weights: str = "uniform") -> Targets:
    """The logits of these tokens at the last position; `weights` as in `weighted`.

    Raises:
        UserError: when a token id is outside the vocabulary.
    """
    _check_ids(replacement, token_ids)
    chosen = list(dict.fromkeys(token_ids))
    return weighted(_logits(replacement, "tokens", chosen, [replacement.n_positions - 1] * len(chosen)), weights)


def answer_targets(replacement: ReplacementModel, answer: Sequence[int], weights: str = "uniform") -> Targets:
    """Each token of an answer that follows the prompt, at the position that predicts it.

    Args:
        replacement: of the prompt with all of the answer but its last token (`models.conversations.continued`).
        answer: token ids.
        weights: as in `weighted`.
    """
    first = replacement.n_positions - len(answer)
    return weighted(_logits(replacement, "answer", answer, range(first, replacement.n_positions)), weights)


def weighted(targets: Targets, weights: str) -> Targets:
    """The same targets worth something else where influence starts, 1 in all but for "probability".

    Args:
        targets: logits.
        weights: "uniform"; "probability", their own; or "surprise", in proportion to -log p, which asks most about the
            tokens that were least to be expected.
    """
    count, surprise = len(targets), -np.log(targets.probabilities)
    if weights == "probability":
        return replace(targets, weights=targets.probabilities)
    if weights == "surprise" and surprise.sum() > 0:
        return replace(targets, weights=surprise / surprise.sum())
    return replace(targets, weights=np.full(count, 1.0 / count))


def _check_ids(replacement: ReplacementModel, token_ids: Sequence[int]) -> None:
    size = replacement.state.logits.shape[-1]
    for token in token_ids:
        if not 0 <= token < size:
            raise UserError(f"attribution.token_ids has {token}, but the vocabulary has {size} tokens; correct it")


@torch.no_grad()
def _logits(replacement: ReplacementModel, what: str, token_ids: Sequence[int], positions: Sequence[int]) -> Targets:
    """Centred logits of tokens at positions, worth their probabilities."""
    ids, at = np.array(token_ids, dtype=np.int64), np.array(positions, dtype=np.int64)
    wide = replacement.state.logits[at].double()
    rows = np.arange(len(ids))
    probabilities = replacement.capped(wide).softmax(-1)[rows, ids].cpu().numpy()
    unembedding = replacement.unembedding
    mean = unembedding.mean(0, dtype=torch.float64).to(unembedding.dtype)
    return Targets(
        what=what,
        kind=NodeKind.LOGIT,
        layer=replacement.n_layers,
        after_attention=False,
        positions=at,
        token_ids=ids,
        probabilities=probabilities,
        weights=probabilities,
        vectors=(unembedding[ids] - mean) * replacement.state.final_norm_scale[at],
        constants=wide.new_zeros(len(ids)),
        values=wide[rows, ids] - wide.mean(-1),
    )


@torch.no_grad()
def difference_target(replacement: ReplacementModel, first: int, second: int, label: str) -> Targets:
    """The logit of one token minus that of another, at the last position.

    Raises:
        UserError: when a token id is outside the vocabulary, or both are the same.
    """
    _check_ids(replacement, (first, second))
    if first == second:
        raise UserError(f"attribution.difference names token {first} twice: their difference is 0; name two tokens")
    wide = replacement.state.logits[-1].double()
    vector = replacement.unembedding[first] - replacement.unembedding[second]
    return one_target(
        "difference",
        label,
        (wide[first] - wide[second])[None],
        layer=replacement.n_layers,
        position=replacement.n_positions - 1,
        vectors=(vector * replacement.state.final_norm_scale[-1])[None],
    )


def one_target(
    what: str,
    label: str,
    values: Tensor,
    *,
    layer: int,
    position: int,
    vectors: Tensor,
    constants: Tensor | None = None,
    index: int = -1,
    after_attention: bool = False,
) -> Targets:
    """A single end that is no logit, worth 1; fields as in `Targets`."""
    return Targets(
        what=what,
        kind=NodeKind.TARGET,
        layer=layer,
        after_attention=after_attention,
        positions=np.array([position]),
        token_ids=np.array([index]),
        probabilities=np.ones(1),
        weights=np.ones(1),
        vectors=vectors,
        constants=vectors.new_zeros(1) if constants is None else constants,
        values=values,
        labels=(label,),
    )


@torch.no_grad()
def feature_target(replacement: ReplacementModel, feature: FeatureId, where: str = "max") -> Targets:
    """The pre-activation of an active feature.

    Args:
        replacement: the frozen model.
        feature: which.
        where: "max" (where it is most active), "last", or a position.

    Raises:
        UserError: the model has no such feature or position, or the feature is not active there.
    """
    if not 0 <= feature.layer < replacement.n_layers:
        raise UserError(
            f"attribution.feature={feature}: the model has layers 0 to {replacement.n_layers - 1}; choose one of them"
        )
    found = replacement.features[feature.layer]
    if not 0 <= feature.index < len(found.w_enc):
        raise UserError(
            f"attribution.feature={feature}: layer {feature.layer} has features 0 to {len(found.w_enc) - 1}; choose one"
        )
    active = torch.nonzero(found.index == feature.index)[:, 0]
    number = _active_at(replacement, feature, where, active)
    position = int(found.position[number])
    rows = number[None]
    scale = replacement.layers[feature.layer].mlp_in_scale[position]
    return one_target(
        "feature",
        f"{feature} at {shown_place(replacement.inputs, position)}",
        found.pre_activation[rows],
        layer=feature.layer,
        position=position,
        vectors=found.w_enc[found.index[rows]] * scale,
        constants=found.encoder_bias[rows],
        index=feature.index,
        after_attention=True,
    )


def _active_at(replacement: ReplacementModel, feature: FeatureId, where: str, active: Tensor) -> Tensor:
    """The number among its layer's active features, of those numbered `active`, that stands at a place."""
    found, tokens = replacement.features[feature.layer], replacement.inputs.tokens
    if len(active) == 0:
        near = ""
        if len(found):
            near = f", such as {FeatureId(feature.layer, int(found.index[found.activation.argmax()]))}"
        raise UserError(f"attribution.feature={feature} is active nowhere in this prompt; choose an active one{near}")
    strongest = active[found.activation[active].argmax()]
    if where == "max":
        return strongest
    position = place(where, len(tokens), "attribution.feature")
    here = active[found.position[active] == position]
    if len(here):
        return here[0]
    others = ", ".join(str(int(at)) for at in found.position[active][:8])
    more = ", ..." if len(active) > 8 else ""
    raise UserError(
        f"attribution.feature={feature} is not active at position {position} ({tokens[position]!r}), but at {others}"
        f"{more}; write {feature}@{int(found.position[strongest])}, where it is strongest"
    )


def shown_place(inputs: ModelInputs, position: int) -> str:
    """A position with its token, or the number of its soft token, as figures count them."""
    if inputs.is_image[position]:
        return f"{position} (soft {int(inputs.is_image[:position].sum())})"
    return f"{position} ({inputs.tokens[position]})"


def place(text: str, n_positions: int, key: str) -> int:
    """A position as the user writes it: "last", or a number from 0.

    Raises:
        UserError: it is neither, or the prompt has no such position.
    """
    if text == "last":
        return n_positions - 1
    if not text.isdecimal():
        raise UserError(f"{key}: {text!r} is no position; write last or a number from 0 to {n_positions - 1}")
    if int(text) >= n_positions:
        raise UserError(f"{key}: the prompt has positions 0 to {n_positions - 1}, not {text}; choose one of them")
    return int(text)


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
