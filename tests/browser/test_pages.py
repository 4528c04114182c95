"""Reports as a reader sees them: opened from a file, on a screen and on a telephone."""

from collections.abc import Callable

import pytest
from tests.browser.conftest import Watched
from tests.unit.report.conftest import make_page

from vlmscope.app import main

pytestmark = pytest.mark.browser
SCREEN, TELEPHONE = 1280, 390
LONG = "/home/somebody/" + "pictures_of_planets" * 12 + ".png"
REPORTS = ("experiment", "sections", "long words")
Opener = Callable[[int], Watched]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses: an experiment cut short, every kind of section, and those with words too long to fit."""
    folder = tmp_path_factory.mktemp("pages")
    assert main(["experiment=mars_earth_patch", "debug=fast", f"hydra.run.dir={folder / 'run'}", "tracking=none"]) == 0
    files = [
        folder / "run" / "report.html",
        make_page().write(folder / "sections.html"),
        make_page(LONG, 1600).write(folder / "long.html"),
    ]
    return {name: path.as_uri() for name, path in zip(REPORTS, files, strict=True)}


@pytest.mark.parametrize("width", [SCREEN, TELEPHONE])
@pytest.mark.parametrize("name", REPORTS)
def test_a_page_opens_quietly_and_fits(name: str, width: int, pages: dict[str, str], open_page: Opener) -> None:
    watched = open_page(width)
    page = watched.page
    page.on("dialog", lambda dialog: watched.errors.append("a dialog: " + dialog.message))
    page.goto(pages[name])
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert watched.errors == []
    assert [url[:80] for url in watched.requests if url != pages[name] and not url.startswith("data:")] == []
    images = page.evaluate(
        """async () => { await Promise.all([...document.images].map(image => image.decode()));
            return [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.alt]); }"""
    )
    assert len(images) > 10 and all(natural > 0 and shown > 0 and alt.strip() for natural, shown, alt in images)
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(element => +element.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
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
