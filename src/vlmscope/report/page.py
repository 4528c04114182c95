"""Report pages: sections as plain records, each drawn by the template of the same name, and the HTML page.

A page is self-contained (styles inside, pictures as data URIs, no script, no network) and works from `file://`, in
light and dark, on paper and with a keyboard. The template engine escapes everything, and a content security policy in
the page forbids any fetch, should something slip through. Exact values travel along in `data-value` attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmscope.core.artifacts import write_text
from vlmscope.core.results import AnswerExample, Number, Rate, Reproduced, Supernode
from vlmscope.report import pictures as thumbnails

TEMPLATES = Path(__file__).parent / "templates"
_UNIT = "\u00a0%"  # the space must not break


class Percent(NamedTuple):
    """A share 0..1 to show in per cent."""

    share: float


# A string is shown as it is, a number to three significant digits, a rate with its interval, None as a dash.
Value = str | int | float | Percent | Rate | None


@dataclass(frozen=True)
class Card:
    """One headline number; `detail` is the line under it."""

    label: str
    value: Value
    detail: str = ""


@dataclass(frozen=True)
class Cards:
    """Headline numbers side by side."""

    template: ClassVar[str] = "cards"
    title: str
    cards: tuple[Card, ...]
    intro: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns; rows whose number is in `strong` stand out."""

    template: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    intro: str = ""
    note: str = ""
    strong: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: {len(row)} values under {len(self.columns)} columns: {row}")

    @property
    def dense(self) -> bool:
        """Whether a row has several rates: their lines go above their numbers, since they would run past the page."""
        return any(sum(isinstance(value, Rate) for value in row) > 1 for row in self.rows)


@dataclass(frozen=True)
class Picture:
    """A PNG with words for those who cannot see it. `wide`: scrolls sideways on a small screen rather than shrink."""

    png: bytes
    alt: str
    caption: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """One or more pictures."""

    template: ClassVar[str] = "figure"
    title: str
    pictures: tuple[Picture, ...]
    intro: str = ""


@dataclass(frozen=True)
class Examples:
    """Answers before and after, each with its picture and probabilities."""

    template: ClassVar[str] = "examples"
    title: str
    examples: tuple[AnswerExample, ...]
    intro: str = ""


@dataclass(frozen=True)
class Features:
    """A supernode's features: all in a table, the first `shown` also with their examples and logits."""

    template: ClassVar[str] = "features"
    title: str
    supernode: Supernode
    intro: str = ""
    shown: int = 8
    examples_each: int = 6


@dataclass(frozen=True)
class Text:
    """Paragraphs, then (if any) a block of code such as a command line."""

    template: ClassVar[str] = "text"
    title: str
    paragraphs: tuple[str, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class Details:
    """A long plain text, such as a configuration, folded behind `summary`."""

    template: ClassVar[str] = "details"
    title: str
    summary: str
    body: str


@dataclass(frozen=True)
class Experiments:
    """Experiments that were run again: the question, what the paper reports, and the results next to their ranges."""

    template: ClassVar[str] = "experiments"
    title: str
    results: tuple[Reproduced, ...]
    intro: str = ""


Section = Cards | Table | Figure | Examples | Features | Text | Details | Experiments


def drawn(path: Path, alt: str, wide: bool = False) -> Picture:
    """A drawn figure as part of a page; its words are its caption too."""
    return Picture(path.read_bytes(), alt, alt, wide)


def mapping_table(title: str, values: Mapping[str, Value], columns: tuple[str, str] = ("name", "value")) -> Table:
    """A two-column table, for example of package versions or flat metrics."""
    return Table(title, columns, tuple(values.items()))


def percent(share: float) -> str:
    """A share in per cent with one decimal; what would round to 0 or 100 without being it says so."""
    shown = f"{100 * share:.1f}{_UNIT}"
    if share > 0 and shown == f"0.0{_UNIT}":
        return f"<\u00a00.1{_UNIT}"
    if share < 1 and shown == f"100.0{_UNIT}":
        return f">\u00a099.9{_UNIT}"
    return shown


def number(value: int | float) -> str:
    """A count with thousands separators, or a real number to three significant digits."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2e}"


def interval(rate: Rate) -> str:
    """The 95 % interval of a rate, as `95.0 to 99.0 %`."""
    return f"{100 * rate.ci_low:.1f} to {100 * rate.ci_high:.1f}{_UNIT}"


def measured(headline: Number) -> Value:
    """A headline number to show: a share in per cent, with its interval where it has one."""
    if headline.value is None or not headline.share:
        return headline.value
    return Percent(headline.value) if headline.rate is None else headline.rate


def range_of(headline: Number) -> str:
    """The range that a headline number must lie in, such as `90 to 100 %`."""
    if headline.share:
        return f"{100 * headline.low:.3g} to {100 * headline.high:.3g}{_UNIT}"
    return f"{number(headline.low)} to {number(headline.high)}"


def duration(seconds: float | None) -> str:
    """A duration in seconds as `45 s` or `2 min 05 s`; a dash for an unknown one."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    return f"{whole}\u00a0s" if whole < 60 else f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"


def show(value: Value) -> str:
    """A value as text; a rate without its interval, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, Percent | Rate):
        return percent(_plain(value))
    return value if isinstance(value, str) else number(value)


def exact(value: int | float | Percent | Rate) -> str:
    """The unrounded number behind a value."""
    return repr(_plain(value))


def _plain(value: int | float | Percent | Rate) -> int | float:
    if isinstance(value, Percent):
        return float(value.share)
    return float(value.value) if isinstance(value, Rate) else value


@dataclass(frozen=True)
class ReportPage:
    """A page: `question` and `summary`, of the answer, are a paragraph each.

    `footer` is a closing line, for example name and time of the run. `graph` is the page of its graph, next to it.
    """

    title: str
    question: str
    summary: str
    sections: tuple[Section, ...] = ()
    footer: str = ""
    graph: str = ""

    def render(self) -> str:
        """The page as one HTML string."""
        sections = list(zip(_anchors([section.title for section in self.sections]), self.sections, strict=True))
        return environment().get_template("page.html.j2").render(page=self, sections=sections)

    def write(self, path: str | Path) -> Path:
        """Render and write atomically; returns the path."""
        write_text(path, self.render())
        return Path(path)


@cache
def environment() -> Environment:
    """The template engine with the filters of reports."""
    engine = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (show, exact, percent, number, interval, measured, range_of, duration):
        engine.filters[function.__name__] = function
    engine.filters |= {
        "data_uri": thumbnails.data_uri,
        "size": thumbnails.size,
        "picture": thumbnails.example_png,
        "alt": thumbnails.example_alt,
        "spans": thumbnails.token_spans,
    }
    engine.tests["rate"] = lambda value: isinstance(value, Rate)
    engine.tests["numeric"] = lambda value: value is not None and not isinstance(value, str)
    return engine


def _anchors(titles: Sequence[str]) -> list[str]:
    """A unique, readable fragment name for every title."""
    seen: dict[str, int] = {}
    anchors = []
    for title in titles:
        name = "s-" + (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section")
        seen[name] = seen.get(name, 0) + 1
        # A double dash cannot come from a title, so a numbered name never meets another title's.
        anchors.append(name if seen[name] == 1 else f"{name}--{seen[name]}")
    return anchors
