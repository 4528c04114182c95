"""One feature in words and pictures, from a study: its strongest examples, what they share, and where it fires."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import ANSWER, IMAGE, KINDS, TOP, ExampleView, FeatureRecord, Place, StudyInfo
from vlmscope.features.labels import Label
from vlmscope.features.study_files import StudyFolder
from vlmscope.report.page import percent
from vlmscope.report.pictures import HeatPicture, thumbnail

_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_MOST = 3  # words in a guess
_SHARED = 0.5  # least share of the strongest examples that have a word of the guess
_RARER = 0.25  # by so much the word's share of all inputs must be lower
_PLACES = {
    "image": "on pictures",
    "text": "on words of the prompt and its template",
    "answer": "on words of answers and plain text",
}


def word_shares(captions: Iterable[str]) -> dict[str, float]:
    """The share of captions with each word, in lower case."""
    each = [{word.lower() for word in _WORD.findall(caption)} for caption in captions]
    counts = Counter(word for words in each for word in words)
    return {word: count / len(each) for word, count in counts.items()}


def guess(examples: Sequence[tuple[str, Sequence[Place]]], usual: Mapping[str, float]) -> str:
    """Guess, in words, what the strongest examples have in common.

    Args:
        examples: caption and places of each.
        usual: share of all inputs with a word (`word_shares`).

    Returns:
        Words such as `right before “mars”`, `at “planet”`, `on pictures of inputs that say “mars”`.
    """
    if not examples:
        return "never fires in this study"
    peaks: list[Place] = []
    following: list[Place] = []
    for _, places in examples:
        peak = next(n for n, place in enumerate(places) if place.peak)
        peaks.append(places[peak])
        following += places[peak + 1 : peak + 2]
    # Words of most captions that few other inputs have, the most telling first.
    shares = word_shares(caption for caption, _ in examples)
    gains = {word: share - usual.get(word, 0.0) for word, share in shares.items() if share >= _SHARED}
    words = sorted((word for word, gain in gains.items() if gain >= _RARER), key=lambda word: (-gains[word], word))
    telling = _quoted(words[:_MOST])
    if sum(place.kind == IMAGE for place in peaks) * 2 > len(peaks):
        return f"on pictures where the text says {telling}" if telling else "on pictures of many kinds"
    after = _common(place for place in following if place.kind == ANSWER)
    # The last token of the prompt is always the same, so what follows tells more.
    if after and all(place.kind != ANSWER for place in peaks):
        return f"right before the answer {_quoted(after)}"
    if tokens := _common(place for place in peaks if place.kind != IMAGE):
        return f"at {_quoted(tokens)}"
    return f"at various words of inputs that say {telling}" if telling else "at various words"


def _common(places: Iterable[Place]) -> list[str]:
    """The fewest tokens, at most `_MOST`, that make up 60 % of these; none when it takes more."""
    counts = Counter(shown_token(place.text) for place in places)
    ranked = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST]
    for size in range(1, len(ranked) + 1):
        if sum(count for _, count in ranked[:size]) >= 0.6 * counts.total():
            return [token for token, _ in ranked[:size]]
    return []


def _quoted(tokens: Iterable[str]) -> str:
    return ", ".join(f"“{shown_token(token)}”" for token in tokens)


def shown_token(token: str) -> str:
    """A token for a reader: tokenizers' own signs for spaces and line ends replaced by visible ones."""
    plain = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")
    visible = plain.replace("\n", "⏎").replace("\t", "⇥")
    return visible.strip() or "␣"


class PageExample(NamedTuple):
    """One input on which the feature fires: its peak, pictures, the text around the peak, and where it is from.

    `times` is how many examples of the group are this input; equal ones are shown once.
    """

    activation: float
    pictures: tuple[HeatPicture, ...]
    places: tuple[Place, ...]
    origin: str
    times: int = 1


class ExampleGroup(NamedTuple):
    """Examples of one strength: `name` is "top" or "q1" (weakest) and so on."""

    name: str
    title: str
    examples: tuple[PageExample, ...]


@dataclass(frozen=True)
class FeaturePage:
    """What a study shows about one feature.

    `guess` is what its strongest examples share; `missing` says why pictures are not available, and is empty when all
    are there.
    """

    record: FeatureRecord
    info: StudyInfo
    guess: str
    groups: tuple[ExampleGroup, ...]
    label: Label | None
    missing: str

    def sentence(self) -> str:
        """Where it fires, how often, and what it promotes, in words."""
        record, fired = self.record, self.record.positions_fired
        if not fired:
            return f"It never fires on the {self.info.items:,} inputs of this study."
        order = sorted((kind for kind in KINDS if record.fired[kind]), key=lambda kind: -record.fired[kind])
        share = record.fired[order[0]] / fired
        often = "only" if len(order) == 1 else "almost only" if share >= 0.95 else "mostly" if share >= 0.6 else "most"
        rest = "" if len(order) == 1 else f" ({percent(share)} of the time)"
        inputs = f"{record.items_fired:,} of {self.info.items:,} inputs"
        promotes = _quoted(word for word, _ in record.top_logits[:_MOST])
        parts = [
            # Without a label this is the title.
            f"Strongest {self.guess}." if self.label and self.groups else "",
            f"It fires {often} {_PLACES[order[0]]}{rest}, in {inputs}.",
            f"Where it fires, it pushes the answer towards {promotes}." if promotes else "",
        ]
        return " ".join(part for part in parts if part)


_CACHED = 4096  # items whose small pictures are kept; features share their strongest items


class PageMaker:
    """Makes the pages of one study's features."""

    def __init__(self, study: StudyFolder, labels: Mapping[FeatureId, Label], examples: int, samples: int) -> None:
        """`labels` are those to show. `examples` of the strongest inputs are, and `samples` of each weaker group."""
        self.study, self.labels, self.examples, self.samples = study, labels, examples, samples
        self.usual = word_shares(study.items[int(item)].caption for item in study.items.ids)
        self.missing = ""
        # A cache of this maker, rather than of the class, which would keep all studies alive.
        self._thumbnails = lru_cache(_CACHED)(self._make_thumbnails)

    def page(self, record: FeatureRecord) -> FeaturePage:
        """The page of a feature."""
        views = [self.study.view(example) for example in record.examples]
        grouped: dict[str, list[ExampleView]] = {TOP: []}
        for view in views:
            grouped.setdefault(view.example.group, []).append(view)
        quarters = sorted((name for name in grouped if name != TOP), key=lambda name: -int(name[1:]))
        groups = [self._group(name, quarters, grouped[name]) for name in (TOP, *quarters) if grouped[name]]
        return FeaturePage(
            record,
            self.study.info,
            guess([(view.item.caption, view.places()) for view, _ in _once(grouped[TOP])], self.usual),
            tuple(groups),
            self.labels.get(record.feature),
            self.missing if any(p.data is None for g in groups for e in g.examples for p in e.pictures) else "",
        )

    def _group(self, name: str, quarters: Sequence[str], views: Sequence[ExampleView]) -> ExampleGroup:
        title, shown = "Strongest examples", self.examples
        if name != TOP:
            place, shown = quarters.index(name), self.samples
            ends = {0: ", the stronger inputs", len(quarters) - 1: ", the weakest inputs"}
            title = f"Part {place + 1} of {len(quarters)}{ends.get(place, '')}"
        examples = [self.example(view, times) for view, times in _once(views)[:shown]]
        return ExampleGroup(name, title, tuple(examples))

    def example(self, view: ExampleView, times: int = 1) -> PageExample:
        """An input on which a feature fires, with its pictures."""
        return PageExample(view.example.activation, self._pictures(view), view.places(), view.item.origin, times)

    def _pictures(self, view: ExampleView) -> tuple[HeatPicture, ...]:
        item, position = view.item, view.example.position
        at_peak = -1
        if item.kinds[position] == IMAGE:
            at_peak = int(item.pictures[np.count_nonzero(item.kinds[:position] == IMAGE)])
        return tuple(
            HeatPicture(small, view.picture_boxes(n), view.picture_levels(n), n == at_peak)
            for n, small in enumerate(self._thumbnails(item.id))
        )

    def _make_thumbnails(self, number: int) -> list[bytes | None]:
        item = self.study.items[number]
        try:
            return [thumbnail(picture) for picture in self.study.pictures(item)]
        except UserError as error:
            self.missing = self.missing or str(error)
            return [None] * item.n_pictures


def _once(views: Sequence[ExampleView]) -> list[tuple[ExampleView, int]]:
    """Each input once, in order of first appearance, with its number of views."""
    times: dict[tuple[str, int], list[ExampleView]] = {}
    for view in views:
        times.setdefault((view.item.digest, view.item.part), []).append(view)
    return [(same[0], len(same)) for same in times.values()]
