"""A label from an outside explainer, scored as automatic ones are: on items that it was not shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.ids import FeatureId
from vlmscope.core.seeds import generator
from vlmscope.data.images import png_bytes
from vlmscope.features.labels.explainer import Explainer, Shown, one_line
from vlmscope.features.labels.item_facts import ItemFacts, scoring_half
from vlmscope.features.labels.known import KnownItems, known_items
from vlmscope.features.labels.label import NONE, Label
from vlmscope.features.labels.scores import detection
from vlmscope.features.study.items import StudyItems
from vlmscope.features.study.kept_pairs import item_hash
from vlmscope.features.study.records import StudyFolder

SIDE = 512  # pixels of a picture that is sent


@dataclass(frozen=True)
class Material:
    """What explainers are shown of a study.

    Attributes:
        study: the study.
        shown: examples from which a label is proposed: the strongest.
        judged: items on which it fires and items on which it does not, each, by which the label is scored.
        seed: draws these.
    """

    study: StudyFolder
    shown: int
    judged: int
    seed: int = 0

    @cached_property
    def items(self) -> ItemFacts:
        """The items in the order of their hashes, and which are for scoring; no predicates."""
        return bare_items(self.study.items)

    def known(self, layer: int) -> KnownItems:
        """The rows of a layer."""
        return known_items(self.study, layer, self.study.examples(layer), self.items)

    def marked(self, feature: FeatureId) -> list[Shown]:
        """The strongest examples on items for proposing, with where they fire."""
        record = self.study.feature(feature)
        own = [one for one in record.group("top") if not self.items.half[self.items.places(np.array([one.item]))[0]]]
        out = []
        for example in own[: self.shown]:
            view = self.study.view(example)
            peak = example.position
            words = [
                f"<<{token}>>" if at == peak else token
                for at, token in enumerate(view.item.tokens)
                if view.item.kinds[at] != 1
            ]
            out.append(Shown(" ".join(words), self._pictures(example.item)))
        return out

    def plain(self, item: int) -> Shown:
        """An item as it is."""
        return Shown(self.study.items[item].caption, self._pictures(item))

    def _pictures(self, item: int) -> tuple[bytes, ...]:
        return tuple(png_bytes(picture, SIDE) for picture in self.study.pictures(self.study.items[item]))


def bare_items(items: StudyItems) -> ItemFacts:
    """Items without predicates: their order and halves are those of `item_facts`."""
    ids = items.ids[np.argsort(item_hash(items.ids), kind="stable")]
    return ItemFacts(ids, scoring_half(ids), (), np.zeros((len(ids), 0), dtype=np.float32))


def explain(explainer: Explainer, material: Material, feature: FeatureId) -> Label:
    """Ask for a label, and score it on held-out items of both kinds; without text when nothing can be shown.

    Raises:
        UserError: the explainer does not answer.
    """
    shown = material.marked(feature)
    if not shown:
        return NONE
    text = one_line(explainer.propose(shown))
    if not text:
        raise UserError(f"{explainer.name} gave no label for {feature}; try again, or another model")
    known = material.known(feature.layer)
    rows = known.rows(feature.index)
    drawn = known.item[rows][known.drawn[rows]]
    wanted = known.item[rows][known.drawn[rows] & known.positive[rows]]
    scoring = np.flatnonzero(material.items.half[: int(known.reach[feature.index])])
    rng = generator(material.seed, "judged", str(feature))
    positive = rng.permutation(np.intersect1d(wanted, scoring))[: material.judged]
    others = np.setdiff1d(scoring, wanted if known.strong[feature.index] else drawn)
    negative = rng.permutation(others)[: material.judged]
    items = [material.plain(int(material.items.ids[place])) for place in [*positive, *negative]]
    grades = np.array(explainer.judge(text, items))
    score = detection(grades[: len(positive)], grades[len(positive) :])
    strong = bool(known.strong[feature.index])
    if score is None:
        return Label(text, explainer.name, strong=strong)
    return Label(
        text, explainer.name, "items", score.auroc, score.low, score.high, score.balanced, score.p,
        score.positives, score.negatives, strong=strong,
    )  # fmt: skip
