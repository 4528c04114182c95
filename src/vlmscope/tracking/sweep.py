"""Runs inside a run: the parent of a sweep, opened before its first job and closed with a status that summarises its
jobs, and runs that another run starts in other processes."""

import fcntl
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError
from vlmscope.tracking.client import PATIENCE, WAIT, Unreachable, check_store, open_client, patiently
from vlmscope.tracking.run import RunInfo, TrackingConfig, copy_artifact, start_run

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_LOG = logging.getLogger(__name__)

# A launcher may run jobs in other processes, so the parent's id travels in the environment. So do its folder and
# experiment, with which a job opens the parent if the store was locked when the sweep began.
_PARENT = "VLMSCOPE_MLFLOW_PARENT"
_URI = "VLMSCOPE_MLFLOW_URI"
_OVERRIDES = "VLMSCOPE_MLFLOW_OVERRIDES"
_SWEEP = "VLMSCOPE_MLFLOW_SWEEP"
# For a run that another run started: the id of that run and the study of both.
_STARTER = "VLMSCOPE_MLFLOW_STARTER"
_STUDY = "VLMSCOPE_MLFLOW_STUDY"


def open_parent(config: TrackingConfig, sweep_dir: str | Path, experiment: str, overrides: Sequence[str]) -> str | None:
    """Open the parent run, or continue that of an earlier sweep in this folder; returns its id.

    None if the store is locked: then the first job that reaches the store opens the parent.
    """
    folder = Path(sweep_dir)
    folder.mkdir(parents=True, exist_ok=True)
    check_store(config.uri)
    os.environ[_URI] = config.uri
    os.environ[_OVERRIDES] = json.dumps(list(overrides))
    os.environ[_SWEEP] = json.dumps([str(folder), experiment])
    try:
        return patiently(config.uri, lambda: _open_parent(open_client(config.uri)), WAIT)
    except Unreachable as error:
        _LOG.warning("%s does not take the parent of this sweep (%s); it is opened later", config.uri, error)
        return None


def _open_parent(client: "MlflowClient") -> str:
    """The parent's id. Whichever process of the sweep comes first opens the run; the lock makes the others wait."""
    known = os.environ.get(_PARENT)
    if known is not None:
        return known
    folder, experiment = json.loads(os.environ[_SWEEP])
    info = RunInfo(experiment, Path(folder).name, overrides=json.loads(os.environ[_OVERRIDES]), tags={"sweep": "true"})
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.environ[_PARENT] = start_run(client, os.environ[_URI], Path(folder), info, resume=True)
    finally:
        os.close(lock)
    return os.environ[_PARENT]


def parent_id() -> "str | Callable[[MlflowClient], str]":
    """The parent of a job, or a function that opens it if the store was locked when the sweep began.

    Raises:
        UserError: there is none. Hydra only warns when opening it fails, and orphans would look like single runs.
    """
    if _SWEEP not in os.environ:
        raise UserError(
            "this job's sweep has no tracked parent (see the warnings above); mend that or add tracking=none"
        )
    return os.environ.get(_PARENT, _open_parent)


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
    shared = set(json.loads(os.environ.get(_OVERRIDES, "[]")))
    distinct = [setting for setting in settings if setting not in shared] or settings
    parts = [setting.partition("=") for setting in distinct]
    leaves = [key.rpartition(".")[2] for key, _, _ in parts]
    short = [
        f"{key if leaves.count(leaf) > 1 else leaf}{equals}{value}"
        for leaf, (key, equals, value) in zip(leaves, parts, strict=True)
    ]
    return ", ".join(short)[:200] or fallback


def log_to_parent(files: Sequence[Path], root: Path) -> None:
    """Copy files below `root` into the parent run's artifacts, keeping subfolders; without a parent, do nothing."""

    def copy(uri: str) -> None:
        client = open_client(uri)
        for file in files:
            copy_artifact(client, _open_parent(client), file, file.relative_to(root).parent.as_posix())

    _at_the_end(copy, "the sweep's table and figure", PATIENCE)


def close_parent(*, killed: bool = False, failed: bool = False) -> None:
    """End the parent run, if one is open: KILLED or FAILED as passed or if a job was, else FINISHED."""

    def close(uri: str) -> None:
        client = open_client(uri)
        run_id = _open_parent(client)
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
    for name in (_PARENT, _URI, _OVERRIDES, _SWEEP):
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
