"""One headless Chromium for all browser tests, and pages that remember what went wrong in them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import screenshots
from playwright.sync_api import Browser, Page, expect

SLOW = 60_000  # ms: what a page may take on a busy machine, where WebGL is drawn in software


@dataclass
class Watched:
    """A page, with its errors (console and uncaught) and the addresses of all requests that it made."""

    page: Page
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    expect.set_options(timeout=SLOW)
    with screenshots.browser() as started:
        yield started


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[[int], Watched]]:
    """A function that opens an empty watched page of a given width in pixels."""
    contexts = []

    def opened(width: int) -> Watched:
        contexts.append(chromium.new_context(viewport={"width": width, "height": screenshots.HEIGHT}))
        watched = Watched(contexts[-1].new_page())
        watched.page.on("console", lambda m: watched.errors.append(m.text) if m.type in ("error", "warning") else None)
        watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))
        watched.page.on("request", lambda request: watched.requests.append(request.url))
        return watched

    yield opened
    for context in contexts:
        context.close()
