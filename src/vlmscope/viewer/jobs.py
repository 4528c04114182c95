"""Jobs of the workbench: command lines that a page asks for, run one at a time by a worker process.

The worker is a process of its own, so that running out of memory, a crash or a cancelled job does not end the server;
it keeps the model loaded. A job is the same command line that a user could type, and is shown as that; so it leaves a
run folder and a run in MLflow. Nothing that a page sends becomes an argument of its own: every value is checked, and
stands behind its key.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json, read_text, shipped
from vlmscope.core.errors import UserError
from vlmscope.core.launch import program
from vlmscope.core.records import FeatureId
from vlmscope.core.study import SHIPPED_STUDIES, study_folder
from vlmscope.viewer.safety import Refused, inside

SHIPPED = "shipped:"  # begins the name of a picture of assets/pictures
_TASKS = {"trace": "trace", "steer": "steer", "generate": "steer", "find": "find"}
_LONGEST = 20_000  # characters of a prompt
_MOST = 2_000  # features of an edit
_KEPT = 200  # jobs that are remembered
_GRACE = 5.0  # seconds that a cancelled run has to close its files
_BAR = re.compile(r"(?P<text>[^\r\n|]*?):?\s*(?P<percent>\d{1,3})%\|")  # as tqdm draws it
# Settings of task=serve that every job gets: which model, and where it is logged.
PASSED_ON = ("model", "transcoder", "tracking", "trainer.threads")

WORKER = "--worker"  # first argument of the command line that makes it; the second is the number of the pipe
INTERRUPTED = (130, 143)  # exit codes of a command line that a signal ended
FLUSHED = "(the end of this job's output)"


@dataclass
class Job:
    """One job; `progress` is shown while it runs."""

    id: str
    task: str  # as the page names it
    argv: list[str]
    folder: Path
    command: str
    status: str = "queued"  # running, done, failed, cancelled
    progress: dict[str, Any] = field(default_factory=lambda: {"text": "waiting", "fraction": None})
    error: str | None = None
    result: Any = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=30))  # the last that it printed

    @property
    def open(self) -> bool:
        return self.status in ("queued", "running")


class Jobs:
    """Queues jobs, and runs them in a worker that is started for the first one."""

    def __init__(self, root: Path, passed_on: Sequence[str] = (), worker: Sequence[str] | None = None) -> None:
        """`passed_on` are overrides for every job, `worker` the command line of the process."""
        self.root, self.passed_on = root, list(passed_on)
        self.worker = list(worker or (sys.executable, "-m", "vlmscope", WORKER))
        self._jobs: dict[str, Job] = {}
        self._queue: deque[Job] = deque()
        self._wake = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._events: Any = None
        self._thread: threading.Thread | None = None
        self._flushed = threading.Event()
        self._closed = False

    # ---- what routes call

    def start(self, request: Mapping[str, Any]) -> dict[str, str]:
        """Queue a job; its id and the equivalent command line."""
        name = request.get("task")
        if not isinstance(name, str) or name not in _TASKS:
            raise Refused(f"task must be one of {', '.join(_TASKS)}", 422)
        arguments = [f"task={_TASKS[name]}", *self.passed_on, *self._arguments(name, request)]
        number, now = secrets.token_hex(4), datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = self.root / _TASKS[name] / f"{now}_{number}"
        command = shlex.join([*shlex.split(program()), *arguments])
        job = Job(number, name, [*arguments, f"hydra.run.dir={folder}"], folder, command)
        with self._wake:
            if sum(other.open for other in self._jobs.values()) >= _KEPT // 2:
                raise Refused("too many jobs wait already; cancel some", 429)
            while len(self._jobs) >= _KEPT:
                self._jobs.pop(next(key for key, old in self._jobs.items() if not old.open))
            self._jobs[number] = job
            self._queue.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_all, daemon=True)
                self._thread.start()
            self._wake.notify()
        return {"id": number, "command": command}

    def get(self, number: str) -> dict[str, Any]:
        """One job as the page reads it."""
        job = self._job(number)
        run = job.folder.relative_to(self.root).as_posix() if job.folder.is_dir() else None
        shown = {key: getattr(job, key) for key in ("id", "task", "status", "progress", "command", "error", "result")}
        return {**shown, "run": run}

    def cancel(self, number: str) -> dict[str, Any]:
        """Take a job from the queue, or end the process that runs it."""
        job = self._job(number)
        with self._wake:
            waiting, running = job in self._queue, job.status == "running"
            if waiting:
                self._queue.remove(job)
            if job.open:
                job.status, job.error = "cancelled", None
        if running:
            self._stop()
        return self.get(number)

    def close(self) -> None:
        """End the worker."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._stop()

    def _job(self, number: str) -> Job:
        if number not in self._jobs:
            raise Refused(f"no job {number[:50]!r}; the server may have been started again", 404)
        return self._jobs[number]

    # ---- from a page's values to arguments

    def _arguments(self, name: str, request: Mapping[str, Any]) -> list[str]:
        picture, prompt = request.get("picture"), request.get("prompt")
        arguments = [] if not picture else [f"image={_shown(self._picture(picture))}"]
        if name != "find" and (not isinstance(prompt, str) or not prompt.strip()):
            raise Refused("no prompt: type a question", 422)
        if isinstance(prompt, str) and prompt.strip():
            if len(prompt) > _LONGEST or "\0" in prompt:
                raise Refused(f"the prompt is longer than {_LONGEST:,} characters", 422)
            arguments.append(f"prompt={prompt}")
        study = self._study(request.get("study"))
        if name == "trace":
            labels = [f"attribution.labels={_shown(study)}"] if study is not None else []
            return [*arguments, *labels, "task.figure=false"]
        if name == "find":
            if study is None:
                raise Refused("no study to search in", 422)
            query = request.get("query")
            if isinstance(query, str) and query.strip() and not picture:
                arguments = [f"query={query[:1000]}"]
            return [*arguments, f"study.path={_shown(study)}", "task.figure=false", "task.count=24"]
        new_tokens = _whole(request.get("new_tokens", 24), "new_tokens", 1, 512)
        controls = 0 if name == "generate" else _whole(request.get("controls", 5), "controls", 0, 100)
        numbers = [f"task.new_tokens={new_tokens}", f"task.controls={controls}"]
        return [*arguments, *_edits(request.get("edits")), *_positions(request.get("positions")), *numbers]

    def _picture(self, name: Any) -> Path:
        """A picture that was uploaded, or one of those that come with vlmscope."""
        if not isinstance(name, str):
            raise Refused("picture must be the name of an uploaded picture", 422)
        if name.startswith(SHIPPED):
            return inside(shipped("assets/pictures"), name.removeprefix(SHIPPED))
        return inside(self.root, name)

    def _study(self, name: Any) -> Path | None:
        if name in (None, ""):
            return None
        if (kept := SHIPPED_STUDIES.get(str(name).rstrip(":"))) is not None:
            return study_folder(shipped(kept))
        return study_folder(inside(self.root, str(name)))

    # ---- the worker

    def _run_all(self) -> None:
        """Run jobs until the server ends; the thread of the queue."""
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                job = self._queue.popleft()
                job.status = "running"
            try:
                self._run(job)
            except Exception as error:  # the queue must go on, whatever a job meets
                job.error = f"{type(error).__name__}: {error}"
            with self._wake:
                if job.status != "cancelled":
                    job.status = "failed" if job.error else "done"

    def _run(self, job: Job) -> None:
        process, events = self._started(job)
        self._flushed.clear()
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write((json.dumps(job.argv) + "\n").encode())
            process.stdin.flush()
        job.progress = {"text": "running", "fraction": None}
        while (line := events.readline()) and (text := json.loads(line).get("text")) is not None:
            job.progress = {"text": text, "fraction": None}
        self._flushed.wait(_GRACE if line else 0)  # what it printed is read by another thread
        if not line:
            code = process.wait()
            self._process = None
            if job.status != "cancelled":
                job.error = _ended(code)
            return
        code = json.loads(line)["done"]
        if code in INTERRUPTED:  # it ends now; the next job must not meet it
            process.wait()
        if code == 0 and job.status != "cancelled":
            job.result = result_of(job)
        elif job.status != "cancelled":
            job.error = next((line[7:] for line in reversed(job.lines) if line.startswith("error: ")), None)
            job.error = job.error or f"task={_TASKS[job.task]} failed: {job.lines[-1] if job.lines else f'code {code}'}"

    def _started(self, job: Job) -> tuple[subprocess.Popen[bytes], Any]:
        """The worker, started if there is none; from now on what it prints is `job`'s."""
        if self._process is None or self._process.poll() is not None:
            job.progress = {"text": "starting the worker, which imports torch", "fraction": None}
            reading, writing = os.pipe()
            command = [*self.worker, str(writing)]
            with os.fdopen(writing, "wb"):
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing],
                    start_new_session=True,  # Ctrl-C is the server's, which ends the worker itself
                )
            self._events = os.fdopen(reading, "r", encoding="utf-8")
            self._printing = job
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
            if job.status == "cancelled":  # while it was being started
                self._stop()
            self._events.readline()  # that it is ready, or that it ended
        self._printing = job
        return self._process, self._events

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Keep what the worker prints: lines, and the states of progress bars."""
        assert process.stdout is not None
        rest = b""
        while part := os.read(process.stdout.fileno(), 1 << 16):
            *lines, rest = re.split(rb"[\r\n]+", (rest + part)[-(1 << 16) :])
            texts, job = [raw.decode("utf-8", "replace").strip() for raw in (*lines, rest)], self._printing
            for number, text in enumerate(texts):
                if text == FLUSHED and number < len(lines):
                    self._flushed.set()
                elif bar := _BAR.match(text):  # also one that has no line's end yet
                    job.progress = {"text": bar["text"].strip(), "fraction": int(bar["percent"]) / 100}
                elif text and number < len(lines):
                    job.lines.append(text[:500])

    def _stop(self) -> None:
        """End the worker, at first so that its run can close its files and its record in MLflow."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def shipped_pictures() -> list[dict[str, str]]:
    """Pictures of `assets/pictures`, in the order of its README, each with the first question that suits it."""
    folder = shipped("assets/pictures")
    table = re.compile(r"^\| ([\w., ]+\.png) \| (.+?) \|$", re.MULTILINE)
    asked: dict[str, str] = {}
    for names, questions in table.findall(read_text(folder / "README.md")):
        asked |= {name.strip(): questions.partition("?")[0] + "?" for name in names.split(",")}
    order = [*asked, *sorted(path.name for path in folder.glob("*.png") if path.name not in asked)]
    named = (
        (name, {"picture": SHIPPED + name, "name": Path(name).stem, "url": f"api/pictures/{name}"}) for name in order
    )
    return [{**body, "prompt": asked.get(name, "")} for name, body in named]


def _ended(code: int) -> str:
    """What to say of a worker that ended within a job."""
    if code == -signal.SIGKILL:
        return (
            "the system killed the worker, most likely since memory ran out: choose a smaller picture or model, or "
            "fewer attribution.max_nodes; the next job starts another worker"
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the worker ended in the middle of the job ({how}); the next job starts another"


def result_of(job: Job) -> Any:
    """What a finished job's page shows, from its run folder."""
    if job.task == "find":
        found = read_json(job.folder / "find.json")["features"]
        return {"rows": [{"feature": str(FeatureId(row["layer"], row["index"])), "why": row["why"]} for row in found]}
    if job.task == "trace":
        return None
    body = read_json(job.folder / "steer.json")
    (mode,) = body["modes"].values()
    top, effects = mode["next_token"], mode["metrics"]
    metrics = read_json(job.folder / "metrics.json")
    controls = []
    for control in mode["controls"]:
        answers = {word.strip(): count for word, count in control["says"]}
        shown = {key: control[key] for key in ("draws", "changed", "kl")}
        name = control["name"].replace("_", " ")
        controls.append({"name": name, **shown, "answer": next(iter(answers), ""), "answers": answers})
    return {
        "features": len(body["features"]),
        "active": int(metrics["steer/features_active"]),
        "answer": {side: max(top, key=lambda row, s=side: row[s])["token"].strip() for side in ("before", "after")},
        "top": top,
        "kl": effects["steer/free/kl"],
        "controls": controls,
        "text": body["answer"],
    }


def _whole(value: Any, name: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise Refused(f"{name} must be a whole number from {least} to {most}", 422)
    return value


def _edits(edits: Any) -> list[str]:
    """`task.features` and `task.factors` of `[{feature, action, value}]`."""
    groups: dict[str, dict[FeatureId, float]] = {"set": {}, "scale": {}}
    if not isinstance(edits, list) or not 1 <= len(edits) <= _MOST:
        raise Refused(f"choose 1 to {_MOST} features to edit", 422)
    for edit in edits:
        try:
            feature, value = FeatureId.parse(edit["feature"]), float(edit["value"])
            chosen = groups[edit["action"]]
        except (LookupError, TypeError, ValueError, AttributeError, UserError) as error:
            raise Refused(
                "an edit must have a feature such as L5/709, the action set or scale, and a value", 422
            ) from error
        if not abs(value) < 1e9:  # also NaN
            raise Refused(f"{feature}: the value {value} is too large", 422)
        chosen[feature] = value
    if both := groups["set"].keys() & groups["scale"].keys():
        raise Refused(f"{min(both)} is to be set and scaled; choose one", 422)
    keys = {"set": "task.features", "scale": "task.factors"}
    return [
        f"{keys[action]}={{{', '.join(f'{feature}: {value:g}' for feature, value in chosen.items())}}}"
        for action, chosen in groups.items()
        if chosen
    ]


def _positions(positions: Any) -> list[str]:
    if positions is None:
        return []
    if not isinstance(positions, list) or not 1 <= len(positions) <= 100_000:
        raise Refused("positions must be a list of positions of the prompt", 422)
    return [f"task.positions={[_whole(place, 'a position', 0, 10_000_000) for place in positions]}".replace(" ", "")]


def _shown(path: Path) -> str:
    """A path as a command line shows it: relative to the current folder where it lies below."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def run_worker(main: Callable[[Sequence[str]], int], pipe: int) -> int:
    """Be the worker process: run command lines with `main` until standard input ends, or one was interrupted.

    It reads a JSON list a line from standard input, and writes what happens to a pipe, a JSON object a line: `ready`,
    what it is doing (`text`), and the exit code of each command line, `done`. What the command lines print goes to
    standard output, as ever.
    """

    def say(**event: object) -> None:
        os.write(pipe, (json.dumps(event) + "\n").encode())

    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # the system takes this process first when memory runs out, not the server
    import vlmscope.attribution.trace
    import vlmscope.models.loading  # noqa: F401  (what takes seconds, before the first job is there)
    from vlmscope.config.wiring import keep_loaded

    keep_loaded(lambda text: say(text=text))
    say(ready=True)
    for line in sys.stdin:
        code = main(json.loads(line))
        sys.stderr.flush()
        print(f"\n{FLUSHED}", flush=True)
        say(done=code)
        if code in INTERRUPTED:  # interrupted in the middle of something: the next job gets a new process
            return code
    return 0
