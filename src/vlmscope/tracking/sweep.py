"""Runs inside a run: the parent of a sweep, opened before its first job and closed with a status made of its jobs', and
runs that another run starts in processes of their own."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vlmscope.core.errors import UserError
from vlmscope.tracking.client import open_client
from vlmscope.tracking.config import TrackingConfig
from vlmscope.tracking.run import RunInfo, start_run

# Jobs may run in other processes (a launcher starts them), so the id travels in the environment.
_PARENT = "VLMSCOPE_MLFLOW_PARENT"
_URI = "VLMSCOPE_MLFLOW_URI"
_OVERRIDES = "VLMSCOPE_MLFLOW_OVERRIDES"
# Of a run that was started by another one: that one's id and the study that both belong to.
_STARTER = "VLMSCOPE_MLFLOW_STARTER"
_STUDY = "VLMSCOPE_MLFLOW_STUDY"


def open_parent(config: TrackingConfig, sweep_dir: str | Path, experiment: str, overrides: Sequence[str]) -> str:
    """Open the parent run, or continue that of an earlier sweep in this folder; jobs find it. Returns its id."""
    folder = Path(sweep_dir)
    folder.mkdir(parents=True, exist_ok=True)
    client = open_client(config.uri)
    info = RunInfo(experiment, folder.name, overrides=overrides, tags={"sweep": "true"})
    run_id = start_run(client, config.uri, folder, info, resume=True)
    os.environ[_PARENT] = run_id
    os.environ[_URI] = config.uri
    os.environ[_OVERRIDES] = json.dumps(list(overrides))
    return run_id


def parent_id() -> str:
    """The parent of a job.

    Raises:
        UserError: when there is none: Hydra only warns when opening it failed, and orphans would look like single runs.
    """
    run_id = os.environ.get(_PARENT)
    if run_id is None:
        raise UserError(
            "this job's sweep has no tracked parent (see the warnings above); mend that or add tracking=none"
        )
    return run_id


def started_by(run_id: str | None, study: str) -> dict[str, str]:
    """The environment of processes whose runs are children of the run `run_id`; empty when that is None."""
    return {} if run_id is None else {_STARTER: run_id, _STUDY: study}


def starter() -> tuple[str, str] | None:
    """The parent's id and the study of a run that another run started, else None."""
    run_id, study = os.environ.get(_STARTER), os.environ.get(_STUDY)
    return None if run_id is None or study is None else (run_id, study)


def job_name(settings: Sequence[str], fallback: str) -> str:
    """What sets a job apart: its settings without those of the sweep's command line that all jobs share.

    Where runs are compared, a legend shows only the start of a name, so `transcoder.k=4` is `k=4` if no other key of
    the job ends in `k`.
    """
    shared = set(json.loads(os.environ.get(_OVERRIDES, "[]")))
    own = [setting for setting in settings if setting not in shared] or settings
    parts = [setting.partition("=") for setting in own]
    leaves = [key.rpartition(".")[2] for key, _, _ in parts]
    short = [
        f"{key if leaves.count(leaf) > 1 else leaf}{equals}{value}"
        for leaf, (key, equals, value) in zip(leaves, parts, strict=True)
    ]
    return ", ".join(short)[:200] or fallback


def log_to_parent(files: Sequence[Path], root: Path) -> None:
    """Copy files below `root` into the parent run's artifacts, keeping subfolders; nothing without a parent."""
    run_id, uri = os.environ.get(_PARENT), os.environ.get(_URI)
    if run_id is None or uri is None:
        return
    client = open_client(uri)
    for file in files:
        below = file.relative_to(root).parent.as_posix()
        client.log_artifact(run_id, str(file), None if below == "." else below)


def close_parent(*, killed: bool = False, failed: bool = False) -> None:
    """End the parent run, if one is open: KILLED or FAILED as said or when a job was, else FINISHED."""
    run_id, uri = os.environ.pop(_PARENT, None), os.environ.pop(_URI, None)
    os.environ.pop(_OVERRIDES, None)
    if run_id is None or uri is None:
        return
    client = open_client(uri)
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
