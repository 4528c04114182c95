"""task=serve as users start it: the first page, a traced and a steered prompt, a cancelled job, and a clean end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server of a folder, with a tiny model and no tracking for its jobs, and its address."""
    command = [sys.executable, ROOT / "run.py", "serve", "task.port=0", "model=tiny", "tracking=none"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert address is not None, line
    yield process, address[0]
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(120)


def ask(address: str, path: str, method: str = "GET", body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(address + path, data, {"origin": address}, method=method)
    with urlopen(request, timeout=120) as answer:
        return json.load(answer)


def finished(address: str, number: str) -> dict[str, Any]:
    end = time.monotonic() + 300
    while (job := ask(address, f"/api/jobs/{number}"))["status"] in ("queued", "running"):
        assert time.monotonic() < end, job
        time.sleep(0.1)
    return job


def test_a_prompt_is_traced_steered_and_cancelled(server: tuple[subprocess.Popen[str], str], tmp_path: Path) -> None:
    process, address = server
    with urlopen(f"{address}/") as page:
        assert page.status == 200
    picture = {"picture": "shipped:mars.png", "prompt": "what is this ?"}
    started = ask(address, "/api/jobs", "POST", {"task": "trace", **picture})
    assert "task=trace model=tiny tracking=none" in started["command"]
    job = finished(address, started["id"])
    assert job["status"] == "done", job
    graph = ask(address, f"/api/graphs/{job['run']}")
    features = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert graph["vlmscope"]["pictures"][0].startswith("data:image/")
    assert ask(address, "/api/runs")["runs"][0]["id"] == job["run"]
    layer, index, _ = features[0]["node_id"].split("_")
    edits = [{"feature": f"L{layer}/{index}", "action": "scale", "value": 3}]
    steer = {"task": "steer", **picture, "edits": edits, "controls": 1, "new_tokens": 2}
    job = finished(address, ask(address, "/api/jobs", "POST", steer)["id"])
    assert job["status"] == "done", job
    assert {one["name"] for one in job["result"]["controls"]} == {"matched", "random direction"}
    assert job["result"]["active"] == 1 and job["result"]["top"]
    number = ask(address, "/api/jobs", "POST", {**steer, "new_tokens": 500, "controls": 100})["id"]
    assert ask(address, f"/api/jobs/{number}", "DELETE")["status"] == "cancelled"
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 0
    assert not (tmp_path / "outputs" / "serve").exists()
