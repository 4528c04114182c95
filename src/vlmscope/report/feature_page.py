"""What a page about one feature is made of, and the page: self-contained, works from `file://`.

Its only script is allowed by its hash in the page's content security policy, so nothing that a token, a label or a
caption holds can run, even if it slipped past the template engine's escaping.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import write_text
from vlmscope.core.ids import FeatureId
from vlmscope.core.study import KINDS, FeatureRecord, Place
from vlmscope.report import feature_words as words
from vlmscope.report.heat import Geometries, HeatPicture
from vlmscope.report.histogram import Histogram, histogram
from vlmscope.report.scripted import render_scripted


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
        said = words.sentence(self.record, self.facts.items)
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
