"""Search among the features of a study: by words, and by the activations that a picture gives.

A word matches a label that has it, or predicates that hold of a feature's strongest items more often than of all items
(facts of their scenes, words of question and answer). By activations, active features are ranked by how rarely they
are so strong in the study.

Legend: F features of a layer, P predicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import TOP
from vlmscope.features.item_facts import ItemFacts, words_of
from vlmscope.features.labels import ABOUT, SMALL, WORDS, Labels, stem
from vlmscope.features.study_files import StudyFolder

_OF_LABEL = 0.5  # of a word's match; the other half is that of the examples
_LEAST = 0.05  # relevance, and match of a word, that is worth reporting


@dataclass(frozen=True)
class Match:
    """One result of a search."""

    feature: FeatureId
    relevance: float  # by words from 0 to 1; by activations in bits: how rarely it is so strong in an item
    why: str  # what matched, in words
    activation: float | None = None  # in the user's input; None by words


def stems(text: str) -> set[str]:
    """The words of a text, without plurals."""
    return {stem(word) for word in words_of(text)}


def find_by_words(study: StudyFolder, facts: ItemFacts, labels: Labels, query: str, count: int = 12) -> list[Match]:
    """The features that a query describes, best first: those that match more of its words, and more surely.

    A `UserError` when the query has no word, or no feature has to do with any of them.
    """
    words = list(dict.fromkeys(stem(word) for word in words_of(query)))
    keywords = [word for word in words if word not in SMALL] or words
    if not keywords:
        raise UserError(f"query={query}: it has no word; write for example 'query=red planet'")
    columns: dict[str, list[int]] = {}  # the predicates that speak of each word
    for column, (key, value) in enumerate(facts.names):
        for word in stems(value if key in WORDS else f"{key.replace('_', ' ')} {value}"):
            columns.setdefault(word, []).append(column)
    named = {feature: stems(label.text) for feature, label in labels.all().items()}
    matches: list[Match] = []
    for layer in study.layers:
        lifts = _lifts(study, layer, facts)  # [F, P]
        by_examples, reason = np.zeros((len(lifts), len(keywords))), np.full((len(lifts), len(keywords)), -1)
        for number, word in enumerate(keywords):
            if word in columns:
                lift = lifts[:, columns[word]]
                by_examples[:, number] = (1 - _OF_LABEL) * np.maximum(lift.max(1), 0)
                reason[:, number] = np.array(columns[word])[lift.argmax(1)]
        by_label = np.zeros_like(by_examples)
        for feature, known in named.items():
            if feature.layer == layer and known.intersection(keywords):
                label = labels.of(feature)
                # A label counts as far as it can be trusted: at chance, nothing.
                trust = 1.0 if label.source == "hand" else max(0.0, 2 * (label.low or 0.5) - 1) * label.beats_chance
                by_label[feature.index] = [_OF_LABEL * trust * (word in known) for word in keywords]
        total = (by_examples + by_label).mean(1)
        for index in np.argsort(-total, kind="stable")[:count].tolist():
            if total[index] > _LEAST:
                why = ["the label"] if by_label[index].any() else []
                why += [_reason(facts, column) for column in reason[index][by_examples[index] > _LEAST]]
                matches.append(Match(FeatureId(layer, index), float(total[index]), "; ".join(dict.fromkeys(why))))
    if not matches:
        known = sorted(set(columns) | set().union(*named.values()))
        near = [hit for word in keywords for hit in get_close_matches(word, known, n=2)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"words that occur: {', '.join(known[:12])} ..."
        raise UserError(f"query={query}: no feature of {study.path} matches; {hint}")
    return sorted(matches, key=lambda match: (-match.relevance, match.feature))[:count]


def _reason(facts: ItemFacts, column: int) -> str:
    key, value = facts.names[column]
    if key == ABOUT:
        return value
    return f'"{value}" in the {key}' if key in WORDS else f"{key} = {value}"


def _lifts(study: StudyFolder, layer: int, facts: ItemFacts) -> np.ndarray:
    """`[F, P]`: how much more often predicates hold of the strongest items than of all; from -1 to 1."""
    feature, items = study.example_items(layer, top=True)
    matrix = facts.matrix[facts.places(items)]
    n_features = study.info.n_features[layer]
    sums = np.zeros((n_features, matrix.shape[1]), dtype=np.float32)
    if len(feature):
        first = np.flatnonzero(np.diff(feature, prepend=-1))
        sums[feature[first]] = np.add.reduceat(matrix, first, axis=0)
    totals = np.bincount(feature, minlength=n_features)
    # One example shows nothing: two items of the background are added to each feature's.
    mean = facts.matrix.mean(0)
    return (sums + 2 * mean) / (totals[:, None] + 2) - mean


def find_by_activations(study: StudyFolder, peaks: Mapping[int, np.ndarray], count: int = 12) -> list[Match]:
    """The features that are active and rarely so strong, rarest first, from `peaks`: by layer [F], of the input.

    How rare: the share of the study's items that fire the feature, times the share of its drawn items that reach the
    activation, with half an item added to both, in bits.
    """
    ranked: list[tuple[float, float, Match]] = []
    for layer, activations in peaks.items():
        table, counts = study.examples(layer), study.layer(layer)
        drawn = table["group"].to_numpy() != TOP
        feature, peak = table["feature"].to_numpy()[drawn], table["activation"].to_numpy()[drawn]
        total = np.bincount(feature, minlength=len(activations))
        reached = np.bincount(feature[peak >= activations[feature]], minlength=len(activations))
        firing = (counts.items_fired + 0.5) / (study.info.items + 1)
        share = firing * (reached + 0.5) / (total + 1)
        for index in np.flatnonzero(activations > 0).tolist():
            bits = -math.log2(float(share[index]))
            largest = float(counts.activation_max[index])
            relative = float(activations[index]) / largest if largest > 0 else math.inf
            why = f"fires on {100 * firing[index]:.1f} % of items; {relative:.2f} of its largest activation"
            why = why if largest > 0 else "never fired in the study"
            ranked.append((-bits, -relative, Match(FeatureId(layer, index), bits, why, float(activations[index]))))
    if not ranked:
        raise UserError(f"no feature of {study.path} is active on this input; give another picture or prompt")
    return [match for _, _, match in sorted(ranked, key=lambda row: row[:2])[:count]]
