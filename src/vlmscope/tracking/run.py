"""Tracked runs, to which tasks log: in an MLflow store, or nowhere."""

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError
from vlmscope.core.launch import program
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
    from pytorch_lightning.loggers.logger import Logger

_LOG = logging.getLogger(__name__)
_ID_FILE = ".mlflow_run_id"
_PARAMS_AT_ONCE = 100  # MLflow's limits for one request
POINTS_AT_ONCE = 1000
_OF_LAYER = re.compile(r"(?:layers/)?(?P<name>.+)/layer_(?P<number>\d+)")
_BY_LAYER = "by_layer/"  # before the name of a metric whose step is the layer
_PAUSE = 30.0  # seconds after a failure in which the store is left alone


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

    def lightning_logger(self) -> "Logger":
        """A logger for a Lightning Trainer that writes into this run and never ends it."""
        from vlmscope.tracking.lightning import RunLogger

        return RunLogger(self)


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
                for key, value, now, step in self._points[:POINTS_AT_ONCE]
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
