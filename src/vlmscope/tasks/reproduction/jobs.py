"""One experiment of task=reproduce in a process of its own: started, waited for, and not run twice.

What is known of a job lies in `.reproduce/` of the run folder: `<label>.json`, and a lock that is held as long as the
job's process lives, even when this one was killed: such a process finishes its work, which then counts.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from vlmscope.config.catalog import project_root
from vlmscope.config.resolve import quote
from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError

_GRACE = 3.0  # seconds in which a process that got the user's Ctrl-C too ends by itself
_PATIENCE = 30.0  # seconds for it to put its things in order
_METRICS = "metrics.json"


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code, wall seconds (None when nobody measured), and what was wrong, in one line."""

    code: int
    seconds: float | None
    problem: str = ""


def finished(run_dir: Path, label: str, digest: str) -> Ended | None:
    """How the job ended in this folder before, when it was the same work and it succeeded; waits while it runs.

    Raises:
        UserError: a folder of this name is there that is not this task's.
    """
    state, folder = _state(run_dir, label), run_dir / label
    if not state.is_file():
        if folder.exists():
            raise UserError(f"{folder} is there already and not of task=reproduce; choose a new hydra.run.dir")
        return None
    with _lock(run_dir, label):
        found = read_json(state)
        if found["digest"] != digest or found.get("code", 0) != 0 or not (folder / _METRICS).is_file():
            return None
        return Ended(0, found.get("seconds"))


def run_job(run_dir: Path, label: str, digest: str, overrides: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Run one job to its end. What it prints goes to `<label>/console.log`.

    Args:
        run_dir: the folder of the whole run.
        label: the job's folder in it.
        digest: of the work, kept for `finished`.
        overrides: of its command line.
        env: additions to the environment.

    Raises:
        KeyboardInterrupt: Ctrl-C; the job's process has ended then.
    """
    folder = run_dir / label
    with _lock(run_dir, label) as lock:
        _make_room(run_dir, label, digest)
        # What a killed run of the same work left, it goes on with, in MLflow too.
        again = ["trainer.resume=true"] if (folder / ".mlflow_run_id").is_file() else []
        command = [*_program(), *overrides, f"hydra.run.dir={quote(str(folder))}"]
        write_json(_state(run_dir, label), {"digest": digest})
        start = time.perf_counter()
        with (folder / "console.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *again], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **env},
                pass_fds=[lock.fileno()],
            )  # fmt: skip
            code = _wait(process)
        seconds = time.perf_counter() - start
        problem = "" if code == 0 else _last_words(folder / "console.log", code)
        write_json(_state(run_dir, label), {"digest": digest, "code": code, "seconds": seconds})
    return Ended(code, seconds, problem)


def _program() -> list[str]:
    """The command line, as the user has it."""
    return [sys.executable, str(project_root() / "run.py")]


def _state(run_dir: Path, label: str) -> Path:
    return run_dir / ".reproduce" / f"{label}.json"


@contextmanager
def _lock(run_dir: Path, label: str) -> Iterator[IO[str]]:
    """Held by this process and by those that inherit it; waits, and says so, while another holds it."""
    path = run_dir / ".reproduce" / f"{label}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{label} is still at work for a run that was killed, or for another; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _make_room(run_dir: Path, label: str, digest: str) -> None:
    """An empty folder for new work, the same folder without its result for work that was broken off."""
    folder, state = run_dir / label, _state(run_dir, label)
    if state.is_file() and read_json(state)["digest"] != digest:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(exist_ok=True)
    (folder / _METRICS).unlink(missing_ok=True)


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code. On Ctrl-C the process gets it too, if it has not already, and is waited for."""
    try:
        return process.wait()
    except BaseException:
        for send, seconds in ((None, _GRACE), (signal.SIGINT, _PATIENCE), (signal.SIGKILL, None)):
            if send is not None:
                process.send_signal(send)
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        raise


def _last_words(log: Path, code: int) -> str:
    """What a failed process said last: its `error:` line, or the last line of its traceback."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    return f"{said[-1] if said else 'it said nothing'} (exit code {code})"
