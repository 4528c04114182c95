"""Take the pictures of docs/workbench.md: the workbench on a folder of its own, used as the walk-through says.

    make viewer
    python docs/workbench_screenshots.py [--out docs/img]

Needs the `dev` extra and Chromium (Debian: apt-get install chromium). It takes about two minutes on two slow cores.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, expect
from screenshots import HEIGHT, ROOT, WIDTH, browser, shrunk

SLOW_MS = 120_000  # the worker imports torch and loads the model, on a busy machine
MOST_BYTES = 250_000
FEATURE = "L3/1242"  # the strongest of the Mars graph
PIXELS = 1.25  # of the screen for one of the page


@contextmanager
def workbench() -> Iterator[str]:
    """`task=serve` on an empty folder; yields its address and ends it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "run.py", "task=serve", f"task.root={folder}", "task.port=0", "tracking=none"]
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            if found is None:
                raise RuntimeError(f"task=serve did not come up: {line}")
            yield found[0]
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(60)


def trace(page: Page, picture: str) -> None:
    """Trace a shipped picture in `try it`."""
    page.get_by_label(f"Take the picture {picture}").click()
    page.get_by_role("button", name="Trace").click()
    expect(page.locator(".try-tabs .answer")).to_have_text(f"answer: {picture}", timeout=SLOW_MS)
    quiet(page)


def quiet(page: Page) -> None:
    """Wait until nothing is loading and pictures are drawn."""
    expect(page.locator("[role=progressbar]")).to_have_count(0, timeout=SLOW_MS)
    page.wait_for_timeout(1500)


def take(page: Page, address: str, out: Path) -> None:
    """All pictures."""
    page.goto(f"{address}#/try")
    trace(page, "earth")
    trace(page, "mars")
    page.get_by_role("button", name="Exchange with another graph").click()
    page.locator("dialog .choose button").filter(has_text="earth").first.click()
    page.get_by_role("button", name="Run with").click()
    page.locator(".effect").wait_for(timeout=SLOW_MS)
    quiet(page)
    save(page, out / "workbench_effect.png")
    page.get_by_role("button", name="Graph", exact=True).click()
    page.get_by_role("link", name="Open on its own").click()
    page.locator(".graph-page .edges button").filter(has_text=FEATURE).first.click()
    page.get_by_role("button", name="Examples").click()
    quiet(page)
    save(page, out / "workbench.png")
    page.goto(f"{address}#/features/shipped?modality=image&words=planet+mars&open=L1/770")
    quiet(page)
    save(page, out / "workbench_features.png")
    page.goto(f"{address}#/runs?kind=graph")
    page.locator(".run-table").wait_for()
    for box in page.get_by_label("Compare the graph of").all()[:2]:
        box.check()
    page.get_by_role("button", name="Compare").click()
    quiet(page)
    save(page, out / "workbench_compare.png")


def save(page: Page, path: Path) -> None:
    """Write what the window shows, with few colours, which such pages do not miss."""
    shrunk(page.screenshot(), path)
    size = path.stat().st_size
    print(f"{path}: {size / 1000:.0f} kB")
    if size > MOST_BYTES:
        raise RuntimeError(f"{path} has {size} bytes, more than {MOST_BYTES}")


def main() -> None:
    """Take them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    out = parser.parse_args().out
    with workbench() as address, browser() as started:
        context = started.new_context(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=PIXELS, color_scheme="light"
        )
        page = context.new_page()
        page.set_default_timeout(SLOW_MS)
        take(page, address, out)


if __name__ == "__main__":
    main()
