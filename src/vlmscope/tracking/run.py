"""Tracked runs, to which tasks log: in an MLflow store, or nowhere; and runs inside a run.

Those are the jobs of a sweep, whose parent is opened before the first job and closed with a status that summarises all,
and runs that another run starts in other processes.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError
from vlmscope.core.launch import program
from vlmscope.core.results import SweepJob, job_rows, table_columns
from vlmscope.tracking import client as provenance
from vlmscope.tracking.client import (
    MAX_VALUE,
    PATIENCE,
    WAIT,
    Unreachable,
    check_store,
    clean_key,
    clean_text,
    open_client,
    patiently,
    sqlite_file,
    to_params,
)

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

_LOG = logging.getLogger(__name__)
_ID_FILE = ".mlflow_run_id"
_PARAMS_AT_ONCE = 100  # MLflow's limits for one request
_POINTS_AT_ONCE = 1000
_OF_LAYER = re.compile(r"(?:layers/)?(?P<name>.+)/layer_(?P<number>\d+)")
_BY_LAYER = "by_layer/"  # before the name of a metric whose step is the layer
_PAUSE = 30.0  # seconds after a failure in which the store is left alone
# A launcher may run jobs in other processes, so the parent's id travels in the environment.
_PARENT = "VLMSCOPE_MLFLOW_PARENT"
_URI = "VLMSCOPE_MLFLOW_URI"
_OVERRIDES = "VLMSCOPE_MLFLOW_OVERRIDES"
# For a run that another run started: the id of that run and the study of both.
_STARTER = "VLMSCOPE_MLFLOW_STARTER"
_STUDY = "VLMSCOPE_MLFLOW_STUDY"


@dataclass
class TrackingConfig:
    """`uri` is an MLflow tracking URI, such as `sqlite:///outputs/mlflow.db` (relative to the current folder)."""

    enabled: bool = True
    uri: str = "sqlite:///outputs/mlflow.db"


@dataclass(frozen=True)
class RunInfo:
    """Description of a run before it starts.

    `experiment` is its study, `params` the settings that decide its result, `parent_id` the run of its sweep.
    """

    experiment: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    parent_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class TrackedRun:
    """The calls that a task may make; this base keeps nothing. Metrics have names such as `val/fvu`."""

    run_id: str | None = None  # MLflow's; None while the store has not answered

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a training step, by default the latest that this run logged (0 before any)."""

    def log_results(self, metrics: Mapping[str, float]) -> None:
        """Log the final numbers. Those of layers, `layers/fvu/layer_07`, become one curve by layer: `by_layer/fvu`."""

    def log_artifacts(self, path: str | Path) -> None:
        """Copy a file, or all files below a folder, into the run's artifacts. Hidden files are left out."""

    def link(self) -> str:
        """The address of the run in MLflow's user interface; "" where there is none."""
        return ""


class MlflowRun(TrackedRun):
    """A run in an MLflow store. What is logged is buffered until the store takes it, so that no work waits for long.

    Each call that logs also tries to write, for WAIT seconds, but not in the `_PAUSE` after a failure; at the end it
    tries for PATIENCE seconds. A failure gives one warning when it begins, and one at the end if it lasts.
    """

    def __init__(self, uri: str, run_dir: Path, info: RunInfo, resume: bool) -> None:
        self._client: MlflowClient | None = None
        self._uri, self._run_dir, self._info, self._resume = uri, run_dir, info, resume
        self._started = int(time.time() * 1000)
        self._step = 0  # the latest, for metrics without one: final figures at step 0 would bend their curves back
        self._params: Mapping[str, Any] | None = info.params
        self._points: list[tuple[str, float, int, int | None]] = []
        self._files: dict[Path, str] = {}
        self._status: str | None = None
        self._next, self._warned = 0.0, False
        check_store(uri)
        self._write()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = int(time.time() * 1000)
        if step is None and (self.run_id is not None or not self._resume):
            step = self._step
        self._step = max(self._step, step or 0)
        self._points.extend((clean_key(key), float(value), now, step) for key, value in metrics.items())
        self._write()

    def log_results(self, metrics: Mapping[str, float]) -> None:
        now, rest = int(time.time() * 1000), {}
        for key, value in metrics.items():
            layer = _OF_LAYER.fullmatch(key)
            if layer is None:
                rest[key] = value
            else:
                self._points.append((clean_key(_BY_LAYER + layer["name"]), float(value), now, int(layer["number"])))
        self.log_metrics(rest)

    def link(self) -> str:
        return "" if self.run_id is None else run_link(self._uri, self.run_id)

    def log_artifacts(self, path: str | Path) -> None:
        """Copy a file, or every visible file below a folder, keeping subfolders.

        Folders of other runs inside are left out, since those runs have their own artifacts.
        """
        path = Path(path)
        root = path if path.is_dir() else path.parent
        inner_runs = {file.parent for file in root.rglob(_ID_FILE)} - {root} if path.is_dir() else set()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = file.relative_to(root)
            hidden = any(part.startswith(".") for part in relative.parts)
            if file.is_file() and not hidden and not inner_runs.intersection(file.parents):
                self._files[file] = relative.parent.as_posix()
        self._write()

    def close(self, status: str) -> None:
        """Write what is left and end the run; one warning lists what the store never took."""
        self._status, ended = status, int(time.time() * 1000)
        try:
            # Whoever kills a process waits for some seconds only.
            patiently(self._uri, lambda: self._send(ended), WAIT if status == "KILLED" else PATIENCE)
        except (Unreachable, UserError) as error:
            lacks = f"{len(self._points)} points of curves, {len(self._files)} files and the status {status}"
            where = f"{self._run_dir} has metrics.json and config.yaml"
            _LOG.warning("not in MLflow: %s (%s); %s", lacks, error, where)

    def _write(self) -> None:
        """Write the buffers, unless the store failed a moment ago."""
        if time.monotonic() < self._next:
            return
        try:
            patiently(self._uri, self._send, WAIT)
        except (Unreachable, UserError) as error:
            if isinstance(error, UserError) and self._client is None:
                raise  # the store cannot be used at all, which is known at the start of the run
            self._next = time.monotonic() + _PAUSE
            if not self._warned:
                _LOG.warning("%s does not take what is logged (%s); it is kept and written later", self._uri, error)
            self._warned = True

    def _send(self, ended: int | None = None) -> None:
        """Write the buffers, each part removed once it is written, so that a retry continues from there."""
        client = self._client = self._client or open_client(self._uri)
        from mlflow.entities import Metric

        if self.run_id is None:
            run_id = start_run(client, self._uri, self._run_dir, self._info, self._resume, self._started)
            self._step = max(self._step, _latest_step(client, run_id) if self._resume else 0)
            self.run_id = run_id
        if self._params is not None:
            _send_params(client, self.run_id, self._params)
            self._params = None
        while self._points:
            entries = [
                Metric(key, value, now, self._step if step is None else step)
                for key, value, now, step in self._points[:_POINTS_AT_ONCE]
            ]
            client.log_batch(self.run_id, metrics=entries)
            del self._points[: len(entries)]
        for file, folder in list(self._files.items()):
            copy_artifact(client, self.run_id, file, folder)
            del self._files[file]
        if self._status is not None:
            client.set_terminated(self.run_id, self._status, ended)


def copy_artifact(client: "MlflowClient", run_id: str, file: Path, folder: str) -> None:
    """Copy a file into a folder of a run's artifacts ("." is their root); nothing if the file no longer exists."""
    if file.exists():
        client.log_artifact(run_id, str(file), None if folder == "." else folder)


def _send_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    """Log the configuration. MLflow's parameters are final, so one that changed on a resume becomes a tag."""
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    current = to_params(params)
    new = [Param(key, value) for key, value in current.items() if key not in known]
    changed = [
        RunTag(clean_key(f"changed.{key}"), value) for key, value in current.items() if known.get(key, value) != value
    ]
    for start in range(0, len(new), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=new[start : start + _PARAMS_AT_ONCE])
    if changed:
        client.log_batch(run_id, tags=changed)


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = sqlite_file(uri)
        # MLflow would put artifacts of a SQLite store below the current folder; they belong next to the database.
        folder = database and (database.parent.resolve() / "mlflow_artifacts" / clean_key(name)).as_uri()
        try:
            return client.create_experiment(name, artifact_location=folder)
        except MlflowException:
            # Another job of the same sweep may have created it since.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return experiment.experiment_id


def _existing_run(client: "MlflowClient", run_dir: Path) -> "Run | None":
    from mlflow.exceptions import MlflowException

    id_file = run_dir / _ID_FILE
    if not id_file.is_file():
        return None
    try:
        run = client.get_run(id_file.read_text(encoding="utf-8").strip())
    except MlflowException:
        _LOG.warning("%s names a run that the tracking store does not have; a new run is made", id_file)
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _latest_step(client: "MlflowClient", run_id: str) -> int:
    """The latest step of a resumed run, which may have nothing left to train."""
    names = [name for name in client.get_run(run_id).data.metrics if not name.startswith(_BY_LAYER)]
    return max((entry.step for name in names for entry in client.get_metric_history(run_id, name)), default=0)


def run_link(uri: str, run_id: str) -> str:
    """The address of a run: on its tracking server, or in the user interface of a local store; "" if it is locked."""
    try:
        experiment = patiently(uri, lambda: open_client(uri).get_run(run_id).info.experiment_id, WAIT)
    except (Unreachable, UserError):
        return ""
    server = uri.rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    address = f"{server}/#/experiments/{experiment}/runs/{run_id}"
    if uri.startswith("http"):
        return address
    make = uri == TrackingConfig.uri and program() == "python run.py"
    return f"{address} (first: {'make mlflow' if make else f'mlflow ui --backend-store-uri {clean_text(uri)}'})"


def start_run(
    client: "MlflowClient", uri: str, run_dir: Path, info: RunInfo, resume: bool, started: int | None = None
) -> str:
    """Create the MLflow run, or with `resume` set the run of `run_dir` to running again; returns its id.

    `started` is when its work began, in milliseconds since 1970 (default: now).
    """
    tags = {"run_dir": str(run_dir.resolve()), "overrides": " ".join(info.overrides)[:MAX_VALUE], **provenance.tags()}
    if info.parent_id is not None:
        tags["mlflow.parentRunId"] = info.parent_id
    tags = {key: clean_text(value) for key, value in (tags | dict(info.tags)).items()}
    run = _existing_run(client, run_dir) if resume else None
    if run is not None:
        from mlflow.entities import RunTag

        client.update_run(run.info.run_id, status="RUNNING")
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    else:
        experiment = _experiment_id(client, uri, clean_text(info.experiment))
        run = client.create_run(experiment, started, tags, clean_text(info.name))
        write_text(run_dir / _ID_FILE, run.info.run_id + "\n")
    return run.info.run_id


@contextmanager
def open_run(config: TrackingConfig, run_dir: Path, info: RunInfo, *, resume: bool = False) -> Iterator[TrackedRun]:
    """A tracked run around the work: FINISHED at the end, FAILED on an exception, KILLED on Ctrl-C or a kill.

    With `resume`, the MLflow run of `run_dir` continues. A locked or unreachable store never stops the work.

    Raises:
        UserError: the tracking store cannot be used.
    """
    if not config.enabled:
        yield TrackedRun()
        return
    run = MlflowRun(config.uri, run_dir, info, resume)
    status = "FAILED"
    try:
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        run.close(status)


# Runs inside a run


def note_overrides(overrides: Sequence[str]) -> None:
    """Keep the sweep's command line for `job_name`, whether the sweep is tracked or not."""
    os.environ[_OVERRIDES] = json.dumps(list(overrides))


def open_parent(config: TrackingConfig, sweep_dir: str | Path, experiment: str, overrides: Sequence[str]) -> str:
    """Open the parent run, or continue that of an earlier sweep in this folder; returns its id.

    Raises:
        UserError: the store cannot be used, or stays locked.
    """
    uri, folder = config.uri, Path(sweep_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_store(uri)
    info = RunInfo(experiment, folder.name, overrides=overrides, tags={"experiment": experiment, "sweep": folder.name})
    try:
        parent = patiently(uri, lambda: start_run(open_client(uri), uri, folder, info, resume=True), PATIENCE)
    except Unreachable as error:
        raise UserError(
            f"tracking.uri={uri} does not take the parent of this sweep ({error}); try again, or add tracking=none"
        ) from error
    os.environ |= {_PARENT: parent, _URI: uri}
    return parent


def parent_id() -> str:
    """The parent of a job.

    Raises:
        UserError: there is none. Hydra only warns when opening it fails, and orphans would look like single runs.
    """
    if _PARENT not in os.environ:
        raise UserError(
            "this job's sweep has no tracked parent (see the warnings above); mend that or add tracking=none"
        )
    return os.environ[_PARENT]


def started_by(run_id: str | None, study: str) -> dict[str, str]:
    """Environment variables for processes whose runs are children of the run `run_id`; none without it."""
    return {} if run_id is None else {_STARTER: run_id, _STUDY: study}


def starter() -> tuple[str, str] | None:
    """The parent's id and the study of a run that another run started, else None."""
    run_id, study = os.environ.get(_STARTER), os.environ.get(_STUDY)
    return None if run_id is None or study is None else (run_id, study)


def job_name(settings: Sequence[str], fallback: str) -> str:
    """A job's name: its settings without those of the sweep's command line that all jobs share.

    Legends of compared runs show only the start of a name, so `transcoder.k=4` is shortened to `k=4` unless another key
    of the job ends in `k`.
    """
    # Of a key that is there twice, the last value counts.
    last = {text.partition("=")[0]: text for text in json.loads(os.environ.get(_OVERRIDES, "[]"))}
    shared = set(last.values())
    distinct = [setting for setting in settings if setting not in shared] or settings
    parts = [setting.partition("=") for setting in distinct]
    leaves = [key.rpartition(".")[2] for key, _, _ in parts]
    short = [
        f"{key if leaves.count(leaf) > 1 else leaf}{equals}{value}"
        for leaf, (key, equals, value) in zip(leaves, parts, strict=True)
    ]
    return ", ".join(short)[:200] or fallback


def log_to_parent(jobs: Sequence[SweepJob], files: Sequence[Path], root: Path) -> str:
    """Log a sweep into its parent run, and return the address of that run; without a parent, do nothing.

    `files` below `root` become artifacts, with their subfolders. The table of all jobs becomes an MLflow table, and
    each metric a curve: over the swept setting if that is one whole number, else over the job's number.
    """
    whole = [name for name in table_columns(jobs) if not name.startswith("layers/")]
    rows = job_rows(jobs)
    table = {"columns": whole, "data": [[row.get(name) for name in whole] for row in rows]}
    keys = whole[: whole.index("status")]
    values = [str(row.get(keys[0])) for row in rows] if len(keys) == 1 else []
    steps = [int(text) for text in values] if values and all(map(str.isdigit, values)) else list(range(len(jobs)))

    def log(uri: str) -> None:
        from mlflow.entities import Metric

        client, now = open_client(uri), int(time.time() * 1000)
        for file in files:
            copy_artifact(client, parent_id(), file, file.relative_to(root).parent.as_posix())
        # Not `log_table`, which appends to the table of an earlier run of this sweep.
        client.log_text(parent_id(), json.dumps(table), "sweep.json")
        client.set_tag(parent_id(), "mlflow.loggedArtifacts", json.dumps([{"path": "sweep.json", "type": "table"}]))
        points = [
            Metric(clean_key(name), float(value), now, step)
            for job, step in zip(jobs, steps, strict=True)
            for name, value in (job.metrics or {}).items()
            if name in whole
        ]
        for start in range(0, len(points), _POINTS_AT_ONCE):
            client.log_batch(parent_id(), metrics=points[start : start + _POINTS_AT_ONCE])

    _at_the_end(log, "the sweep's table and figure", PATIENCE)
    return run_link(os.environ[_URI], parent_id()) if _URI in os.environ else ""


def close_parent(*, killed: bool = False, failed: bool = False) -> None:
    """End the parent run, if one is open: KILLED or FAILED as passed or if a job was, else FINISHED."""

    def close(uri: str) -> None:
        client = open_client(uri)
        run_id = parent_id()
        experiment = client.get_run(run_id).info.experiment_id
        jobs = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", max_results=50000)
        statuses = {job.info.status for job in jobs}
        if killed or "KILLED" in statuses:
            status = "KILLED"
        elif failed or statuses - {"FINISHED"}:
            status = "FAILED"
        else:
            status = "FINISHED"
        client.set_terminated(run_id, status)

    _at_the_end(close, "the status of the sweep", WAIT if killed else PATIENCE)
    for name in (_PARENT, _URI, _OVERRIDES):
        os.environ.pop(name, None)


def _at_the_end(work: Callable[[str], None], what: str, seconds: float) -> None:
    """Do `work` with the URI of an open parent; one warning if the store does not take it."""
    uri = os.environ.get(_URI)
    if uri is None:
        return
    try:
        patiently(uri, lambda: work(uri), seconds)
    except (Unreachable, UserError) as error:
        _LOG.warning(
            "not in MLflow: %s (%s); the sweep's folder has its table and each job's metrics.json", what, error
        )
