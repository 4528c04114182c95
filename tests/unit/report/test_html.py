"""The page: self-contained, accessible, escaped, and showing the numbers that it was given."""

from html.parser import HTMLParser

import pytest
from tests.unit.report.conftest import HOSTILE

from vlmscope.report.page import ReportPage

VOID = {"meta", "img", "input", "br", "link", "line", "path", "circle"}


class Parsed(HTMLParser):
    """Collects what the tests ask for, and checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: dict[str, str] = {}  # data-value -> text of its element
        self.open: list[str] = []
        self.text = ""
        self._value: str | None = None
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if "data-value" in dict(attrs):
            self._value = str(dict(attrs)["data-value"])
            self.values[self._value] = ""

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag
        if tag in ("td", "dd"):
            self._value = None

    def handle_data(self, data) -> None:
        self.text += data
        if self._value is not None:
            self.values[self._value] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def parsed(page: ReportPage) -> Parsed:
    return Parsed(page.render())


def test_nothing_comes_from_outside(page: ReportPage, parsed: Parsed) -> None:
    for tag, attrs in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attrs.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    html = page.render()
    for word in ("url(", "@import", "http:", "https:"):
        assert word not in html


def test_accessible_structure(parsed: Parsed) -> None:
    assert parsed.all("html")[0]["lang"] == "en"
    images = parsed.all("img")
    assert len(images) > 10
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    names = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(names) == len(set(names))
    for _, attrs in parsed.tags:
        for pointer in (attrs.get("aria-labelledby"), (attrs.get("href") or "").removeprefix("#")):
            assert not pointer or pointer in names
    levels = [int(tag[1]) for tag, _ in parsed.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert len(parsed.all("main")) == 1
    scrolling = [attrs for _, attrs in parsed.tags if attrs.get("class") == "scroll"]
    assert all(attrs.get("tabindex") == "0" for attrs in scrolling), "what scrolls can be reached by keyboard"


def test_everything_is_escaped(page: ReportPage, parsed: Parsed) -> None:
    html = page.render()
    assert "<start_of_image>" not in html and "<script" not in html
    assert parsed.text.count(HOSTILE) == 3
    assert "<start_of_image>" in parsed.text
