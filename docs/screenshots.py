"""Take the screenshots that docs/img holds: of the MLflow UI with the latest sweep of an experiment:

    python run.py -m experiment=expansion_sweep transcoder.expansion_factor=4,16 trainer.max_steps=200
    python docs/screenshots.py

or of the summary page of task=reproduce:

    python run.py task=reproduce hydra.run.dir=/my/reproduction
    python docs/screenshots.py --summary /my/reproduction/summary.html

The first are what `make mlflow` shows. Needs the `dev` extra and Chromium (Debian: apt-get install chromium).
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryFile
from urllib.parse import quote

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.tracking.client import open_client

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, HIGH = 1280, 800, 1430  # pixels; high: three rows of charts
SLOW_MS = 60_000  # the UI's first page takes seconds, on a busy machine many
# The UI opens an assistant over a third of the window on the first visit.
_NO_ASSISTANT = (
    "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');"
    "localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false');"
)
_FLOATING = "button[aria-label*='ssistant'], [data-testid*='assistant-fab'] { display: none !important; }"


@dataclass(frozen=True)
class Sweep:
    """MLflow's ids of a sweep: its experiment, its parent run, and its jobs in their order, each with its name."""

    experiment: str
    parent: str
    jobs: dict[str, str]


def latest_sweep(uri: str, experiment: str) -> Sweep:
    """The newest sweep of an experiment that has finished.

    Raises:
        UserError: there is none.
    """
    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    runs = [] if found is None else client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"])
    parents = [run for run in runs if run.data.tags.get("sweep") == "true" and run.info.status == "FINISHED"]
    if found is None or not parents:
        raise UserError(f"{uri} has no finished sweep of {experiment!r}; run one first (see --help)")
    parent = parents[-1].info.run_id
    jobs = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]
    return Sweep(found.experiment_id, parent, {run.info.run_id: str(run.info.run_name) for run in jobs})


def chromium() -> str:
    """The path of an installed Chromium.

    Raises:
        UserError: there is none.
    """
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    raise UserError("no Chromium found; install it (Debian: apt-get install -y --no-install-recommends chromium)")


@contextmanager
def browser() -> Iterator[Browser]:
    """The installed Chromium, headless. Playwright's default is without a sandbox, which root needs."""
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium())
        try:
            yield started
        finally:
            started.close()


@contextmanager
def mlflow_ui(uri: str) -> Iterator[str]:
    """`mlflow ui` on a free local port; yields its address and stops it at the end.

    Raises:
        RuntimeError: it did not come up; with what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    address = f"http://127.0.0.1:{port}"
    with TemporaryFile() as log:
        # Its own session, since it starts workers that must end with it.
        server = subprocess.Popen(
            command, env=os.environ | quiet, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            if not _answers(address + "/health", server):
                log.seek(0)
                raise RuntimeError("mlflow ui did not come up:\n" + log.read().decode(errors="replace")[-2000:])
            yield address
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


def _answers(address: str, server: subprocess.Popen[bytes], seconds: float = 150) -> bool:
    end = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    return False


class Ui:
    """The pages of a sweep in the MLflow UI; each method returns when what it names is drawn."""

    def __init__(self, page: Page, address: str, sweep: Sweep) -> None:
        self.page, self.sweep = page, sweep
        self._address = address
        page.set_default_timeout(SLOW_MS)
        page.add_init_script(_NO_ASSISTANT)

    def run_list(self) -> None:
        """The runs of the experiment, with the jobs of the sweep below their parent."""
        page = self.page
        page.goto(f"{self._address}/#/experiments/{self.sweep.experiment}/runs")
        # The UI starts in its view for language model apps; the choice is remembered.
        page.get_by_text("Model training").click()
        page.get_by_role("heading", name="Runs", exact=True).wait_for()
        self._row(self.sweep.parent).locator("button").first.click()
        for job in self.sweep.jobs:
            self._row(job).wait_for()

    def columns(self, *names: str) -> None:
        """From the run list: a column for each of these parameters and metrics, in place of empty ones."""
        self.page.get_by_role("button", name="Columns").click()
        dialog = self.page.get_by_role("dialog")
        for empty in ("Dataset", "Source", "Models"):
            dialog.get_by_text(empty, exact=True).click()
        for name in names:
            dialog.get_by_text(name, exact=True).click()
        self.page.keyboard.press("Escape")
        for name in names:
            self.page.get_by_role("columnheader", name=name).first.wait_for()

    def charts(self, search: str) -> None:
        """From the run list: charts of the metrics whose name has `search` in it, of the jobs alone.

        The window must be high enough for all of them, since those out of sight are not drawn.
        """
        page = self.page
        # Its inputs are hidden behind icons, so the labels are what can be clicked.
        page.locator("label:has(input[name=runs-view-mode][value=CHART])").click()
        # The parent has no metrics and would only fill the legends.
        hide = self._row(self.sweep.parent).locator("label:has(input.is-visibility-toggle-checkbox)")
        if hide.locator("input").is_checked():
            hide.click()
        page.get_by_placeholder("Search metric charts").fill(search)
        self._drawn(search)

    def metric(self, name: str) -> None:
        """The page of one metric of the jobs: its curves, and latest, least and greatest value."""
        keys = quote(json.dumps([name]))
        shown = f"metric={quote(json.dumps(name))}&plot_metric_keys={keys}&x_axis=step"
        self._go("metric", f"runs={self._ids()}&experiments={self._experiments()}&{shown}")
        self._drawn()

    def parent_artifact(self, path: str) -> Locator:
        """A picture among the artifacts of the parent run."""
        self._go(f"experiments/{self.sweep.experiment}/runs/{self.sweep.parent}/artifacts/{path}")
        picture = self.page.locator("img[src*='get-artifact'], img[src^='blob:']").first
        picture.wait_for()
        return picture

    def drawn_values(self) -> dict[str, dict[str, list[float]]]:
        """For every chart in sight, by title: its series' names and values."""
        return self.page.evaluate(
            """() => Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(plot => {
                const card = plot.closest("[data-testid='experiment-view-compare-runs-card']") || document.body;
                const title = (card.innerText || '').trim().split('\\n')[0];
                return [title, Object.fromEntries(plot.data.map(s => [s.name, [...(s.y || [])]]))];
            }))"""
        )

    def _row(self, run: str) -> Locator:
        return self.page.locator(f"[row-id='{run}']").first

    def _go(self, place: str, query: str = "") -> None:
        self.page.goto(f"{self._address}/#/{place}" + (f"?{query}" if query else ""))

    def _drawn(self, title: str = "") -> None:
        """Wait until all plots have data; with a `title`, until there are cards with it alone, each with its plot."""
        self.page.wait_for_function(
            """title => {
                const plots = [...document.querySelectorAll('.js-plotly-plot')];
                const cards = [...document.querySelectorAll("[data-testid='experiment-view-compare-runs-card']")];
                return plots.length > 0 && plots.every(plot => plot.data && plot.data.length > 0) && (!title ||
                    cards.length === plots.length && cards.every(card => card.innerText.includes(title)));
            }""",
            arg=title,
        )

    def _ids(self) -> str:
        return quote(json.dumps(list(self.sweep.jobs)))

    def _experiments(self) -> str:
        return quote(json.dumps([self.sweep.experiment]))


def take(ui: Ui, out: Path) -> None:
    """All screenshots; see docs/img."""
    page = ui.page
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    ui.run_list()
    ui.columns("transcoder.expansion_factor", "val/fvu", "val/dead_frac")
    _save(page, out / "mlflow_runs.png", height=420)
    ui.charts("val/fvu")
    _save(page, out / "mlflow_fvu.png", height=680)
    page.set_viewport_size({"width": WIDTH, "height": HIGH})
    ui.charts("layers/fvu/")
    _save(page, out / "mlflow_fvu_by_layer.png")
    page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
    ui.metric("val/fvu")
    _save(page, out / "mlflow_fvu_curves.png", height=680)
    ui.parent_artifact("figures/sweep.png")
    # Where this machine keeps its artifacts is nobody's business.
    page.get_by_text("file:///").evaluate_all("found => found.forEach(e => e.style.visibility = 'hidden')")
    _save(page, out / "mlflow_sweep_figure.png", height=700)


def take_summary(page: Page, summary: Path, out: Path) -> None:
    """The top of a summary page, as far as its first experiment."""
    page.set_viewport_size({"width": 1100, "height": HIGH})
    page.goto(summary.resolve().as_uri())
    box = page.locator("article.experiment").first.bounding_box()
    assert box is not None
    _save(page, out / "reproduce.png", height=int(box["y"] + box["height"]))


def _save(page: Page, path: Path, height: int | None = None) -> None:
    """The window, or its upper `height` pixels."""
    page.add_style_tag(content=_FLOATING)
    page.mouse.move(0, 0)
    page.wait_for_timeout(1500)  # plots fade in and rows slide
    shrunk(page.screenshot(), path, height)
    print(path)


def shrunk(picture: bytes, path: Path, height: int | None = None) -> None:
    """Write a picture, or its upper `height` pixels, as a PNG of at most 256 colours, atomically."""
    shown = Image.open(BytesIO(picture)).convert("RGB")
    if height is not None:
        shown = shown.crop((0, 0, shown.width, height))
    with atomic_path(path) as temporary:
        shown.quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uri", default=f"sqlite:///{ROOT}/outputs/mlflow.db", help="the tracking store")
    parser.add_argument("--experiment", default="expansion_sweep")
    parser.add_argument("--summary", type=Path, help="a summary.html of task=reproduce, to be taken instead")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    args = parser.parse_args()
    if args.summary is not None:
        with browser() as chrome:
            take_summary(chrome.new_page(), args.summary, args.out)
        return 0
    try:
        sweep = latest_sweep(args.uri, args.experiment)
        args.out.mkdir(parents=True, exist_ok=True)
        with mlflow_ui(args.uri) as address, browser() as chrome:
            take(Ui(chrome.new_page(), address, sweep), args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
