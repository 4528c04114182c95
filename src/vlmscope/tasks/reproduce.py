"""Run every experiment that needs no training, compare its numbers with their ranges, and show all on one page.

Each tagged experiment is composed, and run once in a process of its own. The state of a job is in `.reproduce/` of the
run folder: `<label>.json`, and a lock that is held while its process lives, even after this one was killed: such a
process finishes its work, which then counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from tqdm import tqdm

from vlmscope.config import AppConfig
from vlmscope.config.catalog import first_comment, reproducible
from vlmscope.config.resolve import CONFIG_ERRORS, one_line, quote, suggestion, to_app_config
from vlmscope.config.schema import TranscoderSetConfig, numbers_of
from vlmscope.config.wiring import model_origin, study_digest, transcoder_origin
from vlmscope.core.artifacts import files_digest, read_json, shipped, write_json, write_text
from vlmscope.core.errors import CheckFailed, UserError
from vlmscope.core.launch import program
from vlmscope.core.results import Reproduced, toothless
from vlmscope.data.images import png_bytes
from vlmscope.metrics.rates import RULE, half_width, suggested_range
from vlmscope.report.page import Card, Cards, Experiments, ReportPage, Text, duration, mapping_table
from vlmscope.report.pictures import decode, enlarge
from vlmscope.tasks.settings import ExperimentSettings, RunContext
from vlmscope.tracking.client import git_state, package_versions
from vlmscope.tracking.run import started_by

# Overrides of this task, which are not passed on; and settings on which no number depends.
_OWN = ("task=", "task.", "hydra", "experiment=", "name=")
_NO_NUMBER = ("reproduce", "paper", "figure", "headline", "tracking", "trainer")
_METRICS = "metrics.json"
_PACKAGE = Path(__file__).resolve().parents[1]
_GRACE = 3.0  # seconds in which a process that got the user's Ctrl-C too ends by itself
_PATIENCE = 30.0  # seconds for it to clean up after SIGINT


@dataclass(frozen=True)
class Job:
    """One experiment under one seed, composed to `cfg`; `label` names its folder.

    `digest` is of configuration, code, assets and packages: the same digest, the same numbers.
    """

    name: str
    label: str
    question: str
    overrides: tuple[str, ...]
    cfg: AppConfig
    digest: str


@dataclass(frozen=True)
class Ended:
    """How a job ended: exit code, wall seconds (None when not measured), and the problem in one line."""

    code: int
    seconds: float | None
    problem: str = ""


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Run the experiments that this folder does not hold yet, and judge all of them.

    Raises:
        UserError: before any run: an experiment that does not compose or lacks its files.
        CheckFailed: afterwards: an experiment failed or a number lies outside its range.
    """
    results = _run_all(context, planned(cfg, context))
    if cfg.task.seeds:
        write_ranges(context.run_dir, results, cfg.seed)
    print(f"summary: {write_page(context.run_dir, context.overrides, results)}")
    numbers = [(result.label, number) for result in results for number in result.numbers]
    metrics = {
        "reproduce/experiments": float(len(results)),
        "reproduce/failed": float(sum(bool(result.problem) for result in results)),
        "reproduce/numbers": float(len(numbers)),
        "reproduce/out_of_range": float(sum(not number.holds for _, number in numbers)),
        "perf/reproduce_seconds": float(sum(result.seconds or 0.0 for result in results)),
    }
    metrics |= {f"{label}/{n.metric}": n.value for label, n in numbers if n.value is not None}
    wrong = []
    for result in results:
        if result.problem:
            wrong.append(f"{result.label} failed: {result.problem}")
        else:
            wrong += [f"{result.label}: {number.told}" for number in result.numbers if not number.holds]
    if wrong:
        raise CheckFailed("; ".join(wrong), metrics)
    return metrics


def _run_all(context: RunContext, jobs: list[Job]) -> list[Reproduced]:
    """The result of every job, run now or earlier in this folder."""
    run_dir = context.run_dir
    ended = {job.label: finished(run_dir, job.label, job.digest) for job in jobs}
    left = [job for job in jobs if ended[job.label] is None]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} are in {run_dir} already", flush=True)
    env = started_by(context.tracked.run_id, "reproduce")
    with tqdm(left, desc="experiments", unit="experiment") as bar:
        for job in bar:
            bar.set_postfix_str(job.label)
            end = ended[job.label] = run_job(run_dir, job.label, job.digest, job.overrides, env)
            result = _judged(run_dir, job, end)
            good = sum(number.holds for number in result.numbers)
            outcome = f"failed: {end.problem}" if end.problem else f"{good} of {len(result.numbers)} numbers in range"
            bar.write(f"{job.label}: {outcome} ({end.seconds:.0f} s)")
    return [_judged(run_dir, job, end) for job in jobs if (end := ended[job.label]) is not None]


def _judged(run_dir: Path, job: Job, end: Ended) -> Reproduced:
    folder, done = run_dir / job.label, end.code == 0
    metrics = read_json(folder / "metrics.json") if done else {}
    report = f"{job.label}/report.html" if (folder / "report.html").is_file() else None
    return Reproduced(
        job.name, job.label, job.question, job.cfg.paper or "", numbers_of(job.cfg.headline, metrics), end.seconds,
        end.problem, report, key_picture(folder, job.cfg.figure) if done else None,
    )  # fmt: skip


def planned(cfg: AppConfig, context: RunContext) -> list[Job]:
    """All jobs in order, composed with the overrides that the command line passes on.

    Raises:
        UserError: no experiment is tagged, `task.only` names another, or one does not compose or lacks a file.
    """
    hydra = HydraConfig.get()
    if hydra.runtime.choices.get("experiment") not in (None, "null"):
        raise UserError("task=reproduce runs experiments itself; choose them with task.only=[a,b], not experiment=")
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file" and source.path]
    tagged = reproducible(folders)
    if not tagged:
        raise UserError("no experiment says reproduce: true; tag one, with its headline (docs/reproduce.md)")
    for name in cfg.task.only:
        if name not in tagged:
            raise UserError(f"task.only: no experiment {name!r} that says reproduce: true; {suggestion(name, tagged)}")
    shared = [override for override in context.overrides if not override.lstrip("+~").startswith(_OWN)]
    if cfg.task.seeds and any(override.startswith("seed=") for override in shared):
        raise UserError("both seed= and task.seeds= were given; give one of them")
    if cfg.task.seeds and set(cfg.task.seeds) <= {cfg.seed}:
        raise UserError(
            f"task.seeds={list(cfg.task.seeds)}: ranges are tested on seed {cfg.seed}, so others must make them; "
            "give some, as in task.seeds=[1,2,3]"
        )
    shared += [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
    base, jobs = base_digest(), []
    for name in [name for name in tagged if not cfg.task.only or name in cfg.task.only]:
        for seed in cfg.task.seeds or [None]:
            overrides = (f"experiment={name}", *shared, *([] if seed is None else [f"seed={seed}"]))
            composed = _composed(name, overrides)
            label = name if seed is None else f"{name}_seed_{seed}"
            digest = work_digest(base, composed)
            jobs.append(Job(name, label, first_comment(tagged[name]), overrides, composed, digest))
    return jobs


def _composed(name: str, overrides: Sequence[str]) -> AppConfig:
    """The experiment's configuration, or a `UserError` where it does not compose or lacks a file."""
    from vlmscope.models.checkpoint import is_hub_id

    try:
        cfg = compose("config", list(overrides), return_hydra_config=True)
        swept = OmegaConf.select(cfg, "hydra.mode")
        with open_dict(cfg):
            del cfg["hydra"]
        app = to_app_config(cfg, overrides)
    except UserError as error:
        raise UserError(f"experiment={name}: {error}") from error
    except CONFIG_ERRORS as error:
        raise UserError(f"experiment={name}: {one_line(error)}") from error
    if swept is not None and swept.name == "MULTIRUN":
        raise UserError(f"experiment={name} is a sweep, which has no numbers of its own; it cannot say reproduce: true")
    paths = {"study.path": app.study.path}
    if app.model.family is None and app.model.hub is None:
        paths["model.path"] = app.model.path
    if isinstance(app.transcoder, TranscoderSetConfig):
        paths["transcoder.path"] = app.transcoder.path
    for key, path in paths.items():
        if path is not None and not Path(path).exists() and not is_hub_id(path):
            raise UserError(f"experiment={name}: {key}={path} is not there; give the folder, or restore assets/")
    return app


def base_digest() -> str:
    """Digest of the code, the shipped assets and the packages that can change a number."""
    digest = hashlib.sha256(json.dumps(package_versions()).encode())
    for folder, pattern in ((_PACKAGE, "*"), (shipped("assets"), "*"), (shipped("conf/experiment"), "*.py")):
        for path in sorted(folder.rglob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def work_digest(base: str, cfg: AppConfig) -> str:
    """Digest of all that an experiment's numbers depend on: `base`, its settings, and the content of its files.

    Without shards, scenes are rendered with seed 0, so that `base` covers them.
    """
    from vlmscope.data.shards import INDEX

    content: list[Any] = []
    if Path(cfg.model.path).is_dir():  # else a model of the hub at a fixed commit, or a tiny one
        content.append(model_origin(cfg))
    if isinstance(cfg.transcoder, TranscoderSetConfig) and Path(cfg.transcoder.path).is_dir():
        content.append(transcoder_origin(cfg))
    content += [study_digest(path) for path in (cfg.study.path, cfg.attribution.labels) if path is not None]
    files = [*(cfg.image or []), *(path for group in cfg.images.values() for path in group)]
    files += [group.path for group in (cfg.pairs, cfg.circuit_spec) if group is not None and group.path is not None]
    content.append(files_digest(Path(path) for path in files))
    index = Path(cfg.data.path or "") / INDEX
    task = cfg.task
    read = isinstance(task, ExperimentSettings) and cfg.data.name == "orrery" and task.reads_shards(cfg)
    shards = index.read_text(encoding="utf-8") if read and index.is_file() else ""
    settings = {key: value for key, value in asdict(cfg).items() if key not in _NO_NUMBER}
    return hashlib.sha256(
        json.dumps([base, settings, shards, content], sort_keys=True, default=str).encode()
    ).hexdigest()


def finished(run_dir: Path, label: str, digest: str) -> Ended | None:
    """How the job ended in this folder before, if it was the same work and succeeded; waits while it runs.

    Raises:
        UserError: a folder of this name is there that is not this task's.
    """
    state, folder = _state(run_dir, label), run_dir / label
    if not state.is_file():
        if folder.exists():
            raise UserError(f"{folder} is there already and not of task=reproduce; choose a new hydra.run.dir")
        return None
    with _lock(run_dir, label):
        before = read_json(state)
        if before["digest"] != digest or before.get("code", 0) != 0 or not (folder / _METRICS).is_file():
            return None
        return Ended(0, before.get("seconds"))


def run_job(run_dir: Path, label: str, digest: str, overrides: Sequence[str], env: Mapping[str, str]) -> Ended:
    """Run one job in `<run_dir>/<label>` and wait for it; its output goes to `console.log` there.

    `digest` is kept for `finished`, `env` is added to the environment. Ctrl-C ends the job's process too.
    """
    folder, state = run_dir / label, _state(run_dir, label)
    with _lock(run_dir, label) as lock:
        if state.is_file() and read_json(state)["digest"] != digest:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(exist_ok=True)
        (folder / _METRICS).unlink(missing_ok=True)
        command = [*_program(), *overrides, f"hydra.run.dir={quote(str(folder))}"]
        if (folder / ".mlflow_run_id").is_file():  # what a killed run of the same work left
            command.append("trainer.resume=true")
        write_json(state, {"digest": digest})
        start = time.perf_counter()
        # Python is to find this very package, installed or not.
        path = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, **env}
        with (folder / "console.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                pass_fds=[lock.fileno()],  # the lock outlives this process
            )  # fmt: skip
            code = _wait(process)
        seconds = time.perf_counter() - start
        problem = "" if code == 0 else _last_words(folder / "console.log", code)
        write_json(state, {"digest": digest, "code": code, "seconds": seconds})
    return Ended(code, seconds, problem)


def _program() -> list[str]:
    """The command that starts vlmscope."""
    return [sys.executable, "-m", "vlmscope"]


def _state(run_dir: Path, label: str) -> Path:
    return run_dir / ".reproduce" / f"{label}.json"


@contextmanager
def _lock(run_dir: Path, label: str) -> Iterator[IO[str]]:
    """A job's lock, held by this process and by those that inherit its file; prints a line when it has to wait."""
    path = run_dir / ".reproduce" / f"{label}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{label} is still running, for another run or one that was killed; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait for a process and return its exit code; on Ctrl-C stop it, first gently, and wait for its end."""
    try:
        return process.wait()
    except BaseException:
        for number, seconds in ((None, _GRACE), (signal.SIGINT, _PATIENCE), (signal.SIGKILL, None)):
            if number is not None:
                process.send_signal(number)
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        raise


def _last_words(log: Path, code: int) -> str:
    """The last `error:` line of a failed process, or the last line of its traceback."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
    return f"{errors[-1] if errors else 'it said nothing'} (exit code {code})"


# The summary page, and the ranges that repeated seeds gave

_THUMB = 380  # pixels of the longer edge: twice the width at which it is shown
_COLOURS = 64
_READING = (
    "The paper studies Gemma-3-4B-it; these numbers are of Orrery, a small model of the same classes whose tasks "
    "mirror the paper's case studies. So what can agree is the finding, not the figure.",
    "A range comes from three other seeds of the pictures, pairs and controls on these assets, widened by the interval "
    "of one run or the spread between them (docs/reproduce.md). It is meant to hold a seed that did not make it and to "
    "be missed by a broken build.",
)


def key_picture(folder: Path, figure: str | None) -> bytes | None:
    """A small PNG of the figure that the experiment names, else of the first that it drew; None without one."""
    named = folder / "figures" / figure if figure is not None else None
    files = [named] if named is not None and named.is_file() else sorted(folder.joinpath("figures").glob("*.png"))
    if not files:
        return None
    return png_bytes(enlarge(decode(files[0].read_bytes()), _THUMB).quantize(_COLOURS))


def write_page(run_dir: Path, overrides: Sequence[str], results: Sequence[Reproduced]) -> Path:
    """Write summary.html; returns its path."""
    numbers = [number for result in results for number in result.numbers if not result.problem]
    good, count = sum(number.holds for number in numbers), len(numbers)
    failed = sum(bool(result.problem) for result in results)
    off = [result.label for result in results if not result.holds]
    total = duration(sum(result.seconds or 0.0 for result in results))
    machine = _machine()
    summary = f"{len(results)} experiments ran and all {count} headline numbers are within their ranges"
    if off:
        summary = (
            f"{len(off)} of {len(results)} experiments did not come out as stated ({', '.join(off)}); "
            f"{good} of {count} headline numbers are within their ranges"
        )
    cards = (
        Card(
            "experiments as stated", f"{len(results) - len(off)} of {len(results)}", f"{failed} failed" * bool(failed)
        ),
        Card("numbers in range", f"{good} of {count}", "against the ranges that their files state"),
        Card("time", total, f"{os.cpu_count()} cores, one experiment after another"),
    )
    note = (
        "What is out of range comes first. Small print: 95 % interval, and the control: the same with matched "
        "random features, or in random order (the hollow diamond)."
    )
    page = ReportPage(
        title="What the paper reports, what Orrery shows",
        question=(
            "Every experiment that needs no training, run on the shipped model and transcoders, each headline number "
            "held against the range that its file states."
        ),
        summary=f"{summary}. {total} on {machine['processor']}.",
        sections=(
            Cards("In short", cards),
            Experiments("Experiments", tuple(sorted(results, key=lambda result: result.holds)), note),
            Text("How to read this", _READING),
            mapping_table("Machine and versions", machine, ("what", "here")),
            Text("Run it again", code=" ".join([program(), *overrides])),
        ),
        footer=f"vlmscope · task=reproduce · {run_dir.name}",
    )
    return page.write(run_dir / "summary.html")


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    commit, changed = git_state()
    return {
        "processor": f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "system": platform.system() + " " + platform.machine(),
        "commit": commit + (" with changes" if changed else ""),
        **package_versions(),
    }


def write_ranges(run_dir: Path, results: Sequence[Reproduced], tested: int) -> None:
    """Write ranges.json, and ranges.yaml with blocks that can be pasted into the experiments.

    By experiment and metric: the values of all seeds, the stated range, and the range that the values suggest, with its
    width. Values of the seed `tested`, on which the ranges are judged, make none of them; `holds` says
    whether the suggested range contains these.
    """
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(result.name for result in results):
        runs = [result for result in results if result.name == name and not result.problem]
        for i, stated in enumerate(runs[0].numbers if runs else ()):
            seeds = {run.label: run.numbers[i] for run in runs}
            held_out = seeds.get(f"{name}_seed_{tested}")
            makers = [number for number in seeds.values() if number is not held_out]
            values = [number.value for number in makers if number.value is not None]
            rates = [number.rate for number in makers if number.rate is not None]
            halves = [half_width(rate.value, rate.ci_low, rate.ci_high) for rate in rates]
            made = suggested_range(values, halves, stated.share) if values else None
            tried = None if held_out is None else held_out.value
            table.setdefault(name, {})[stated.metric] = {
                "values": {label: number.value for label, number in seeds.items()},
                "half_widths": halves,
                "stated": [stated.low, stated.high],
                "suggested": list(made or (None, None)),
                "width": made and made[1] - made[0],
                "holds": None if made is None or tried is None else made[0] <= tried <= made[1],
                "says": stated.says,
            }
    write_json(run_dir / "ranges.json", {"rule": RULE, "tested": tested, "experiments": table})
    lines = [f"# {RULE}"]
    for name, metrics in table.items():
        lines += [f"# experiments/{name}.yaml", "headline:"]
        for metric, row in metrics.items():
            low, high = row["suggested"]
            says = json.dumps(row["says"], ensure_ascii=False)  # a quoted string is the same in YAML
            wide = low is not None and toothless(low, high)
            note = "  # too wide to be missed: measure more cases, or say why" * wide
            lines.append(f"  {metric}: {{low: {low}, high: {high}, says: {says}}}{note}")
    write_text(run_dir / "ranges.yaml", "\n".join(lines) + "\n")
