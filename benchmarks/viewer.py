"""The workbench: the server's first page and list of runs, and in headless Chromium a graph of 10,000 nodes.

`python benchmarks/viewer.py [--runs 1000] [--nodes 10000] [--edges 100000] [--repeat 3] [--no-browser]` prints a table
of medians with what each is to stay below (or above). The browser's part needs the built page (`make viewer`) and
Chromium; without a GPU it draws WebGL in software.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.request import urlopen

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
LAYERS, POSITIONS = 26, 280  # of the large graph, as of a model with a picture of 256 soft tokens
# Frames drawn while the mouse drags and the wheel turns, by the page's own clock.
FRAMES = (
    "() => { window.frames_ = 0; const count = () => { window.frames_++; requestAnimationFrame(count); }; count(); }"
)


def run_folders(root: Path, count: int) -> None:
    """Runs as task=trace leaves them, without their large files."""
    settings = "\n".join(f"  setting_{n}: {n}" for n in range(60))
    for number in range(count):
        folder = root / f"experiment_{number % 20}" / f"run_{number:05d}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(f"task:\n  name: trace\nattribution:\n{settings}\nseed: {number}\n")
        (folder / "overrides.yaml").write_text(f"- task=trace\n- prompt=question {number}\n")
        metrics = {f"graph/number_{n}": float(n) for n in range(20)}
        (folder / "metrics.json").write_text(json.dumps(metrics))


def large_graph(folder: Path, nodes: int, edges: int) -> None:
    """A graph.json of random features and edges from lower to higher layers."""
    rng = np.random.default_rng(0)
    layer = np.sort(rng.integers(0, LAYERS, nodes - 1))
    position = rng.integers(0, POSITIONS, nodes - 1)
    names = [f"{at}_{number}_{place}" for number, (at, place) in enumerate(zip(layer, position, strict=True))]
    kind = {"feature_type": "cross layer transcoder", "token_prob": 0.0, "is_target_logit": False}
    body = [
        {**kind, "node_id": name, "jsNodeId": name, "feature": number, "layer": str(layer[number]), "clerp": "",
         "ctx_idx": int(position[number]), "influence": (number + 1) / nodes, "activation": 1.0}
        for number, name in enumerate(names)
    ]  # fmt: skip
    end = f"{LAYERS}_0_{POSITIONS - 1}"
    logit = {"feature_type": "logit", "token_prob": 1.0, "is_target_logit": True, "layer": str(LAYERS)}
    last = {"node_id": end, "jsNodeId": end, "clerp": 'Output "a" (p=1.000)', "ctx_idx": POSITIONS - 1, "feature": 0}
    body.append({**logit, **last, "influence": None, "activation": None})
    ends = np.sort(rng.integers(0, nodes, (2, 2 * edges)), axis=0)
    ends = ends[:, np.append(layer, LAYERS)[ends[0]] < np.append(layer, LAYERS)[ends[1]]][:, :edges]
    names.append(end)
    weights = rng.standard_normal(ends.shape[1])
    links = [
        {"source": names[s], "target": names[t], "weight": float(w)} for s, t, w in zip(*ends, weights, strict=True)
    ]
    metadata = {"slug": "large", "scan": "random", "prompt_tokens": ["word"] * POSITIONS, "prompt": "word"}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("task:\n  name: trace\n")
    (folder / "graph.json").write_text(json.dumps({"metadata": metadata, "qParams": {}, "nodes": body, "links": links}))


@contextmanager
def server(root: Path) -> Iterator[tuple[str, float]]:
    """The server's address, and the seconds from its start to its first page."""
    began = time.perf_counter()
    command = [sys.executable, ROOT / "run.py", "task=serve", "task.port=0", f"task.root={root}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}  # this clone's, whatever is installed
    process = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+?:\d+/", process.stdout.readline())
        assert found is not None
        fetched(found[0])
        yield found[0], time.perf_counter() - began
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def fetched(address: str) -> float:
    """Seconds until an answer has come."""
    began = time.perf_counter()
    with urlopen(address) as answer:
        answer.read()
    return time.perf_counter() - began


def drawn(address: str) -> dict[str, float]:
    """Seconds to the first picture of the graph, frames a second while it is panned and zoomed, and megabytes."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = chromium.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        began = time.perf_counter()
        page.goto(f"{address}#/graph/large")
        page.wait_for_selector(".stage .canvas canvas.sigma-nodes", state="visible")
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        first = time.perf_counter() - began
        box = page.locator(".stage .canvas").bounding_box()
        assert box is not None
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        page.mouse.move(x, y)
        page.evaluate(FRAMES)
        began = time.perf_counter()
        page.mouse.down()
        for step in range(60):
            page.mouse.move(x + 3 * step, y + step)
        page.mouse.up()
        for step in range(30):
            page.mouse.wheel(0, -60 if step % 2 else 60)
        frames = page.evaluate("() => window.frames_") / (time.perf_counter() - began)
        mine = psutil.Process(os.getpid()).children(recursive=True)
        memory = sum(one.memory_full_info().pss for one in mine if "chrom" in one.name())
        chromium.close()
    return {"first picture, s": first, "frames a second": frames, "memory of Chromium, MB": memory / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("runs", 1000), ("nodes", 10_000), ("edges", 100_000), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--no-browser", action="store_true")
    options = parser.parse_args()
    rows: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "outputs"
        run_folders(root, options.runs)
        large_graph(root / "large", options.nodes, options.edges)
        for _ in range(options.repeat):
            with server(root) as (address, seconds):
                found = {"first page, s": seconds, "runs, first time, s": fetched(f"{address}api/runs")}
                found["runs, again, s"] = fetched(f"{address}api/runs")
                found["graph.json, s"] = fetched(f"{address}api/graphs/large")
                found |= {} if options.no_browser else drawn(address)
            for name, value in found.items():
                rows.setdefault(name, []).append(value)
    most = {"first page, s": "<= 3", "runs, first time, s": "<= 1", "first picture, s": "<= 2"}
    most |= {"frames a second": ">= 30", "memory of Chromium, MB": "<= 1000"}
    print(f"{options.runs} runs; {options.nodes} nodes, {options.edges} edges; medians of {options.repeat}")
    for name, values in rows.items():
        print(f"{name:<24} {median(values):>8.2f}  {most.get(name, '')}")


if __name__ == "__main__":
    main()
