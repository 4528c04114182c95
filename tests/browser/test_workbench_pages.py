"""The workbench's pages besides the graph: runs, features, trials, comparing, and `try it` with the shipped model."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect
from tests.browser.conftest import SLOW
from tests.unit.viewer.test_server import run_folder
from tests.unit.viewer.test_studies import LABEL, LAYERS, WIDTH, study_run

from vlmscope.core.artifacts import shipped
from vlmscope.viewer.jobs import Jobs
from vlmscope.viewer.server import _listen, create_app

pytestmark = pytest.mark.browser
EXAMPLE = (shipped("assets/example_graph") / "graph.json").read_text()
LOADING = 240_000  # ms; the worker imports torch and loads the model
GL = "GL Driver Message"  # of WebGL in software, when the window is read
SIZES = [(1280, 800), (390, 844)]
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    study_run(root, tmp_path_factory.mktemp("data"))
    metrics = {f"layers/fvu/layer_{layer:02d}": 0.1 * (layer + 1) for layer in range(4)} | {"val/fvu": 0.25}
    for factor in (4, 16):
        swept = run_folder(root, f"sweep_1/{factor}", "train_transcoders", metrics, ["experiment=expansion_sweep"])
        with (swept / "config.yaml").open("a") as file:
            file.write(f"transcoder:\n  expansion_factor: {factor}\n")
    for name in ("mars", "earth"):
        folder = run_folder(root, f"trace/{name}", metrics={}, overrides=[f"image={name}.png", "prompt=what is it ?"])
        (folder / "graph.json").write_text(EXAMPLE)
    # A name that a page must show as words.
    run_folder(root, "odd/<img src=x onerror='window.hacked=1'>", metrics={"a": 1.0})
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    listener, jobs = _listen("127.0.0.1", 0, True), Jobs(root, ["tracking=none"])
    server = uvicorn.Server(uvicorn.Config(create_app(root, jobs=jobs), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.should_exit = True
    jobs.close()
    thread.join(10)


@pytest.fixture
def opened(chromium: Browser, address: str) -> Iterator[Opened]:
    """A page by its address; at the end nothing went wrong in it, and nothing was asked of another server."""
    contexts, problems = [], []

    def page_of(route: str, size: tuple[int, int] = SIZES[0]) -> Page:
        contexts.append(chromium.new_context(viewport={"width": size[0], "height": size[1]}))
        contexts[-1].set_default_timeout(SLOW)
        page = contexts[-1].new_page()
        page.on(
            "console",
            lambda m: problems.append(m.text) if m.type in ("error", "warning") and GL not in m.text else None,
        )
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else problems.append(r.url))
        page.goto(f"{address}#/{route}")
        return page

    yield page_of
    for context in contexts:
        context.close()
    assert problems == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("route", ["runs", "runs?view=fvu", "runs?open=trace/mars", "features", "features?open=L1/3",
                                   "feature/study/mine/L1/3", "try", "compare?a=trace/mars&b=trace/earth"])  # fmt: skip
def test_a_page_opens_quietly_and_fits(route: str, size: tuple[int, int], opened: Opened) -> None:
    page = opened(route, size)
    expect(page.locator("[role=progressbar]")).to_have_count(0)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate("window.hacked") is None


def test_runs_are_found_filtered_and_opened(opened: Opened) -> None:
    page = opened("runs")
    rows = page.locator(".run-table tbody tr")
    expect(rows).to_have_count(6)
    expect(page.get_by_text("odd/<img src=x")).to_be_visible()
    page.get_by_role("button", name="Graphs 2").click()
    expect(rows).to_have_count(2)
    page.get_by_label("Find a run").fill("earth")
    expect(rows).to_have_count(1)
    rows.first.click()
    detail = page.get_by_label("Run trace/earth", exact=True)
    expect(detail.get_by_text("task=trace image=earth.png 'prompt=what is it ?'")).to_be_visible()
    expect(page).to_have_url(re.compile("(?=.*words=earth)(?=.*kind=graph)"))  # the address keeps what is shown
    page.keyboard.press("Escape")
    page.get_by_label("Find a run").fill("")
    page.get_by_label("Compare the graph of trace/mars").check()
    page.get_by_label("Compare the graph of trace/earth").check()
    page.get_by_role("button", name="Compare").click()
    graph = json.loads(EXAMPLE)
    features = {node["node_id"].rpartition("_")[0] for node in graph["nodes"] if "transcoder" in node["feature_type"]}
    expect(page.get_by_text(f"{len(features)} features in both")).to_be_visible()


def test_transcoders_are_drawn_by_layer_and_by_expansion_factor(opened: Opened) -> None:
    page = opened("runs?view=fvu")
    expect(page.get_by_role("img", name="Fraction of variance unexplained by layer")).to_be_visible()
    points = page.get_by_role("img", name="Fraction of variance unexplained by expansion factor").locator("circle")
    expect(points).to_have_count(2)


def test_features_are_filtered_found_and_seen(opened: Opened) -> None:
    page = opened("features")
    expect(page.get_by_text(f"{LAYERS * WIDTH} of {LAYERS * WIDTH} features")).to_be_visible(timeout=30_000)
    page.get_by_label("Label", exact=True).select_option("yes")
    expect(page.locator(".feature-card")).to_have_count(1)
    page.get_by_label("Label", exact=True).select_option("")
    page.get_by_label("Layer").select_option("2")
    expect(page.get_by_text(f"{WIDTH} of {LAYERS * WIDTH} features")).to_be_visible()
    page.get_by_label("Layer").select_option("")
    page.get_by_label("Find features by words").fill("red one")
    expect(page.locator(".feature-card")).to_have_count(1)
    page.locator(".feature-card").click()
    panel = page.get_by_label("Feature L1/3", exact=True)
    expect(panel.get_by_role("heading", name=LABEL.text)).to_be_visible()
    expect(panel.get_by_text("0.90 of 1, chance is 0.5")).to_be_visible()
    expect(panel.locator(".example").first).to_be_visible()
    picture = panel.locator(".example .heat").first
    assert picture.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") > 0
    expect(panel.locator(".example .heat rect, .example .word i")).not_to_have_count(0)  # something is tinted
    neighbour = panel.locator(".neighbours button").first
    name = neighbour.locator(".mono").inner_text()
    neighbour.click()
    expect(panel.get_by_text(name, exact=True).first).to_be_visible()
    panel.get_by_role("button", name="Back to L1/3").click()
    expect(panel.get_by_role("heading", name=LABEL.text)).to_be_visible()


def trace(page: Page, picture: str) -> None:
    page.get_by_label(f"Take the picture {picture}").click()
    expect(page.get_by_label("Question")).to_have_value("what planet is this ?")
    page.get_by_role("button", name="Trace").click()
    expect(page.locator(".try-tabs .answer")).to_have_text(f"answer: {picture}", timeout=LOADING)
    expect(page.locator(".try-graph .stage .canvas canvas.sigma-nodes")).to_be_visible(timeout=LOADING)


def test_mars_turns_into_earth_next_to_its_controls(opened: Opened) -> None:
    page = opened("try")
    trace(page, "earth")
    trace(page, "mars")
    page.get_by_role("button", name="Exchange with another graph").click()
    page.locator("dialog .choose button").filter(has_text="earth: what planet").first.click()
    expect(page.locator(".edits li")).to_have_count(2)
    page.get_by_role("button", name="Run with").click()
    effect = page.locator(".effect")
    expect(effect.locator(".turn")).to_have_text("mars→earth", timeout=LOADING)
    controls = effect.locator(".controls tbody tr")
    expect(controls).to_have_count(3)
    for control in (controls.nth(1), controls.nth(2)):
        expect(control).to_contain_text("mars 5 of 5")
        expect(control).to_contain_text("0 of 5")
    expect(effect.locator("code")).to_contain_text(
        "image=assets/pictures/mars.png 'prompt=what planet is this ?' 'task.features={L"
    )
    expect(effect.get_by_text("Answer under the edit")).to_be_visible()


def drop(page: Page, picture: bytes) -> None:
    """Drop a picture onto the page, as a file manager does."""
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "mine.png", { type: "image/png" }));
            const how = { dataTransfer: data, bubbles: true, cancelable: true };
            for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, how));
        }""",
        list(picture),
    )


def test_a_dropped_picture_is_traced_and_a_trace_is_cancelled(opened: Opened) -> None:
    page = opened("try")
    expect(page.locator(".try-picture > img")).to_have_attribute("alt", "mars")  # the page listens now
    drop(page, (shipped("assets/pictures") / "shapes.png").read_bytes())
    expect(page.locator(".try-picture > img")).to_have_attribute("alt", "mine.png")
    page.get_by_label("Question").fill("how many shapes are there ?")
    page.get_by_role("button", name="Trace").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("Cancelled.")).to_be_visible(timeout=LOADING)
    page.get_by_role("button", name="Trace").click()
    expect(page.locator(".try-tabs .answer")).to_be_visible(timeout=LOADING)
    assert page.locator(".toast.error").count() == 0
