"""Tracked runs: what tasks log to, with MLflow behind it or nothing."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vlmscope.core.artifacts import write_text
from vlmscope.tracking import provenance
from vlmscope.tracking.client import open_client, sqlite_file
from vlmscope.tracking.config import TrackingConfig
from vlmscope.tracking.params import MAX_VALUE, clean_key, to_params

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
    from pytorch_lightning.loggers.logger import Logger

_LOG = logging.getLogger(__name__)
_ID_FILE = ".mlflow_run_id"
_BATCH = 100


class TrackedRun(Protocol):
    """What a task may log. Metrics are floats under the names of the contract, such as `val/fvu`."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, or None when nothing is tracked."""
        ...

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log a (nested) mapping as flat parameters; one that has another value already keeps it."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a training step; without one, at the latest that this run logged (0 before any)."""
        ...

    def log_artifacts(self, path: str | Path) -> None:
        """Copy a file, or all files below a folder, into the run's artifacts. Hidden files are left out."""
        ...

    def lightning_logger(self) -> "Logger":
        """A logger for a Lightning Trainer that writes into this run."""
        ...


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before it starts.

    `experiment` is the study that it belongs to, `params` the resolved configuration, `parent_id` the run of its sweep.
    """

    experiment: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    overrides: Sequence[str] = ()
    parent_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


class NullRun:
    """A run that is not tracked."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Do nothing."""

    def log_artifacts(self, path: str | Path) -> None:
        """Do nothing."""

    def lightning_logger(self) -> "Logger":
        """A Lightning logger that writes nowhere."""
        from vlmscope.tracking.lightning import RunLogger

        return RunLogger(self)


class MlflowRun:
    """A run in an MLflow store."""

    def __init__(self, client: "MlflowClient", run_id: str, step: int = 0) -> None:
        self._client = client
        self._step = step  # the latest; final figures at step 0 would send a curve back to its start
        self.run_id: str | None = run_id
        self._id = run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log new parameters. MLflow's cannot change: one that did since a resume goes into a tag `changed.<name>`."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self._id).data.params
        wanted = to_params(params)
        new = [Param(key, value) for key, value in wanted.items() if key not in known]
        changed = [
            RunTag(clean_key(f"changed.{key}"), value)
            for key, value in wanted.items()
            if key in known and known[key] != value
        ]
        for start in range(0, len(new), _BATCH):
            self._client.log_batch(self._id, params=new[start : start + _BATCH])
        if changed:
            self._client.log_batch(self._id, tags=changed)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers in one transaction; `step` defaults to the latest one."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        step = self._step if step is None else step
        self._step = max(self._step, step)
        entries = [Metric(clean_key(key), float(value), now, step) for key, value in metrics.items()]
        for start in range(0, len(entries), 1000):
            self._client.log_batch(self._id, metrics=entries[start : start + 1000])

    def log_artifacts(self, path: str | Path) -> None:
        """Copy a file, or every file below a folder that is not hidden, keeping subfolders; not those of runs inside,
        which have records of their own.
        """
        path = Path(path)
        root = path if path.is_dir() else path.parent
        inside = {file.parent for file in root.rglob(_ID_FILE)} - {root} if path.is_dir() else set()
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = file.relative_to(root)
            if inside.intersection(file.parents):
                continue
            if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                folder = relative.parent.as_posix()
                self._client.log_artifact(self._id, str(file), None if folder == "." else folder)

    def lightning_logger(self) -> "Logger":
        """A Lightning logger that writes into this run and leaves its status alone."""
        from vlmscope.tracking.lightning import RunLogger

        return RunLogger(self)


def _experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    database = sqlite_file(uri)
    # MLflow would put artifacts of a SQLite store below the current folder; they belong beside the database.
    place = None if database is None else (database.parent.resolve() / "mlflow_artifacts" / clean_key(name)).as_uri()
    try:
        return client.create_experiment(name, artifact_location=place)
    except MlflowException:
        # Another job of the same sweep made it in between.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return found.experiment_id


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
    """The latest step of a run that goes on; it may have nothing left to train."""
    names = client.get_run(run_id).data.metrics
    return max((entry.step for name in names for entry in client.get_metric_history(run_id, name)), default=0)


def start_run(client: "MlflowClient", uri: str, run_dir: Path, info: RunInfo, resume: bool) -> str:
    """Create the MLflow run, or with `resume` set the one that `run_dir` had to running again; returns its id."""
    tags = {"run_dir": str(run_dir.resolve()), "overrides": " ".join(info.overrides)[:MAX_VALUE], **provenance.tags()}
    if info.parent_id is not None:
        tags["mlflow.parentRunId"] = info.parent_id
    tags |= info.tags
    run = _existing_run(client, run_dir) if resume else None
    if run is not None:
        from mlflow.entities import RunTag

        client.update_run(run.info.run_id, status="RUNNING")
        client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    else:
        run = client.create_run(_experiment_id(client, uri, info.experiment), tags=tags, run_name=info.name)
        write_text(run_dir / _ID_FILE, run.info.run_id + "\n")
    return run.info.run_id


@contextmanager
def open_run(config: TrackingConfig, run_dir: Path, info: RunInfo, *, resume: bool = False) -> Iterator[TrackedRun]:
    """A tracked run around the work: FINISHED at the end, FAILED on an exception, KILLED on Ctrl-C or a kill.

    With `resume`, the MLflow run that `run_dir` belongs to is continued.

    Raises:
        UserError: when the tracking store cannot be used.
    """
    if not config.enabled:
        yield NullRun()
        return
    client = open_client(config.uri)
    run_id = start_run(client, config.uri, run_dir, info, resume)
    status = "FAILED"
    try:
        run = MlflowRun(client, run_id, _latest_step(client, run_id) if resume else 0)
        run.log_params(info.params)
        yield run
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run_id, status)
