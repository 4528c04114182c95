"""Reports as a reader sees them: opened from a file, on a screen and on a telephone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page
from tests.browser.conftest import Watched
from tests.unit.report.conftest import make_page

from vlmscope.app import main

pytestmark = pytest.mark.browser
SCREEN, TELEPHONE = 1280, 390
LONG = "/home/somebody/" + "pictures_of_planets" * 12 + ".png"


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A real one of an experiment cut short, one of every kind of section, and that one with words too long to fit."""
    folder = tmp_path_factory.mktemp("reports")
    run = [f"hydra.run.dir={folder / 'run'}", "tracking=none"]
    assert main(["experiment=mars_earth_patch", "debug=fast", *run]) == 0
    return {
        "experiment": folder / "run" / "report.html",
        "sections": make_page().write(folder / "sections.html"),
        "long words": make_page(LONG, 1600).write(folder / "long.html"),
    }


def overflowing(page: Page) -> list[str]:
    """Elements that reach beyond the window's right edge and stand in nothing that scrolls or cuts off."""
    return page.evaluate(
        """() => [...document.body.querySelectorAll('*')].filter(element => {
            if (element.getBoundingClientRect().right <= document.documentElement.clientWidth + 1) return false;
            for (let at = element.parentElement; at; at = at.parentElement)
                if (at !== document.body && getComputedStyle(at).overflowX !== 'visible') return false;
            return true;
        }).map(element => element.outerHTML.slice(0, 120))"""
    )


@pytest.mark.parametrize("width", [SCREEN, TELEPHONE])
@pytest.mark.parametrize("name", ["experiment", "sections", "long words"])
def test_a_report_opens_and_fits(
    name: str, width: int, reports: dict[str, Path], open_page: Callable[[int], Watched]
) -> None:
    watched = open_page(width)
    page, address = watched.page, reports[name].as_uri()
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    assert watched.errors == []
    assert [url[:80] for url in watched.requests if url != address and not url.startswith("data:")] == []

    images = page.evaluate(
        """async () => { await Promise.all([...document.images].map(image => image.decode()));
            return [...document.images].map(image => [image.naturalWidth, image.clientWidth, image.alt]); }"""
    )
    assert len(images) > 10
    assert all(natural > 0 and shown > 0 and alt.strip() for natural, shown, alt in images)

    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map(element => +element.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1 and 2 in levels
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert overflowing(page) == []


def test_no_table_of_an_experiment_scrolls_on_a_screen(
    reports: dict[str, Path], open_page: Callable[[int], Watched]
) -> None:
    page = open_page(SCREEN).page
    page.goto(reports["experiment"].as_uri())
    assert (
        page.evaluate(
            """() => [...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1)
            .map(box => box.getAttribute('aria-labelledby'))"""
        )
        == []
    )


@pytest.mark.parametrize("width", [SCREEN, TELEPHONE])
def test_bars_of_probabilities_have_one_scale(
    width: int, reports: dict[str, Path], open_page: Callable[[int], Watched]
) -> None:
    """In pixels for a probability of 1: the same in every table, before and after, or 83 % would look like 99 %."""
    page = open_page(width).page
    page.goto(reports["experiment"].as_uri())
    bars = page.evaluate(
        """() => [...document.querySelectorAll('.probs tr')].map(row => [
            +row.querySelector('.number').dataset.value,
            row.querySelector('.track span').getBoundingClientRect().width])"""
    )
    scales = [pixels / probability for probability, pixels in bars if probability > 0.2]
    assert len(scales) > 6 and max(scales) - min(scales) < 1
    assert min(scales) > 60


def test_the_contents_lead_to_their_sections(reports: dict[str, Path], open_page: Callable[[int], Watched]) -> None:
    page = open_page(SCREEN).page
    page.emulate_media(reduced_motion="reduce")
    page.goto(reports["experiment"].as_uri())
    links = page.locator("nav.contents a")
    assert links.count() > 4
    links.last.click()
    name = links.last.text_content()
    assert name
    heading = page.get_by_role("heading", name=name, exact=True)
    box = heading.bounding_box()
    assert box is not None and 0 <= box["y"] < page.viewport_size["height"]  # pyright: ignore[reportOptionalSubscript]


def test_a_report_is_readable_in_the_dark_and_keeps_its_figures_on_white(
    reports: dict[str, Path], open_page: Callable[[int], Watched]
) -> None:
    page = open_page(SCREEN).page
    page.emulate_media(color_scheme="dark")
    page.goto(reports["experiment"].as_uri())
    colour = "element => getComputedStyle(element).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    ink = "element => getComputedStyle(element).color.match(/\\d+/g).slice(0, 3).map(Number)"
    paper = page.locator("body").evaluate(colour)
    assert max(paper) < 60
    for place in ("h1", ".summary", ".card dt", "td"):
        assert min(page.locator(place).first.evaluate(ink)) > 140, place
    assert page.locator(".paper").first.evaluate(colour) == [255, 255, 255]
