"""One self-contained HTML page from typed sections: styles inside, pictures as data URIs, no script, no network.

The page works from `file://`, in light and dark, on paper and with a keyboard. Everything is escaped by the template
engine, and a content security policy in the page forbids any fetch, should something slip through.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vlmscope.core.artifacts import write_text
from vlmscope.core.intervention import FeatureExample, Rate
from vlmscope.report import sections as parts
from vlmscope.report import thumbnails
from vlmscope.report.sections import Section

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
        "show": parts.show,
        "exact": parts.exact,
        "percent": parts.percent,
        "number": parts.number,
        "interval": parts.interval,
        "measured": parts.measured,
        "range_of": parts.range_of,
        "duration": parts.duration,
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
