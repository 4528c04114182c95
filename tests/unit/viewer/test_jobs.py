"""Jobs of the workbench: from what a page sends to a command line, and a worker that fails in every way."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from vlmscope.viewer.jobs import Jobs
from vlmscope.viewer.safety import Refused
from vlmscope.viewer.server import create_app

HOST = "127.0.0.1:8600"
ASK = {"task": "trace", "prompt": "what is this ?"}

# A worker that does what the prompt says.
WORKER = """
import json, os, signal, sys, time
pipe = int(sys.argv[1])
def say(**event): os.write(pipe, (json.dumps(event) + "\\n").encode())
say(ready=True)
for line in sys.stdin:
    argv = json.loads(line)
    values = dict(one.split("=", 1) for one in argv)
    do, code = values["prompt"], 0
    if do == "die": os._exit(3)
    if do == "out of memory": os.kill(os.getpid(), signal.SIGKILL)
    if do == "load": say(text="loading the model"); time.sleep(60)
    if do == "sleep": print("graph:  40%|####      | 4/10", end="\\r", flush=True); time.sleep(60)
    if do == "refuse": print("error: no such thing; do that", file=sys.stderr); code = 2
    if do == "fail": print("Traceback ...\\nValueError: odd"); code = 1
    if do == "files": os.makedirs(values["hydra.run.dir"])
    print("process", os.getpid(), file=open(os.environ["SEEN"], "a"), flush=True)
    print("\\n(the end of this job's output)", flush=True)
    say(done=code)
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    root = tmp_path / "outputs"
    root.mkdir()
    jobs = Jobs(root, ["tracking=none"], [sys.executable, str(tmp_path / "worker.py")])
    yield jobs
    jobs.close()


def wait(jobs: Jobs, number: str, until=lambda job: job["status"] not in ("queued", "running"), seconds=120.0) -> dict:
    end = time.monotonic() + seconds
    while not until(job := jobs.get(number)):
        assert time.monotonic() < end, job
        time.sleep(0.02)
    return job


def ran(jobs: Jobs, prompt: str) -> dict:
    return wait(jobs, jobs.start({**ASK, "prompt": prompt})["id"])


def test_a_job_is_the_command_line_that_it_shows(jobs: Jobs) -> None:
    started = jobs.start({**ASK, "prompt": "it's 'files' $(x)"})
    assert started["command"].endswith(
        """task=trace tracking=none 'prompt=it'"'"'s '"'"'files'"'"' $(x)' task.figure=false"""
    )
    job = jobs._jobs[started["id"]]
    assert job.argv == ["task=trace", "tracking=none", "prompt=it's 'files' $(x)", "task.figure=false",
                        f"hydra.run.dir={job.folder}"]  # fmt: skip
    assert wait(jobs, started["id"])["status"] == "done"


def test_one_worker_runs_all_jobs_and_names_their_runs(jobs: Jobs, tmp_path: Path) -> None:
    first, second = ran(jobs, "files"), ran(jobs, "files")
    assert first["run"] != second["run"] and first["run"].startswith("trace/") and (jobs.root / first["run"]).is_dir()
    assert len(set((tmp_path / "seen").read_text().splitlines())) == 1


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("die", "exit code 3"), ("out of memory", "memory ran out"), ("refuse", "no such thing; do that"),
     ("fail", "task=trace failed: ValueError: odd")],
)  # fmt: skip
def test_a_job_that_fails_says_why_and_the_next_one_runs(prompt: str, words: str, jobs: Jobs) -> None:
    job = ran(jobs, prompt)
    assert job["status"] == "failed" and words in job["error"]
    assert ran(jobs, "files")["status"] == "done"


def test_a_running_job_shows_its_progress_and_can_be_cancelled(jobs: Jobs) -> None:
    number = jobs.start({**ASK, "prompt": "sleep"})["id"]
    job = wait(jobs, number, lambda job: job["progress"]["fraction"] is not None)
    assert job["progress"] == {"text": "graph", "fraction": 0.4}
    waiting = jobs.start(ASK)["id"]
    assert jobs.cancel(waiting)["status"] == jobs.cancel(number)["status"] == "cancelled"
    assert jobs.get(number)["error"] is None
    assert ran(jobs, "files")["status"] == "done"


def test_a_worker_that_cannot_start_is_a_message(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, [], ["/no/such/python"])
    assert "FileNotFoundError" in ran(jobs, "x")["error"]
    jobs = Jobs(tmp_path, [], [sys.executable, "-c", "raise SystemExit(4)"])
    assert "exit code 4" in ran(jobs, "x")["error"]


def test_a_worker_ends_with_the_server(jobs: Jobs) -> None:
    ran(jobs, "files")
    process = jobs._process
    assert process is not None and process.poll() is None
    jobs.close()
    assert process.poll() == -signal.SIGTERM


EDIT = {"feature": "L5/709", "action": "set", "value": 0}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"task": "rm"}, "task must be one of"),
        ({"task": ["trace"]}, "task must be one of"),
        ({"task": "trace"}, "no prompt"),
        ({"task": "trace", "prompt": " "}, "no prompt"),
        ({"task": "trace", "prompt": "x" * 20_001}, "longer"),
        ({"task": "trace", "prompt": "a\0b"}, "longer"),
        ({**ASK, "picture": "/etc/passwd"}, "nothing called"),
        ({**ASK, "picture": "../x.png"}, "nothing called"),
        ({**ASK, "picture": "shipped:../orrery/config.json"}, "nothing called"),
        ({**ASK, "picture": 3}, "picture must be"),
        ({**ASK, "study": "../x"}, "nothing called"),
        ({"task": "find", "prompt": "a"}, "no study"),
        ({"task": "steer", "prompt": "a"}, "choose 1 to"),
        ({"task": "steer", "prompt": "a", "edits": [{}]}, "an edit must have"),
        ({"task": "steer", "prompt": "a", "edits": ["L5/709"]}, "an edit must have"),
        ({"task": "steer", "prompt": "a", "edits": [{**EDIT, "feature": "x task.root=/"}]}, "an edit must have"),
        ({"task": "steer", "prompt": "a", "edits": [{**EDIT, "value": "nan"}]}, "too large"),
        ({"task": "steer", "prompt": "a", "edits": [EDIT, {**EDIT, "action": "scale"}]}, "set and scaled"),
        ({"task": "steer", "prompt": "a", "edits": [EDIT], "positions": ["1"]}, "a position must be"),
        ({"task": "steer", "prompt": "a", "edits": [EDIT], "controls": 1e9}, "controls must be"),
        ({"task": "steer", "prompt": "a", "edits": [EDIT], "new_tokens": True}, "new_tokens must be"),
    ],
)  # fmt: skip
def test_what_is_no_job_is_refused(request_: dict, words: str, jobs: Jobs) -> None:
    with pytest.raises(Refused, match=words):
        jobs.start(request_)


def test_pictures_are_checked_and_kept_as_png(jobs: Jobs, tmp_path: Path) -> None:
    client = TestClient(
        create_app(jobs.root, jobs=jobs), base_url=f"http://{HOST}", headers={"origin": f"http://{HOST}"}
    )
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.jpg")
    answer = client.post("/api/uploads", content=(tmp_path / "a.jpg").read_bytes()).json()
    assert (jobs.root / answer["picture"]).is_file() and client.get(answer["url"]).headers[
        "content-type"
    ] == "image/png"
    assert jobs.start({**ASK, "picture": answer["picture"]})["command"].count(answer["picture"]) == 1
    for data in (b"", b"<svg onload=alert(1)>", b"GIF89a", (tmp_path / "a.jpg").read_bytes()[:200]):
        refused = client.post("/api/uploads", content=data)
        assert refused.status_code == 400 and "\n" not in refused.json()["error"]
    assert client.get("/api/uploads/..%2F..%2Fx").status_code == 404
    assert client.get("/api/jobs/none").status_code == 404 and os.listdir(jobs.root / "workbench") == ["uploads"]
