"""Pages about features: histogram, words, strongest examples, and the page with its script.

Pages with a script: it is in the page, and the page's content security policy names its hash, so no other runs.

A histogram of activations as numbers to draw: bars by kind of position, two bins an octave.

What is said of a feature in plain words: what its strongest examples share, where it fires, what it promotes.

Features with their strongest examples, one row each: a picture with where it fires, or the words around the peak.

What a page about one feature is made of, and the page: self-contained, works from `file://`.

Its only script is allowed by its hash in the page's content security policy, so nothing that a token, a label or a
caption holds can run, even if it slipped past the template engine's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.axes import Axes

from vlmscope.core.artifacts import write_text
from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import FeatureId
from vlmscope.core.study import ANSWER, IMAGE, KINDS, FeatureRecord, Place, bin_edges
from vlmscope.report.page import TEMPLATES, environment, percent
from vlmscope.report.style import MUTED, drawing
from vlmscope.report.thumbnails import Geometries, HeatPicture, decode, overlay, token_spans

KIND_NAMES = {"image": "picture", "text": "prompt", "answer": "answer"}
_STORIES = {
    "image": "soft tokens of pictures",
    "text": "the user's words and the template",
    "answer": "what is answered, and plain text",
}


def render_scripted(template: str, geometries: Geometries, **values: Any) -> str:
    """A page with the one script of feature pages; its policy lets nothing else run.

    Args:
        template: its name.
        geometries: arrangements of patches, filled while the page's body is rendered.
        values: what the template asks for; `tables`, if given, is more for the script to read.
    """
    script = (TEMPLATES / "features.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    more = values.pop("tables", {})
    return (
        _environment()
        .get_template(template)
        .render(
            script=Markup(script),
            policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
            tables=lambda: inert_json({"geometries": geometries.table(), **more}),
            **values,
        )
    )


def _kind_of(place: Place) -> str:
    return KINDS[place.kind]


@cache
def _environment() -> Environment:
    made = environment().overlay()
    filters: dict[str, Any] = {
        "kind_name": KIND_NAMES.__getitem__,
        "kind_story": _STORIES.__getitem__,
        "kind_of": _kind_of,
        "shown": shown_token,
        "chance": chance,
        "special": special,
    }
    made.filters = {**environment().filters, **filters}
    return made


def inert_json(value: Any) -> Markup:
    """JSON for a script element that holds data: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


WIDTH, HEIGHT = 300.0, 96.0


@dataclass(frozen=True)
class Bar:
    """One kind's part of a bin, in the drawing's units."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    words: str


@dataclass(frozen=True)
class Histogram:
    """Bars, ticks (place and number) of the axis of activations, the fullest bin, and all in words."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    most: int
    words: str
    width: float = WIDTH
    height: float = HEIGHT


def histogram(counts: np.ndarray) -> Histogram:
    """Draw `[3, BINS]` counts from the first bin that is not empty to the last."""
    total = counts.sum(0)
    used = np.flatnonzero(total)
    if not len(used):
        return Histogram((), (), 0, "it never fires")
    edges, first, last = bin_edges(), int(used[0]), int(used[-1]) + 1
    step, most = WIDTH / (last - first), int(total.max())
    bars = []
    for at in used:
        floor = HEIGHT
        for row in (1, 0, 2):  # the picture's part at the bottom
            count = int(counts[row, at])
            if not count:
                continue
            high = HEIGHT * count / most
            floor -= high
            said = f"{count:,} at {KINDS[row]} positions, activations {edges[at]:.3g} to {edges[at + 1]:.3g}"
            bars.append(Bar(KINDS[row], (at - first) * step, floor, max(step - 1, 0.5), high, said))
    whole = [at for at in range(first, last + 1) if at % 2 == 0]
    every = max(1, -(-len(whole) // 7))
    ticks = tuple(((at - first) * step, f"{edges[at]:.3g}") for at in whole[::every])
    middle = int(np.searchsorted(np.cumsum(total), total.sum() / 2))
    said = f"{int(total.sum()):,} firings; half of them are below {edges[middle + 1]:.3g}, the fullest bin has {most:,}"
    return Histogram(tuple(bars), ticks, most, said)


_WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
_SPECIAL = re.compile(r"<[^<>\s]+>|\[(?:CLS|SEP|INST|/INST|PAD)\]")
_MOST = 3  # words in a guess
_SHARED = 0.5  # of the strongest examples must have a word for it to be told
_RARER = 0.25  # so much less often it must be in inputs at large
_PLACES = {
    "image": "on pictures",
    "text": "on words of the prompt and its template",
    "answer": "on words of answers and plain text",
}


def words_of(text: str) -> set[str]:
    """The words of a text, in lower case, each once."""
    return {word.lower() for word in _WORD.findall(text)}


def word_shares(captions: Iterable[str]) -> dict[str, float]:
    """The share of captions with each word."""
    counts: Counter[str] = Counter()
    total = 0
    for caption in captions:
        counts.update(words_of(caption))
        total += 1
    return {word: count / total for word, count in counts.items()}


def guess(examples: Sequence[tuple[str, Sequence[Place]]], usual: Mapping[str, float]) -> str:
    """What the strongest examples have in common.

    Args:
        examples: caption and places of each.
        usual: share of all inputs with a word (`word_shares`).

    Returns:
        Words such as `right before “mars”`, `at “planet”`, `on pictures of inputs that say “mars”`.
    """
    if not examples:
        return "never fires in this study"
    peaks = [_peak(places) for _, places in examples]
    if sum(place.kind == IMAGE for place, _ in peaks) * 2 > len(peaks):
        said = telling_words([caption for caption, _ in examples], usual)
        return f"on pictures where the text says {_quoted(said)}" if said else "on pictures of many kinds"
    after = _common(next_ for _, next_ in peaks if next_ is not None and next_.kind == ANSWER)
    at = _common(place for place, _ in peaks if place.kind != IMAGE)
    # The last token of the prompt is always the same, so what follows tells more.
    if after and all(place.kind != ANSWER for place, _ in peaks):
        return f"right before the answer {_quoted(after)}"
    if at:
        return f"at {_quoted(at)}"
    said = telling_words([caption for caption, _ in examples], usual)
    return f"at various words of inputs that say {_quoted(said)}" if said else "at various words"


def telling_words(captions: Sequence[str], usual: Mapping[str, float]) -> list[str]:
    """Words of most captions that few other inputs have, the most telling first."""
    gains = {word: share - usual.get(word, 0.0) for word, share in word_shares(captions).items() if share >= _SHARED}
    return sorted((word for word, gain in gains.items() if gain >= _RARER), key=lambda w: (-gains[w], w))[:_MOST]


def sentence(record: FeatureRecord, items: int) -> str:
    """Where a feature fires, how often, and what it promotes."""
    fired = record.positions_fired
    if not fired:
        return f"It never fires on the {items:,} inputs of this study."
    order = sorted((kind for kind in KINDS if record.fired[kind]), key=lambda kind: -record.fired[kind])
    share = record.fired[order[0]] / fired
    often = "only" if len(order) == 1 else "almost only" if share >= 0.95 else "mostly" if share >= 0.6 else "most"
    rest = "" if len(order) == 1 else f" ({percent(share)} of the time)"
    inputs = f"{record.items_fired:,} of {items:,} inputs"
    promotes = ""
    if record.top_logits:
        promotes = (
            f" Where it fires, it pushes the answer towards {_quoted([w for w, _ in record.top_logits[:_MOST]])}."
        )
    return f"It fires {often} {_PLACES[order[0]]}{rest}, in {inputs}.{promotes}"


def chance(count: int, total: int) -> str:
    """A share as `1 in 26`, or `9 of 10` when it is large."""
    if not count:
        return f"0 of {total:,}"
    if 2 * count > total:
        return "all" if count == total else f"{10 * count / total:.1f} of 10"
    return f"1 in {total / count:,.0f}"


def shown_token(token: str) -> str:
    """A token as a reader expects it: the spaces and line ends that tokenizers write as other signs are shown."""
    plain = token.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\n")
    visible = plain.replace("\n", "⏎").replace("\t", "⇥")
    return visible.strip() or "␣"


def special(token: str) -> bool:
    """A sign of the template, such as `<end_of_turn>`, rather than a word."""
    return _SPECIAL.fullmatch(token) is not None


def _peak(places: Sequence[Place]) -> tuple[Place, Place | None]:
    """The place of the peak, and the one after it."""
    at = next(n for n, place in enumerate(places) if place.peak)
    return places[at], places[at + 1] if at + 1 < len(places) else None


def _common(places: Iterable[Place]) -> list[str]:
    """The fewest tokens, at most `_MOST`, that are most of these."""
    counts = Counter(shown_token(place.text) for place in places)
    total, found, kept = sum(counts.values()), 0, []
    for token, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST]:
        kept.append(token)
        found += count
        if found >= 0.6 * total:
            return kept
    return []


def _quoted(tokens: Sequence[str]) -> str:
    return ", ".join(f"“{shown_token(token)}”" for token in tokens)


_SIDE = 160


@dataclass(frozen=True)
class FeatureRow:
    """A title, such as the feature with its label, a line below it, and examples."""

    title: str
    subtitle: str
    examples: tuple[FeatureExample, ...]


def feature_sheet(rows: Sequence[FeatureRow], path: str | Path, title: str = "", columns: int = 6) -> Path:
    """Write a PNG of one line a feature.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("no features to draw")
    with drawing(path, 1.55 * columns + 0.2, 2.35 * len(rows) + 0.5) as figure:
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
        for number, row in enumerate(rows):
            part = parts[number]
            part.suptitle(f"{fill(row.title, 110)}\n{fill(row.subtitle, 130)}", x=0.01, ha="left", fontsize=9)
            panels = part.subplots(1, columns, squeeze=False)[0]
            for axes in panels:
                axes.set_axis_off()
            for axes, example in zip(panels, row.examples[:columns], strict=False):
                _draw(axes, example)
    return Path(path)


def _draw(axes: Axes, example: FeatureExample) -> None:
    words = "".join(f"[{span.text}] " if span.peak else f"{span.text} " for span in token_spans(example, 2)).strip()
    if example.image_png is None:
        axes.text(0.5, 0.5, fill(words or example.caption, 22), ha="center", va="center", fontsize=7)
        axes.set_title(f"{example.activation:.2f}", fontsize=7, color=MUTED)
        return
    top = max((*example.patch_activations, *example.token_activations), default=0.0)
    picture = overlay(decode(example.image_png), example.patch_boxes, example.patch_activations, _SIDE, top)
    axes.imshow(np.asarray(picture))
    axes.set_title(f"{example.activation:.2f}", fontsize=7, color=MUTED, pad=2)
    said = fill(words or example.caption, 26)[:80]
    axes.text(0.5, -0.04, said, ha="center", va="top", fontsize=6, transform=axes.transAxes)


@dataclass(frozen=True)
class PageExample:
    """One input on which the feature fires.

    Attributes:
        activation: its peak.
        pictures: of the input.
        places: the text around the peak.
        caption: what is said, in one line.
        origin: where the input is from, such as a file and a line.
        times: how many examples of the group are this input; equal ones are shown once.
    """

    activation: float
    pictures: tuple[HeatPicture, ...]
    places: tuple[Place, ...]
    caption: str
    origin: str
    times: int = 1


@dataclass(frozen=True)
class ExampleGroup:
    """Examples of one strength: `name` is "top" or "q1" (weakest) and so on, `count` how many there are in all."""

    name: str
    title: str
    examples: tuple[PageExample, ...]
    count: int


@dataclass(frozen=True)
class PageLabel:
    """A label: `source` is who gave it, `score` its detection AUROC (None: not scored), `place` where in the input."""

    text: str
    source: str = ""
    score: float | None = None
    low: float | None = None
    high: float | None = None
    beats_chance: bool = False
    place: str = ""

    @property
    def holds(self) -> bool:
        """It was not scored, or its score beats chance."""
        return self.score is None or self.beats_chance


@dataclass(frozen=True)
class GraphUse:
    """A graph that keeps the feature.

    Attributes:
        name: of the graph.
        prompt: of it.
        links: words and address of what can be opened.
        positions: number, token and activation where the feature is.
        share: of the influence of all nodes on the answer, over these positions.
    """

    name: str
    prompt: str
    links: tuple[tuple[str, str], ...]
    positions: tuple[tuple[int, str, float], ...]
    share: float


@dataclass(frozen=True)
class StudyFacts:
    """What all pages of a study share: how many inputs, and positions by `KINDS`, were studied, of which model."""

    model: str
    transcoders: str
    items: int
    positions: dict[str, int]
    layers: tuple[int, ...]
    run: str = ""

    @property
    def all_positions(self) -> int:
        """Of all kinds."""
        return sum(self.positions.values())


@dataclass(frozen=True)
class FeaturePage:
    """All that is shown of one feature.

    Attributes:
        guess: what its strongest examples share, for want of a label.
        tags: what it belongs to, such as a circuit.
        missing: why pictures could not be had; empty when all are there.
    """

    record: FeatureRecord
    facts: StudyFacts
    guess: str
    groups: tuple[ExampleGroup, ...] = ()
    label: PageLabel | None = None
    graphs: tuple[GraphUse, ...] = ()
    tags: tuple[str, ...] = ()
    missing: str = ""

    @property
    def feature(self) -> FeatureId:
        """Which."""
        return self.record.feature

    @property
    def title(self) -> str:
        """The label, or, where there is none that holds, the guess."""
        return self.label.text if self.label and self.label.holds else self.guess

    @property
    def file(self) -> str:
        """The page's file name."""
        return page_name(self.feature)

    @property
    def json_file(self) -> str:
        """Where its JSON is, beside the page."""
        return json_name(self.feature)

    @property
    def shares(self) -> dict[str, float]:
        """Of its firings, by `KINDS`."""
        fired = self.record.positions_fired
        return {kind: self.record.fired[kind] / fired if fired else 0.0 for kind in KINDS}

    @property
    def main_kind(self) -> str:
        """The kind of position at which it fires most; "mixed" without a majority of 60 %, "none" if it never does."""
        if not self.record.positions_fired:
            return "none"
        best = max(KINDS, key=lambda kind: self.shares[kind])
        return best if self.shares[best] >= 0.6 else "mixed"

    @property
    def item_share(self) -> float:
        """Of the studied inputs, on which it fires."""
        return self.record.items_fired / self.facts.items if self.facts.items else 0.0

    @property
    def histogram(self) -> Histogram:
        """Of activations."""
        return histogram(self.record.histogram)

    def sentence(self) -> str:
        """Where it fires, how often, and what it promotes, in words."""
        said = sentence(self.record, self.facts.items)
        # Without a label this is the title.
        return f"Strongest {self.guess}. {said}" if self.label and self.label.holds and self.groups else said

    def render(self, before: FeatureId | None = None, after: FeatureId | None = None) -> str:
        """The page as one HTML string; `before` and `after` are its neighbours in the gallery."""
        heat = Geometries()
        links = [None if one is None else (str(one), page_name(one)) for one in (before, after)]
        values: dict[str, Any] = {"page": self, "before": links[0], "after": links[1], "heat": heat}
        return render_scripted("feature_page.html.j2", geometries=heat, **values)

    def write(self, folder: Path, before: FeatureId | None = None, after: FeatureId | None = None) -> Path:
        """Write it into the gallery's folder; returns the path.

        Raises:
            UserError: the folder cannot be written.
        """
        path = folder / self.file
        write_text(path, self.render(before, after))
        return path


def page_name(feature: FeatureId) -> str:
    """The file name of a feature's page."""
    return f"L{feature.layer}_{feature.index}.html"


def json_name(feature: FeatureId) -> str:
    """The file name of a feature's JSON, by which the field's viewers ask for it."""
    return f"features/{feature.cantor}.json"
