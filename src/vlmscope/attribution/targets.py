"""Targets, the ends of a graph: from words and settings to the vectors that read them from the residual stream.

A logit target is `W_U[t] - mean(W_U)` at the normed last state: the logit minus the mean logit, since a constant
added to all logits changes no probability; the difference of two logits is `W_U[a] - W_U[b]`. Where a model caps its
logits, targets are the logits before the cap, which are affine in the sources and have the same order; probabilities
are the model's own, after the cap. A feature's target is its pre-activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.config import AttributionConfig, parse_feature
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import TOWER, FeatureId, layer_name
from vlmscope.models.base import ModelInputs, token_strings
from vlmscope.models.batching import continued, greedy_answer
from vlmscope.models.loading import VLM
from vlmscope.replacement import ReplacementModel


@dataclass(frozen=True)
class Targets:
    """The ends of a graph: K affine functions of the sources below one place of the model."""

    what: str  # the kind of question, for the record
    kind: NodeKind  # of their nodes, LOGIT or TARGET
    layer: int  # they read the stream before this layer's attention; L for logits; a tower's MLP input from `TOWER` on
    after_attention: bool  # they read it after that attention instead
    positions: np.ndarray  # `[K]` int64
    token_ids: np.ndarray  # `[K]` int64; the index of a feature, -1 for other ends
    probabilities: np.ndarray  # `[K]` float64, 1 for ends that are no logits
    weights: np.ndarray  # `[K]` float64, the influence that starts at each
    vectors: Tensor  # `[K, d]`, with the scale of the norm that they read through
    constants: Tensor  # `[K]`, what the layer itself adds
    values: Tensor  # `[K]`, the model's own numbers, which the edges must sum to
    labels: tuple[str, ...] = ()  # K strings; empty for logits, which are named by their tokens

    def __len__(self) -> int:
        return len(self.token_ids)

    def names(self, tokenizer: Any) -> list[str]:
        """The labels of the ends, or their tokens."""
        return list(self.labels) or token_strings(tokenizer, self.token_ids.tolist())


def ask(vlm: VLM, inputs: ModelInputs, config: AttributionConfig) -> tuple[ModelInputs, list[int]]:
    """The prompt, continued by all tokens of an answer but the last, and the token ids that a configuration names.

    The model runs only for `answer_tokens`, its own answer.
    """
    tokenizer = vlm.tokenizer
    match config.asked:
        case "tokens" | "difference" as name:
            return inputs, [token_id(tokenizer, word, f"attribution.{name}") for word in getattr(config, name)]
        case "answer":
            ids = _answer_ids(tokenizer, config.answer or "")
        case "answer_tokens":
            ids = greedy_answer(vlm.adapter, inputs, config.answer_tokens)
        case _:
            return inputs, []
    return continued(vlm.adapter, inputs, ids[:-1], tokenizer), ids


def choose_targets(
    replacement: ReplacementModel, config: AttributionConfig, tokenizer: Any, ids: Sequence[int] = ()
) -> Targets:
    """The targets of any question but an attention score, with the token ids that `ask` returned, at its inputs."""
    match config.asked:
        case "tokens":
            chosen = list(dict.fromkeys(ids))
            last = [replacement.n_positions - 1] * len(chosen)
            return _weighted(_logits(replacement, "tokens", chosen, last), config.weights)
        case "difference":
            names = [tokenizer.decode([token]).strip() or f"id:{token}" for token in ids]
            first, second = ids
            return difference_target(replacement, first, second, " - ".join(names))
        case "answer" | "answer_tokens":
            return answer_targets(replacement, ids, config.weights)
        case "feature":
            name, where = parse_feature(config.feature or "")
            return feature_target(replacement, FeatureId.parse(name), where)
        case _:
            return choose_logits(replacement, config.logit_mass, config.max_logits, config.token_ids)


def token_id(tokenizer: Any, word: str, key: str) -> int:
    """The single token of a word; `id:17` is token 17.

    A word that is not one token is tried again with a space before it, as inside a sentence. `key` is the setting that
    holds the word, for messages.

    Raises:
        UserError: the word is no token or several.
    """
    prefix, _, number = word.partition("id:")
    if not prefix and number.isdecimal():
        return int(number)
    for text in (word, " " + word):
        ids = _known(tokenizer, text)
        if len(ids) == 1:
            return ids[0]
    vocabulary = {tokenizer.decode([token]).strip(): token for token in tokenizer.get_vocab().values()}
    near = get_close_matches(word.strip(), [text for text in vocabulary if text], n=1, cutoff=0.0)
    hint = f"the nearest is {near[0]!r}" if near else "write it as id:NUMBER"
    pieces = len(_known(tokenizer, word))
    if pieces > 1:
        raise UserError(f"{key}: {word!r} is {pieces} tokens, not one; {hint} (a whole answer is attribution.answer=)")
    raise UserError(f"{key}: {word!r} is not a token of the model; {hint}")


def _known(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text; an empty list if one of them is unknown."""
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return [] if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids else ids


def _answer_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of an answer that follows the prompt."""
    ids = _known(tokenizer, text)
    if not text.strip():
        raise UserError("attribution.answer is empty; write what the model would say, as in attribution.answer=mars")
    if not ids:
        for word in text.split():
            token_id(tokenizer, word, "attribution.answer")  # names the first unknown word
        raise UserError(f"attribution.answer: the model does not know every word of {text!r}; use other words")
    return ids


@torch.no_grad()
def choose_logits(
    replacement: ReplacementModel, logit_mass: float, max_logits: int, token_ids: Sequence[int] = ()
) -> Targets:
    """The fewest logits whose probabilities reach `logit_mass`, at most `max_logits`, and those of `token_ids`."""
    probabilities = replacement.capped(replacement.state.logits[-1].double()).softmax(-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    needed = int((ordered.cumsum(0) < logit_mass).sum()) + 1
    chosen = order[: min(needed, max_logits)].tolist()
    chosen += [token for token in dict.fromkeys(token_ids) if token not in chosen]
    return _logits(replacement, "logits", chosen, [replacement.n_positions - 1] * len(chosen))


def answer_targets(replacement: ReplacementModel, answer: Sequence[int], weights: str = "uniform") -> Targets:
    """The logit of each token of an answer, at the position that predicts it; `weights` as in `AttributionConfig`.

    The replacement model must be that of the prompt with all tokens of the answer but the last.
    """
    first = replacement.n_positions - len(answer)
    return _weighted(_logits(replacement, "answer", answer, range(first, replacement.n_positions)), weights)


def _weighted(logits: Targets, weights: str) -> Targets:
    surprise = -np.log(logits.probabilities)
    if weights == "probability":
        return logits
    if weights == "surprise" and surprise.sum() > 0:
        return replace(logits, weights=surprise / surprise.sum())
    return replace(logits, weights=np.full(len(logits), 1.0 / len(logits)))


def _check_ids(replacement: ReplacementModel, token_ids: Sequence[int]) -> None:
    size = replacement.state.logits.shape[-1]
    for token in token_ids:
        if not 0 <= token < size:
            raise UserError(f"attribution.token_ids has {token}, but the vocabulary has {size} tokens; correct it")


@torch.no_grad()
def _logits(replacement: ReplacementModel, what: str, token_ids: Sequence[int], positions: Sequence[int]) -> Targets:
    """Centred logits of tokens at positions, weighted by their probabilities."""
    _check_ids(replacement, token_ids)
    ids, places = np.array(token_ids, dtype=np.int64), np.array(positions, dtype=np.int64)
    wide = replacement.state.logits[places].double()
    rows = np.arange(len(ids))
    probabilities = replacement.capped(wide).softmax(-1)[rows, ids].cpu().numpy()
    unembedding = replacement.unembedding
    mean = unembedding.mean(0, dtype=torch.float64).to(unembedding.dtype)
    return Targets(
        what=what,
        kind=NodeKind.LOGIT,
        layer=replacement.n_layers,
        after_attention=False,
        positions=places,
        token_ids=ids,
        probabilities=probabilities,
        weights=probabilities,
        vectors=(unembedding[ids] - mean) * replacement.state.final_norm_scale[places],
        constants=wide.new_zeros(len(ids)),
        values=wide[rows, ids] - wide.mean(-1),
    )


@torch.no_grad()
def difference_target(replacement: ReplacementModel, first: int, second: int, label: str) -> Targets:
    """The logit of one token minus that of another, at the last position."""
    _check_ids(replacement, (first, second))
    if first == second:
        raise UserError(f"attribution.difference names token {first} twice: their difference is 0; name two tokens")
    wide = replacement.state.logits[-1].double()
    vector = replacement.unembedding[first] - replacement.unembedding[second]
    return other_targets(
        "difference",
        [label],
        (wide[first] - wide[second])[None],
        layer=replacement.n_layers,
        positions=[replacement.n_positions - 1],
        vectors=(vector * replacement.state.final_norm_scale[-1])[None],
    )


def other_targets(
    what: str,
    labels: Sequence[str],
    values: Tensor,
    *,
    layer: int,
    positions: Sequence[int],
    vectors: Tensor,
    constants: Tensor | None = None,
    index: int = -1,
    after_attention: bool = False,
) -> Targets:
    """Ends that are no logits, with equal weights; fields as in `Targets`."""
    count = len(labels)
    return Targets(
        what=what,
        kind=NodeKind.TARGET,
        layer=layer,
        after_attention=after_attention,
        positions=np.array(positions),
        token_ids=np.full(count, index),
        probabilities=np.ones(count),
        weights=np.full(count, 1.0 / count),
        vectors=vectors,
        constants=vectors.new_zeros(count) if constants is None else constants,
        values=values,
        labels=tuple(labels),
    )


def feature_target(replacement: ReplacementModel, feature: FeatureId, where: str = "max") -> Targets:
    """The pre-activation of an active feature, at its most active ("max"), the "last" or a given position."""
    active = _active(replacement, feature)
    features, tokens, first = replacement.features_of(feature.layer), replacement.inputs.tokens, 0
    if feature.layer < 0 and replacement.tower is not None:
        first = replacement.tower.first_position
        tokens = [*tokens, *["patch"] * len(replacement.tower)]
    row = active[features.activation[active].argmax()]
    if where != "max":
        position = parse_position(where, len(tokens), "attribution.feature")
        there = first + features.position
        here = active[there[active] == position]
        if not len(here):
            listed = ", ".join(map(str, there[active][:8].tolist())) + ", ..." * (len(active) > 8)
            raise UserError(
                f"attribution.feature={feature} is not active at position {position} ({tokens[position]!r}), but at "
                f"{listed}; write {feature}@{int(there[row])}, where it is strongest"
            )
        row = here[0]
    return _feature_targets(replacement, feature, row[None])


def feature_at(replacement: ReplacementModel, feature: FeatureId, positions: np.ndarray) -> Targets:
    """The pre-activations of a feature where it is active among `positions [n]`, one target each."""
    active = _active(replacement, feature)
    position = replacement.features[feature.layer].position[active]
    inside = torch.from_numpy(np.isin(position.numpy(force=True), positions)).to(position.device)
    return _feature_targets(replacement, feature, active[inside])


def _active(replacement: ReplacementModel, feature: FeatureId) -> Tensor:
    """A feature's numbers among the active features of its layer, one per position where it is active."""
    n_layers, first = replacement.n_layers, 0
    if feature.layer < 0:
        if replacement.tower is None:
            raise UserError(
                f"attribution.feature={feature} is of the vision tower, and this prompt has no picture; give image="
            )
        n_layers, first = len(replacement.tower.features), TOWER
    if not first <= feature.layer < first + n_layers:
        where = "the vision tower" if first else "the model"
        raise UserError(f"attribution.feature={feature}: {where} has layers 0 to {n_layers - 1}; choose one of them")
    features = replacement.features_of(feature.layer)
    if not 0 <= feature.index < len(features.w_enc):
        layer, last = layer_name(feature.layer)[1:], len(features.w_enc) - 1
        raise UserError(f"attribution.feature={feature}: layer {layer} has features 0 to {last}; choose one")
    active = torch.nonzero(features.index == feature.index)[:, 0]
    if not len(active):
        strongest = features.index[features.activation.argmax()] if len(features) else None
        near = "" if strongest is None else f", such as {FeatureId(feature.layer, int(strongest))}"
        raise UserError(f"attribution.feature={feature} is active nowhere in this prompt; choose an active one{near}")
    return active


@torch.no_grad()
def _feature_targets(replacement: ReplacementModel, feature: FeatureId, rows: Tensor) -> Targets:
    features = replacement.features_of(feature.layer)
    positions, vectors = features.position[rows], features.w_enc[features.index[rows]]
    if feature.layer >= 0:
        vectors = vectors * replacement.layers[feature.layer].mlp_in_scale[positions]
        places = [shown_position(replacement.inputs, position) for position in positions.tolist()]
    else:
        assert replacement.tower is not None
        positions = replacement.tower.first_position + positions
        places = [f"{position} (patch)" for position in positions.tolist()]
    return other_targets(
        "feature",
        [f"{feature} at {place}" for place in places],
        features.pre_activation[rows],
        layer=feature.layer,
        positions=positions.tolist(),
        vectors=vectors,
        constants=features.encoder_bias[rows],
        index=feature.index,
        after_attention=True,
    )


def shown_position(inputs: ModelInputs, position: int) -> str:
    """A position with its token, or with the number of its soft token, counted as in figures."""
    if inputs.is_image[position]:
        return f"{position} (soft {int(inputs.is_image[:position].sum())})"
    return f"{position} ({inputs.tokens[position]})"


def parse_position(text: str, n_positions: int, key: str) -> int:
    """Read a position, "last" or a number from 0, from the setting `key`."""
    if text == "last":
        return n_positions - 1
    if not text.isdecimal():
        raise UserError(f"{key}: {text!r} is not a position; write last or a number from 0 to {n_positions - 1}")
    if int(text) >= n_positions:
        raise UserError(f"{key}: the prompt has positions 0 to {n_positions - 1}, not {text}; choose one of them")
    return int(text)
