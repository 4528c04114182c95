"""Report pages: their sections as records, and the self-contained HTML page.

The parts that a report page is made of: plain records, each drawn by the template of the same name.

A cell or card value is a string (shown as it is), a number (three significant digits), a share wrapped in `Percent`,
or a
`Rate`, which brings its interval. Exact values travel along in `data-value` attributes, so a page can be read by
machines.

One self-contained HTML page from typed sections: styles inside, pictures as data URIs, no script, no network.

The page works from `file://`, in light and dark, on paper and with a keyboard. Everything is escaped by the template
engine, and a content security policy in the page forbids any fetch, should something slip through.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmscope.core.artifacts import write_text
from vlmscope.core.graph import PrunedGraph
from vlmscope.core.intervention import AnswerExample, FeatureExample, FlipRow, Rate, Supernode
from vlmscope.core.runs import Number, Reproduced
from vlmscope.report import thumbnails
from vlmscope.report.style import label


class Percent(NamedTuple):
    """A share 0..1 to show in per cent."""

    share: float


_UNIT = "\u00a0%"  # the space must not break
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


def drawn(path: Path, alt: str, wide: bool = False) -> Picture:
    """A figure that lies in a file."""
    return Picture(path.read_bytes(), alt, alt, wide)


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
    """Paragraphs, then (if any) a bullet list and a block of code such as a command line."""

    template: ClassVar[str] = "text"
    title: str
    paragraphs: tuple[str, ...] = ()
    bullets: tuple[str, ...] = ()
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
    """Experiments that were run again: what each asks, what the paper reports, what came out, against its ranges."""

    template: ClassVar[str] = "experiments"
    title: str
    found: tuple[Reproduced, ...]
    intro: str = ""


Section = Cards | Table | Figure | Examples | Features | Text | Details | Experiments


def flip_table(title: str, rows: Iterable[FlipRow], intro: str = "", note: str = "") -> Table:
    """Flip rates with intervals beside their controls, in the order given; the rows for everything at once stand
    out. Changed answers and q-values have columns where any row has them.
    """
    rows = list(rows)
    columns = ["method", "mode", "question", "where", "features", "flip rate, 95 % interval", "matched control"]
    counted, tested = any(row.changed for row in rows), any(row.q is not None for row in rows)
    columns += ["answer changed, 95 % interval", "changed, control"] if counted else []
    columns += ["q"] if tested else []
    values = []
    for row in rows:
        cells: list[Value] = [label(row.method), label(row.mode), label(row.question), label(row.scope)]
        cells += [row.n_features, row.rate, _control(row.rate)]
        cells += [row.changed, _control(row.changed)] if counted else []
        cells += [row.q] if tested else []
        values.append((*cells, row.rate.cases))
    strong = frozenset(at for at, row in enumerate(rows) if row.question == "worst" and row.scope == "all")
    return Table(title, (*columns, "cases"), tuple(values), intro, note, strong)


def _control(rate: Rate | None) -> Percent | None:
    return None if rate is None or rate.control is None else Percent(rate.control)


def graph_cards(title: str, pruned: PrunedGraph, intro: str = "") -> Cards:
    """Size and scores of an attribution graph."""
    graph, scores = pruned.graph, pruned.scores
    cards = (
        Card("replacement score", scores.replacement, "share of influence that runs through features, not errors"),
        Card("completeness score", scores.completeness, "share of incoming influence that is explained"),
        Card("nodes kept", pruned.n_nodes, f"of {graph.n_nodes:,} at threshold {pruned.node_threshold:g}"),
        Card("edges kept", pruned.n_edges, f"of {graph.n_edges:,} at threshold {pruned.edge_threshold:g}"),
        Card("influence of tokens", Percent(scores.token_share), "of what reaches the logits, pictures included"),
        Card("influence of errors", Percent(scores.error_share), f"biases: {percent(scores.bias_share)}"),
    )
    return Cards(title, cards, intro)


def mapping_table(title: str, values: Mapping[str, Value], columns: Sequence[str] = ("name", "value")) -> Table:
    """A two-column table, for example of package versions or flat metrics."""
    return Table(title, (columns[0], columns[1]), tuple(values.items()))


def percent(share: float) -> str:
    """A share in per cent with one decimal; what would round to 0 or 100 without being it says so."""
    shown = f"{100 * share:.1f}{_UNIT}"
    if share > 0 and shown == f"0.0{_UNIT}":
        return f"<\u00a00.1{_UNIT}"
    if share < 1 and shown == f"100.0{_UNIT}":
        return f">\u00a099.9{_UNIT}"
    return shown


def measured(found: Number) -> Value:
    """A headline number as the pages show it: a share in per cent, with its interval where it has one."""
    if found.value is None:
        return None
    if found.rate is not None and found.share:
        return found.rate
    return Percent(found.value) if found.share else found.value


def range_of(found: Number) -> str:
    """The range that a headline number must lie in, such as `90 to 100 %`."""
    if found.share:
        return f"{100 * found.low:.3g} to {100 * found.high:.3g}{_UNIT}"
    return f"{number(found.low)} to {number(found.high)}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: `45 s`, `2 min 05 s`; a dash for an unknown time."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    return f"{whole}\u00a0s" if whole < 60 else f"{whole // 60}\u00a0min {whole % 60:02d}\u00a0s"


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


def show(value: Value) -> str:
    """The words for a value; a rate without its interval, nothing known as a dash."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, Percent):
        return percent(value.share)
    if isinstance(value, Rate):
        return percent(value.value)
    return number(value)


def exact(value: Value) -> str | None:
    """The number behind what is shown, unrounded; None for words and unknowns."""
    if value is None or isinstance(value, str):
        return None
    if isinstance(value, Percent):
        return repr(float(value.share))
    return repr(float(value.value)) if isinstance(value, Rate) else repr(value)


TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportPage:
    """A page: `question` is what was asked, `summary` what came out, in a paragraph each.

    `footer` is a closing line, for example name and time of the run.
    """

    title: str
    question: str
    summary: str
    sections: tuple[Section, ...] = field(default=())
    footer: str = ""

    def render(self) -> str:
        """The page as one HTML string."""
        anchors = _anchors([section.title for section in self.sections])
        pairs = list(zip(anchors, self.sections, strict=True))
        return environment().get_template("page.html.j2").render(page=self, sections=pairs)

    def write(self, path: str | Path) -> Path:
        """Render and write atomically; returns the path.

        Raises:
            UserError: the folder cannot be written.
        """
        write_text(path, self.render())
        return Path(path)


@cache
def environment() -> Environment:
    """The template engine with the filters of all pages."""
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "show": show,
        "exact": exact,
        "percent": percent,
        "number": number,
        "interval": interval,
        "measured": measured,
        "range_of": range_of,
        "duration": duration,
        "data_uri": thumbnails.data_uri,
        "png_size": thumbnails.png_size,
        "alt": thumbnails.example_alt,
        "spans": thumbnails.token_spans,
        "picture": _example_picture,
    }
    made.filters.update(filters)
    made.tests["rate"] = lambda value: isinstance(value, Rate)
    made.tests["numeric"] = lambda value: value is not None and not isinstance(value, str)
    return made


def _example_picture(example: FeatureExample) -> bytes:
    png = thumbnails.example_png(example)
    assert png is not None, "the template asks for a picture only where there is one"
    return png


def _anchors(titles: list[str]) -> list[str]:
    """A unique, readable fragment name for every title."""
    seen: dict[str, int] = {}
    anchors = []
    for title in titles:
        name = "s-" + (re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section")
        seen[name] = seen.get(name, 0) + 1
        # A double dash cannot come from a title, so a numbered name never meets another title's.
        anchors.append(name if seen[name] == 1 else f"{name}--{seen[name]}")
    return anchors
