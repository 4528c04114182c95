"""Reports and pages of features as a reader sees them: opened from a file, on a screen and on a telephone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.browser.conftest import Watched
from tests.unit.report.conftest import make_page
from tests.unit.report.feature_cases import write_pages

from vlmscope.app import main

pytestmark = pytest.mark.browser
SCREEN, TELEPHONE = 1280, 390
LONG = "/home/somebody/" + "pictures_of_planets" * 12 + ".png"
REPORTS, FEATURES = ("experiment", "sections", "long words"), ("index", "L3_5", "L3_6", "L3_7")
Opener = Callable[[int], Watched]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses: an experiment cut short, every kind of section, those with words too long to fit, and features."""
    folder = tmp_path_factory.mktemp("pages")
    assert main(["experiment=mars_earth_patch", "debug=fast", f"hydra.run.dir={folder / 'run'}", "tracking=none"]) == 0
    files = [
        folder / "run" / "report.html",
        make_page().write(folder / "sections.html"),
        make_page(LONG, 1600).write(folder / "long.html"),
    ]
    index = write_pages(folder / "features")
    found: dict[str, Path] = dict(zip(REPORTS, files, strict=True)) | {n: index.parent / f"{n}.html" for n in FEATURES}
    return {name: path.as_uri() for name, path in found.items()}


@pytest.mark.parametrize("width", [SCREEN, TELEPHONE])
@pytest.mark.parametrize("name", [*REPORTS, *FEATURES])
def test_a_page_opens_quietly_and_fits(name: str, width: int, pages: dict[str, str], open_page: Opener) -> None:
    watched = open_page(width)
    page = watched.page
    page.on("dialog", lambda dialog: watched.errors.append("a dialog: " + dialog.message))
    page.goto(pages[name])
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    if name in FEATURES:
        page.wait_for_selector(".heated canvas", state="attached")
    assert watched.errors == []
    assert [url[:80] for url in watched.requests if url != pages[name] and not url.startswith("data:")] == []
    images = page.evaluate(
        """async () => { await Promise.all([...document.images].map(image => image.decode()));
            return [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.alt]); }"""
    )
    if name in REPORTS:
        assert len(images) > 10 and all(natural > 0 and shown > 0 and alt.strip() for natural, shown, alt in images)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(element => +element.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert name in FEATURES or all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    beyond = page.evaluate(  # the right edge, in nothing that scrolls or cuts off
        """() => [...document.body.querySelectorAll('*')].filter(element => {
            if (element.getBoundingClientRect().right <= document.documentElement.clientWidth + 1) return false;
            for (let at = element.parentElement; at; at = at.parentElement)
                if (at !== document.body && getComputedStyle(at).overflowX !== 'visible') return false;
            return true;
        }).map(element => element.outerHTML.slice(0, 120))"""
    )
    assert beyond == []


def test_no_table_of_an_experiment_scrolls_and_contents_lead_to_their_sections(
    pages: dict[str, str], open_page: Opener
) -> None:
    page = open_page(SCREEN).page
    page.emulate_media(reduced_motion="reduce")
    page.goto(pages["experiment"])
    scrolls = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1).length"
    assert page.evaluate(scrolls) == 0
    links = page.locator("nav.contents a")
    assert links.count() > 4
    links.last.click()
    box = page.get_by_role("heading", name=links.last.inner_text(), exact=True).bounding_box()
    assert box is not None and 0 <= box["y"] < page.viewport_size["height"]  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("width", [SCREEN, TELEPHONE])
def test_bars_of_probabilities_have_one_scale(width: int, pages: dict[str, str], open_page: Opener) -> None:
    """In pixels for a probability of 1: the same in every table, before and after, or 83 % would look like 99 %."""
    page = open_page(width).page
    page.goto(pages["experiment"])
    bars = page.evaluate(
        """() => [...document.querySelectorAll('.probs tr')].map(row => [
            +row.querySelector('.number').dataset.value,
            row.querySelector('.track span').getBoundingClientRect().width])"""
    )
    scales = [pixels / probability for probability, pixels in bars if probability > 0.2]
    assert len(scales) > 6 and max(scales) - min(scales) < 1
    assert min(scales) > 60


def test_the_heatmap_lies_on_the_patch_that_fires_and_can_be_switched_off(
    pages: dict[str, str], open_page: Opener
) -> None:
    page = open_page(SCREEN).page
    page.goto(pages["L3_5"])
    page.wait_for_selector(".heated canvas", state="attached")
    alpha = page.evaluate(  # at the middle of each patch of the first canvas, row by row
        """() => { const c = document.querySelector('.heated canvas'), pen = c.getContext('2d');
            return [...Array(16).keys()].map(k => pen.getImageData(
                (k % 4 + .5) * c.width / 4, (Math.floor(k / 4) + .5) * c.height / 4, 1, 1).data[3]); }"""
    )
    assert alpha[2] > 100 and sum(alpha) == alpha[2]
    button, canvas = page.get_by_role("button", name="Heatmap"), page.locator(".heated canvas").first
    shaded, tint = page.locator(".tokens .hot").first, "element => getComputedStyle(element).backgroundColor"
    assert canvas.is_visible() and button.get_attribute("aria-pressed") == "true"
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


def test_the_gallery_is_searched_filtered_and_sorted(pages: dict[str, str], open_page: Opener) -> None:
    page = open_page(SCREEN).page
    page.goto(pages["index"])
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


def test_pages_are_readable_in_the_dark_and_keep_figures_on_white(pages: dict[str, str], open_page: Opener) -> None:
    page = open_page(SCREEN).page
    page.emulate_media(color_scheme="dark")

    def colour(place: str, style: str) -> list[int]:
        numbers = f"getComputedStyle(element).{style}.match(/\\d+/g).slice(0, 3).map(Number)"
        return page.locator(place).first.evaluate(f"element => {numbers}")

    page.goto(pages["experiment"])
    assert max(colour("body", "backgroundColor")) < 60
    assert min(min(colour(place, "color")) for place in ("h1", ".summary", ".card dt", "td")) > 140
    assert colour(".paper", "backgroundColor") == [255, 255, 255]
    page.goto(pages["L3_5"])
    places = ("h1", ".summary", ".tokens .hot", ".shares td.number")
    assert min(min(colour(place, "color")) for place in places) > 140
    assert min(colour(".histogram text", "fill")) > 140
