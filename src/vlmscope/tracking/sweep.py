"""Runs inside a run: the parent of a sweep, opened before its first job and closed with a status that summarises its
jobs, and runs that another run starts in other processes."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vlmscope.core.errors import UserError
from vlmscope.core.results import SweepJob, job_rows, table_columns
from vlmscope.tracking.client import PATIENCE, WAIT, Unreachable, check_store, clean_key, open_client, patiently
from vlmscope.tracking.run import POINTS_AT_ONCE, RunInfo, TrackingConfig, copy_artifact, run_link, start_run

_LOG = logging.getLogger(__name__)

# A launcher may run jobs in other processes, so the parent's id travels in the environment.
_PARENT = "VLMSCOPE_MLFLOW_PARENT"
_URI = "VLMSCOPE_MLFLOW_URI"
_OVERRIDES = "VLMSCOPE_MLFLOW_OVERRIDES"
# For a run that another run started: the id of that run and the study of both.
_STARTER = "VLMSCOPE_MLFLOW_STARTER"
_STUDY = "VLMSCOPE_MLFLOW_STUDY"


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
    note_overrides(overrides)
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
        for start in range(0, len(points), POINTS_AT_ONCE):
            client.log_batch(parent_id(), metrics=points[start : start + POINTS_AT_ONCE])

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
