"""Automatic labels of all features of a study, offline: proposed by contrast on one half of the items, scored on the
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmscope.core.ids import FeatureId
from vlmscope.core.seeds import generator
from vlmscope.features.labels.item_facts import ItemFacts
from vlmscope.features.labels.known import KnownItems, known_items
from vlmscope.features.labels.label import NONE, Label
from vlmscope.features.labels.places import PlaceLabel, Places, place_labels
from vlmscope.features.labels.propose import propose
from vlmscope.features.labels.rules import Rule
from vlmscope.features.labels.scores import Detection, detection, discoveries
from vlmscope.features.study.records import StudyFolder


@dataclass(frozen=True)
class LabelledLayer:
    """Labels of a layer's features in order, and the scores that the same steps give on shuffled activations."""

    layer: int
    labels: list[Label]
    shuffled: list[Label]


def label_layer(
    study: StudyFolder, layer: int, facts: ItemFacts, at: Places, seed: int = 0, shuffled: int = 256
) -> LabelledLayer:
    """Label all features of a layer.

    Args:
        study: the study.
        layer: which.
        facts: of its items.
        at: of its items' positions.
        seed: of the shuffles.
        shuffled: on the shuffled activations of so many of the layer's features everything is done again.
    """
    examples = study.examples(layer)
    known = known_items(study, layer, examples, facts)
    window = int(str(study.info.settings["window"]))
    found = place_labels(at, facts, known, examples, window)
    labels = [_label(facts, known, feature, place) for feature, place in enumerate(found)]
    if not shuffled:
        return LabelledLayer(layer, labels, [])
    rng = generator(seed, "shuffled labels", layer)
    mixed = known.shuffled(rng, len(facts.ids))
    # Places are shuffled within the items on which the feature fires, so those stay as they are.
    mixed_places = place_labels(at, facts, known, examples, window, rng)
    picked = np.sort(rng.permutation(len(labels))[:shuffled]).tolist()
    return LabelledLayer(layer, labels, [_label(facts, mixed, one, mixed_places[one]) for one in picked])


def judged(found: Sequence[tuple[FeatureId, Label]]) -> list[tuple[FeatureId, Label]]:
    """Labels of a set, with what beats chance decided over all of them together."""
    better = discoveries(np.array([np.nan if label.p is None else label.p for _, label in found]))
    return [
        (feature, replace(label, beats_chance=bool(beats)))
        for (feature, label), beats in zip(found, better, strict=True)
    ]


def score_rule(facts: ItemFacts, known: KnownItems, feature: int, rule: Rule) -> tuple[Detection | None, float | None]:
    """A rule on the items for scoring: detection of the drawn items, and the AUROC of the strongest ones alone."""
    rows = known.rows(feature)
    item, drawn = known.item[rows], known.drawn[rows]
    own = facts.half[item]
    positive = item[own & drawn & known.positive[rows]]
    background = np.flatnonzero(facts.half[: int(known.reach[feature])])
    others = facts.grades(rule, np.setdiff1d(background, positive))
    strongest = facts.grades(rule, item[own & known.top[rows]])
    silent = facts.grades(rule, np.setdiff1d(background, item[drawn]))
    top = detection(strongest, silent)
    return detection(facts.grades(rule, positive), others), None if top is None else top.auroc


def _label(facts: ItemFacts, known: KnownItems, feature: int, place: PlaceLabel | None) -> Label:
    proposal = propose(facts, known, feature)
    where = {} if place is None else {"place": place.part.place, "place_score": place.auroc}
    strong = bool(known.strong[feature])
    if proposal is not None:
        rule = proposal.rule
        score, top = score_rule(facts, known, feature, rule)
        if score is not None:
            words = ", ".join(part for part in (rule.text, where.get("place")) if part)
            return Label(
                f"strong: {words}" if strong else words, "auto", "items",
                score.auroc, score.low, score.high, score.balanced, score.p, score.positives, score.negatives,
                strong=strong, top_score=top, rule=rule.to_json(), **where,
            )  # fmt: skip
    if place is None:
        return NONE
    return Label(
        place.part.place, "auto", "positions", place.auroc, place.low, place.high, place.auroc, place.p, place.items,
        strong=strong, **where,
    )  # fmt: skip
