"""Pages of features as a reader sees them: opened from a file, searched, with the heatmap on and off."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.browser.conftest import Watched
from tests.browser.test_report import overflowing
from tests.unit.report.feature_cases import write_pages

pytestmark = pytest.mark.browser
SCREEN, TELEPHONE = 1280, 390


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(tmp_path_factory.mktemp("pages"))


def pixels(page: Page) -> list[int]:
    """Alpha at the middle of each patch of the first canvas, row by row."""
    page.wait_for_selector(".heated canvas", state="attached")
    return page.evaluate(
        """() => { const c = document.querySelector('.heated canvas'), pen = c.getContext('2d');
            return [...Array(16).keys()].map(k => pen.getImageData(
                (k % 4 + .5) * c.width / 4, (Math.floor(k / 4) + .5) * c.height / 4, 1, 1).data[3]); }"""
    )


@pytest.mark.parametrize("width", [SCREEN, TELEPHONE])
@pytest.mark.parametrize("name", ["index.html", "L3_5.html", "L3_6.html", "L3_7.html"])
def test_a_page_opens_quietly_and_fits(name: str, width: int, index: Path, open_page: Callable[[int], Watched]) -> None:
    watched = open_page(width)
    page, address = watched.page, (index.parent / name).as_uri()
    page.on("dialog", lambda dialog: watched.errors.append("a dialog: " + dialog.message))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    page.wait_for_selector(".heated canvas", state="attached")
    assert watched.errors == []
    assert [url[:80] for url in watched.requests if url != address and not url.startswith("data:")] == []
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(element => +element.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert overflowing(page) == []


def test_the_heatmap_lies_on_the_patch_that_fires_and_can_be_switched_off(
    index: Path, open_page: Callable[[int], Watched]
) -> None:
    page = open_page(SCREEN).page
    page.goto((index.parent / "L3_5.html").as_uri())
    alpha = pixels(page)
    assert alpha[2] > 100 and sum(alpha) == alpha[2]
    button, canvas = page.get_by_role("button", name="Heatmap"), page.locator(".heated canvas").first
    shaded = page.locator(".tokens .hot").first
    assert canvas.is_visible() and button.get_attribute("aria-pressed") == "true"
    tint = "element => getComputedStyle(element).backgroundColor"
    assert shaded.evaluate(tint) != "rgba(0, 0, 0, 0)"
    button.click()
    expect(canvas).to_be_hidden()
    assert button.get_attribute("aria-pressed") == "false"
    assert shaded.evaluate(tint) == "rgba(0, 0, 0, 0)"
    assert page.locator(".heated img").first.is_visible()
    page.keyboard.press("h")
    expect(canvas).to_be_visible()


def expect_shown(page: Page, *names: str) -> None:
    """Waits: clearing a form filters in a task of its own, after the browser has emptied the fields."""
    expect(page.locator(".tile:visible .name b")).to_have_text(list(names))


def test_the_gallery_is_searched_filtered_and_sorted(index: Path, open_page: Callable[[int], Watched]) -> None:
    page = open_page(SCREEN).page
    page.goto(index.as_uri())
    expect_shown(page, "L3/5", "L3/6", "L3/7")
    page.keyboard.press("/")
    page.keyboard.type("EARTH h")
    expect_shown(page, "L3/7")
    expect(page.locator("#count")).to_have_text("1 of 3 features")
    assert "no-heat" not in page.locator("body").evaluate("body => body.className"), "a typed letter is no command"
    page.get_by_role("searchbox").fill("nothing like it")
    expect_shown(page)
    expect(page.locator("#none")).to_be_visible()
    page.get_by_role("button", name="Clear").click()
    expect_shown(page, "L3/5", "L3/6", "L3/7")
    page.locator("select[name=label]").select_option("unlabelled")
    expect_shown(page, "L3/7")
    page.locator("select[name=label]").select_option("")
    page.locator("select[name=sort]").select_option("score down")
    expect(page.locator(".tile:visible .name b").first).to_have_text("L3/5")
    page.locator(".tile:visible a").first.click()
    page.get_by_role("heading", name="planet = mars", level=1).wait_for()
    page.get_by_role("link", name="All features").click()
    page.locator("#count").wait_for()
    expect(page.locator(".tile:visible")).to_have_count(3)


def test_readable_in_the_dark(index: Path, open_page: Callable[[int], Watched]) -> None:
    page = open_page(SCREEN).page
    page.emulate_media(color_scheme="dark")
    page.goto((index.parent / "L3_5.html").as_uri())
    ink = "element => getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number)"
    for place in ("h1", ".summary", ".tokens .hot", ".shares td.number", ".histogram text"):
        colour = "fill" if place.startswith(".histogram") else "color"
        assert min(page.locator(place).first.evaluate(ink.replace(".color", "." + colour))) > 140, place
