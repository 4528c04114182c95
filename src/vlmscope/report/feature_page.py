"""The page about one feature: its strongest examples, what they share, where it fires, and what it promotes.

A page is self-contained and works from `file://`. Its only script is allowed by its hash in the page's content security
policy, so nothing that a token, a label or a caption holds can run, even if it slipped past the template engine's
escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import ANSWER, IMAGE, KINDS, TOP, ExampleView, FeatureRecord, Place, StudyInfo, bin_edges
from vlmscope.features.labels import Label
from vlmscope.features.study_files import StudyFolder
from vlmscope.report.page import TEMPLATES, environment, percent
from vlmscope.report.pictures import SIDE, HeatPicture, data_uri, thumbnail

KIND_NAMES = {"image": "picture", "text": "prompt", "answer": "answer"}
_STORIES = {
    "image": "soft tokens of pictures",
    "text": "the user's words and the template",
    "answer": "what is answered, and plain text",
}


class Numbered(dict[Any, int]):
    """Numbers of entries in a table for the page's script, such as arrangements of patches, each written once."""

    def number(self, item: Any) -> int:
        """The number of an item; a new one gets the next."""
        return self.setdefault(item, len(self))


def render_scripted(template: str, pictures: Iterable[bytes] = (), **values: Any) -> str:
    """A page with the one script of feature pages, which draws `pictures` by number; nothing else can run."""
    heat = Numbered()

    def tables() -> Markup:
        """Left, top, right, bottom of every patch, one list per arrangement. Only the rendered body fills `heat`."""
        geometries = [[round(edge, 4) for box in boxes for edge in box] for boxes in heat]
        return inert_json({"geometries": geometries, "pictures": [data_uri(data) for data in pictures]})

    script = (TEMPLATES / "features.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    values |= {"script": Markup(script), "policy": policy, "heat": heat, "tables": tables, "page_name": page_name}
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    engine = environment().overlay()
    engine.filters = {
        **environment().filters,
        "kind_name": KIND_NAMES.__getitem__,
        "kind_story": _STORIES.__getitem__,
        "kind_of": lambda place: KINDS[place.kind],
        "shown": shown_token,
        "chance": chance,
        "special": special,
        "histogram": histogram,
    }
    return engine


def inert_json(value: Any) -> Markup:
    """JSON for a script element that holds data: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


class Bin(NamedTuple):
    """A non-empty bin of activations, from `low` to `high`: its number, and firings by `KINDS`."""

    number: int
    low: float
    high: float
    counts: tuple[int, ...]


class Histogram(NamedTuple):
    """Bins from number `first` to `end`, firings in the fullest one, ticks (bin, activation), and all in words."""

    bins: list[Bin]
    first: int
    end: int
    most: int
    ticks: list[tuple[int, float]]
    words: str


def histogram(counts: np.ndarray) -> Histogram:
    """The histogram of `[3, BINS]` counts, from the first bin that is not empty to the last."""
    total, edges = counts.sum(0), bin_edges()
    used = np.flatnonzero(total)
    if not len(used):
        return Histogram([], 0, 1, 1, [], "it never fires")
    bins = [Bin(n, edges[n], edges[n + 1], tuple(counts[:, n].tolist())) for n in used.tolist()]
    first, end = bins[0].number, bins[-1].number + 1
    whole = [n for n in range(first, end + 1) if n % 2 == 0]
    ticks = [(n, edges[n]) for n in whole[:: max(1, -(-len(whole) // 7))]]
    middle = int(np.searchsorted(np.cumsum(total), total.sum() / 2))
    half = f"half of them are below {edges[middle + 1]:.3g}, the fullest bin has {total.max():,}"
    return Histogram(bins, first, end, int(total.max()), ticks, f"{total.sum():,} firings; {half}")


_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[(?:CLS|SEP|INST|/INST|PAD)\]")
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


def chance(count: int, total: int) -> str:
    """A share as `1 in 26`, or `9 of 10` when it is large."""
    if not count:
        return f"0 of {total:,}"
    if 2 * count > total:
        return "all" if count == total else f"{10 * count / total:.1f} of 10"
    return f"1 in {total / count:,.0f}"


def shown_token(token: str) -> str:
    """A token for a reader: tokenizers' own signs for spaces and line ends replaced by visible ones."""
    plain = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")
    visible = plain.replace("\n", "⏎").replace("\t", "⇥")
    return visible.strip() or "␣"


def special(token: str) -> bool:
    """Whether a token is a sign of the template, such as `<end_of_turn>`, rather than a word."""
    return _SPECIAL.fullmatch(token) is not None


class PageExample(NamedTuple):
    """One input on which the feature fires: its peak, pictures, the text around the peak, and where it is from.

    `times` is how many examples of the group are this input; equal ones are shown once.
    """

    activation: float
    pictures: tuple[HeatPicture, ...]
    places: tuple[Place, ...]
    caption: str
    origin: str
    times: int = 1


class ExampleGroup(NamedTuple):
    """Examples of one strength: `name` is "top" or "q1" (weakest) and so on."""

    name: str
    title: str
    examples: tuple[PageExample, ...]


class GraphUse(NamedTuple):
    """A graph that keeps the feature: words and addresses of links, positions with token and activation.

    `share` is of the influence of all nodes on the answer, over these positions.
    """

    name: str
    prompt: str
    links: tuple[tuple[str, str], ...]
    positions: tuple[tuple[int, str, float], ...]
    share: float


@dataclass(frozen=True)
class FeaturePage:
    """The contents of the page about one feature.

    `guess` is what its strongest examples share, the title without a label; `tags` what it belongs to, such as a
    circuit; `run` the study's; `missing` says why pictures are not available, and is empty when all are there.
    """

    record: FeatureRecord
    info: StudyInfo
    guess: str
    groups: tuple[ExampleGroup, ...] = ()
    label: Label | None = None
    graphs: tuple[GraphUse, ...] = ()
    tags: tuple[str, ...] = ()
    run: str = ""
    missing: str = ""

    @property
    def feature(self) -> FeatureId:
        """The feature's id."""
        return self.record.feature

    @property
    def labelled(self) -> bool:
        """Whether it has a label that was not scored, or whose score beats chance."""
        return self.label is not None and (self.label.score is None or self.label.beats_chance)

    @property
    def title(self) -> str:
        """The label, or, where there is none that holds, the guess."""
        return self.label.text if self.label and self.labelled else self.guess

    @property
    def file(self) -> str:
        """The page's file name."""
        return page_name(self.feature)

    @property
    def json_file(self) -> str:
        """The path of its JSON from the page; the field's viewers ask for this number."""
        return f"features/{self.feature.cantor}.json"

    @property
    def shares(self) -> dict[str, float]:
        """The share of its firings at positions of each of `KINDS`."""
        return {kind: self.record.fired[kind] / max(self.record.positions_fired, 1) for kind in KINDS}

    @property
    def main_kind(self) -> str:
        """The kind of position at which it fires most; "mixed" without a majority of 60 %, "none" if it never does."""
        if not self.record.positions_fired:
            return "none"
        best = max(KINDS, key=lambda kind: self.shares[kind])
        return best if self.shares[best] >= 0.6 else "mixed"

    @property
    def item_share(self) -> float:
        """The share of the studied inputs on which it fires."""
        return self.record.items_fired / max(self.info.items, 1)

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
            f"Strongest {self.guess}." if self.labelled and self.groups else "",
            f"It fires {often} {_PLACES[order[0]]}{rest}, in {inputs}.",
            f"Where it fires, it pushes the answer towards {promotes}." if promotes else "",
        ]
        return " ".join(part for part in parts if part)

    def render(self, before: FeatureId | None = None, after: FeatureId | None = None) -> str:
        """The page as one HTML string; `before` and `after` are its neighbours in the gallery."""
        return render_scripted("feature_page.html.j2", page=self, before=before, after=after)

    def write(self, folder: Path, before: FeatureId | None = None, after: FeatureId | None = None) -> Path:
        """Write it into the gallery's folder; returns the path."""
        write_text(folder / self.file, self.render(before, after))
        return folder / self.file


def page_name(feature: FeatureId) -> str:
    """The file name of a feature's page."""
    return f"L{feature.layer}_{feature.index}.html"


_CACHED = 4096  # items whose small pictures are kept; features share their strongest items


class PageMaker:
    """Makes the pages of one study's features; `gone` counts the items whose pictures are not available."""

    def __init__(
        self,
        study: StudyFolder,
        labels: Mapping[FeatureId, Label],
        graphs: Mapping[FeatureId, Sequence[GraphUse]],
        tags: Mapping[FeatureId, tuple[str, ...]],
        examples: int,
        samples: int,
    ) -> None:
        """`examples` of the strongest inputs are shown, and `samples` of each weaker group."""
        self.study, self.labels, self.graphs, self.tags = study, labels, graphs, tags
        self.examples, self.samples = examples, samples
        self.run = (study.path.parent if study.path.name == "study" else study.path).name
        self.usual = word_shares(study.items[int(item)].caption for item in study.items.ids)
        self.missing, self.gone = "", 0
        # A cache of this maker, rather than of the class, which would keep all studies alive.
        self._thumbnails = lru_cache(_CACHED)(self._make_thumbnails)

    def page(self, record: FeatureRecord) -> tuple[FeaturePage, list[ExampleView]]:
        """The page of a feature, and the views of all its examples."""
        views = [self.study.view(example) for example in record.examples]
        grouped: dict[str, list[ExampleView]] = {TOP: []}
        for view in views:
            grouped.setdefault(view.example.group, []).append(view)
        quarters = sorted((name for name in grouped if name != TOP), key=lambda name: -int(name[1:]))
        groups = [self._group(name, quarters, grouped[name]) for name in (TOP, *quarters) if grouped[name]]
        label = self.labels.get(record.feature)
        page = FeaturePage(
            record,
            self.study.info,
            guess([(view.item.caption, view.places()) for view, _ in _once(grouped[TOP])], self.usual),
            tuple(groups),
            label if label is not None and label.text else None,
            tuple(self.graphs.get(record.feature, ())),
            self.tags.get(record.feature, ()),
            self.run,
            self.missing if any(p.data is None for g in groups for e in g.examples for p in e.pictures) else "",
        )
        return page, views

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
        item = view.item
        return PageExample(
            view.example.activation, self._pictures(view), view.places(), item.caption, item.origin, times
        )

    def _pictures(self, view: ExampleView) -> tuple[HeatPicture, ...]:
        item, position = view.item, view.example.position
        at_peak = -1
        if item.kinds[position] == IMAGE:
            at_peak = int(item.pictures[np.count_nonzero(item.kinds[:position] == IMAGE)])
        return tuple(
            HeatPicture(*small, item.caption, view.picture_boxes(n), view.picture_levels(n), n == at_peak)
            for n, small in enumerate(self._thumbnails(item.id))
        )

    def _make_thumbnails(self, number: int) -> list[tuple[bytes | None, int, int]]:
        item = self.study.items[number]
        try:
            return [thumbnail(picture) for picture in self.study.pictures(item)]
        except UserError as error:
            self.missing = self.missing or str(error)
            self.gone += 1
            return [(None, SIDE, SIDE)] * item.n_pictures


def _once(views: Sequence[ExampleView]) -> list[tuple[ExampleView, int]]:
    """Each input once, in order of first appearance, with its number of views."""
    times: dict[tuple[str, int], list[ExampleView]] = {}
    for view in views:
        times.setdefault((view.item.digest, view.item.part), []).append(view)
    return [(same[0], len(same)) for same in times.values()]
