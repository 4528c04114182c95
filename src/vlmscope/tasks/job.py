"""One job of the command line: its folder, its record in MLflow, and the task; alone or as one of several processes.

And what surrounds the jobs of a sweep: a tracked parent run, a table of all jobs and, for transcoders, a figure.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from vlmscope.config import AppConfig
from vlmscope.config.catalog import OVERRIDES, job_settings, run_label
from vlmscope.config.resolve import to_app_config
from vlmscope.config.schema import TrackingConfig
from vlmscope.core.artifacts import read_yaml, remove_leftovers, write_json, write_yaml
from vlmscope.core.errors import CheckFailed, NotMainRank, UserError, first_line, is_out_of_memory
from vlmscope.core.launch import Place, place_of, program
from vlmscope.core.results import SweepJob, job_rows, read_jobs, table_columns, text_table, write_table
from vlmscope.tasks.settings import RunContext, check_used, run_parameters, run_task, used_settings
from vlmscope.tracking.run import (
    RunInfo,
    TrackedRun,
    job_name,
    log_to_parent,
    note_overrides,
    open_parent,
    open_run,
    parent_id,
    starter,
)

_LOG = logging.getLogger(__name__)


@contextmanager
def claimed(folder: Path, key: str = "hydra.run.dir") -> Iterator[None]:
    """Keep other runs out of a folder while this one writes there, and remove leftovers of killed runs.

    The kernel's lock ends with the process, however that ends; the lock file is removed when the work is done.
    `key` is the setting that names the folder.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path, key)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another {key}") from error
    with file:
        remove_leftovers(folder)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while locked, so that a waiting process sees that it is gone


def _locked(path: Path, key: str) -> IO[str]:
    """The open lock file."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                owner = file.read().strip() or "another process"
            raise UserError(
                f"{owner} is writing into {path.parent}; wait until it has ended, or choose another {key}"
            ) from None
        except OSError as error:
            _LOG.warning("%s: this disk has no locks (%s); start no second run there", path.parent, error.strerror)
            return file
        # Between opening and locking, the run before may have ended and removed the file.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


@contextmanager
def together(place: Place, cfg: AppConfig, run_dir: Path) -> Iterator[tuple[AppConfig, Path]]:
    """Join the group of all processes; yield this process's configuration and rank 0's run folder."""
    if not cfg.task.ranks:
        remove_empty(run_dir)
        raise UserError(
            f"task={cfg.task.name} is made for one process, and {place.launcher} started {place.world}; start it alone"
        )
    from vlmscope.training.ranks import opened

    device = _device(place, cfg.model.device)
    with ExitStack() as held, opened(place, device, cfg.trainer.rank_timeout) as meeting:
        refusal = ""
        if place.main:  # before the other ranks learn the folder
            try:
                held.enter_context(claimed(run_dir))
            except UserError as error:
                refusal = str(error)
        refusal = meeting.from_main("refusal", refusal)
        if refusal:
            raise UserError(refusal)
        shared = Path(meeting.from_main("run_dir", str(run_dir)))
        if shared.resolve() != run_dir.resolve():  # names hold the time, and Hydra made one per process
            remove_empty(run_dir)
        if not shared.is_dir():
            raise UserError(f"process {place.rank} does not see the run folder {shared}; choose one on a shared disk")
        yield replace(cfg, model=replace(cfg.model, device=device)), shared


def work_along(cfg: AppConfig, context: RunContext, rank: int) -> None:
    """Run the task on a process that is not rank 0: it prints nothing and logs into `run.rank<N>.log`."""
    root, log = logging.getLogger(), context.run_dir / f"run.rank{rank}.log"
    console, root.handlers = root.handlers, []
    logging.captureWarnings(True)  # they would go to stderr, which all processes share
    try:
        with _log_file(log), open(os.devnull, "w") as null, redirect_stdout(null), suppress(NotMainRank):
            run_task(cfg, context)
    finally:
        logging.captureWarnings(False)
        root.handlers = console


def _device(place: Place, device: str) -> str:
    """The GPU of this process, by its rank, or the only one that the launcher shows it."""
    if not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise UserError(f"model.device={device} is one GPU for {place.world} processes; write model.device=cuda")
    import torch

    count = torch.cuda.device_count()
    if count == 1 and place.launcher == "srun":  # each task of a step may see its own GPU alone
        return "cuda:0"
    if count < place.world:
        raise UserError(f"{place.world} processes on a machine with {count} GPUs; start as many as there are GPUs")
    return f"cuda:{place.rank}"


def remove_empty(run_dir: Path) -> None:
    """Remove the folder that Hydra made for a run, and its parent, where the task left them empty."""
    with suppress(OSError):  # not empty, or removed by another process
        for folder in (run_dir, run_dir.parent):
            folder.rmdir()


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Also write the log to a file."""
    handler = logging.FileHandler(path, delay=True, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.handleError = lambda record: None  # a full disk must not print a traceback for each line
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        with suppress(OSError):
            handler.close()


@contextmanager
def _enough_memory(task: Any) -> Iterator[None]:
    """Turn running out of memory into one line that says what to lower.

    Raises:
        UserError: it ran out, on the CPU or a GPU.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        less = f"lower {task.memory}, or " if task.memory else ""
        raise UserError(
            f"task={task.name} ran out of memory ({first_line(error)}); {less}choose a smaller model, "
            "model.dtype=bfloat16 or model.offload=cpu; what is done stays, and trainer.resume=true with this "
            "hydra.run.dir resumes from it"
        ) from error


def run_job(cfg: Any) -> None:
    """One job, called by Hydra with the composed configuration.

    Raises:
        UserError: a launcher was chosen, which Hydra ignores without `-m`.
    """
    hydra = HydraConfig.get()
    launcher = hydra.runtime.choices["hydra/launcher"]
    if launcher != "basic" and (hydra.mode is None or hydra.mode.name != "MULTIRUN"):
        raise UserError(f"hydra/launcher={launcher} is for {program()} -m ...; add -m (a single job is a sweep of one)")
    run_dir = Path(hydra.runtime.output_dir)
    overrides = tuple(hydra.overrides.task)
    app_cfg = to_app_config(cfg, overrides)
    task = app_cfg.task
    check_used(task, task.name, overrides)
    place = place_of(os.environ)
    context = RunContext(run_dir, TrackedRun(), overrides)
    if place is not None:
        with _enough_memory(task), together(place, app_cfg, run_dir) as (own_cfg, shared):
            context = replace(context, run_dir=shared)
            if place.main:
                _recorded_run(cfg, app_cfg, own_cfg, context)
            else:
                work_along(own_cfg, context, place.rank)
    elif task.recorded:
        with _enough_memory(task), claimed(run_dir):
            _recorded_run(cfg, app_cfg, app_cfg, context)
    else:
        run_task(app_cfg, context)
        remove_empty(run_dir)


def _recorded_run(cfg: Any, app_cfg: AppConfig, own_cfg: AppConfig, context: RunContext) -> None:
    """Run its task with `own_cfg`, and record `app_cfg`, which was composed from `cfg`."""
    hydra, run_dir, overrides = HydraConfig.get(), context.run_dir, context.overrides
    # Not with OmegaConf, which would take `${` in a prompt for an interpolation.
    write_yaml(run_dir / "config.yaml", used_settings(app_cfg))
    write_yaml(run_dir / OVERRIDES, list(overrides))
    in_sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    parent = parent_id() if in_sweep and app_cfg.tracking.enabled else None
    # The folder of a sweep's job is a bare number, of no use where runs are compared.
    name = job_name(job_settings(overrides), run_dir.name) if in_sweep else run_dir.name
    study = run_label(cfg, hydra.runtime.choices)
    if not in_sweep:
        parent, study = starter() or (parent, study)
    tags = {"task": app_cfg.task.name, "experiment": study}
    if in_sweep:
        tags["sweep"] = Path(hydra.sweep.dir).name
    info = RunInfo(study, name, run_parameters(app_cfg), overrides, parent, tags)
    resume = app_cfg.trainer.resume or app_cfg.task.resumes
    with _log_file(run_dir / "run.log"), open_run(app_cfg.tracking, run_dir, info, resume=resume) as tracked:
        try:
            metrics = run_task(own_cfg, replace(context, tracked=tracked, job=name if in_sweep else ""))
        except CheckFailed as failed:
            # Inside the tracked run, which is to end as FAILED, with all that was measured.
            _record(failed.metrics, tracked, run_dir, in_sweep)
            raise
        _record(metrics, tracked, run_dir, in_sweep)


def _record(metrics: Mapping[str, float], tracked: TrackedRun, run_dir: Path, in_sweep: bool) -> None:
    """Write and log the metrics of a task, and print its folder."""
    tracked.log_results(metrics)
    # JSON has no NaN or infinity: such a value becomes null.
    write_json(run_dir / "metrics.json", {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()})
    tracked.log_artifacts(run_dir)
    link = "" if in_sweep else tracked.link()  # a sweep ends with its own
    if link:
        print(f"MLflow: {link}")
    print(run_dir, flush=True)


# A sweep

_MOST = 6  # metrics in the printed table of a sweep
_FIRST = ("val/fvu", "val/fvu_text", "val/fvu_image", "val/l0", "val/dead_frac", "val/ce_delta")


def summarise(folder: Path) -> tuple[list[SweepJob], list[Path]]:
    """The jobs of a sweep, and the files written of them: `sweep.csv` and, for transcoders, `figures/sweep.png`.

    A failed job is a row without numbers. Other folders are ignored.
    """
    paths = sorted(folder.glob(f"*/{OVERRIDES}"), key=_number)
    if not paths:
        return [], []
    jobs = read_jobs({path.parent: job_settings(read_yaml(path)) for path in paths})
    table = folder / "sweep.csv"
    write_table(jobs, table)
    written = [table]
    if any(name.startswith("layers/fvu/") for job in jobs for name in job.metrics or {}):
        from vlmscope.report.figures import sweep_overview

        written.append(sweep_overview(jobs, folder / "figures" / "sweep.png"))
    return jobs, written


def printed(jobs: Sequence[SweepJob]) -> str:
    """The table of a sweep for the console: settings, status, and the first of its metrics."""
    columns, rows = table_columns(jobs), job_rows(jobs)
    settings = columns[: columns.index("status") + 1]
    measured = next((job.metrics for job in jobs if job.metrics), {})  # in the order of metrics.json
    headline = [name for name in _FIRST if name in measured] or list(measured)
    names = [*settings, *headline[:_MOST]]

    def cell(value: str | float | None) -> str:
        return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"

    return text_table([names, *([cell(row.get(name)) for name in names] for row in rows)])


def _number(path: Path) -> tuple[int, str]:
    """Sort key of a job's folder, by number: 2 before 10."""
    name = path.parent.name
    return (int(name) if name.isdigit() else -1, name)


class SweepRefused(BaseException):
    """A sweep that must not start. Not an `Exception`, since Hydra only warns about those in callbacks."""


class SweepParent(Callback):
    """Opens the parent run of a sweep; `vlmscope.app` closes it, since Hydra may skip `on_multirun_end`."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Open the parent run.

        Raises:
            SweepRefused: the sweep was started by several processes, or the tracking store or the sweep's folder
                cannot be used.
        """
        if place_of(os.environ) is not None:
            raise SweepRefused("several processes cannot share a sweep; start them once for each combination")
        tracking = OmegaConf.to_object(config.tracking)
        assert isinstance(tracking, TrackingConfig)
        note_overrides(list(config.hydra.overrides.task))
        if not tracking.enabled:
            return
        label = run_label(config, config.hydra.runtime.choices)
        folder = config.hydra.sweep.dir
        try:
            open_parent(tracking, folder, label, list(config.hydra.overrides.task))
        except UserError as error:
            raise SweepRefused(str(error)) from error
        except OSError as error:
            raise SweepRefused(f"cannot write {folder}: {error.strerror}; choose another hydra.sweep.dir") from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and log the table of all jobs, then print the folder of the sweep."""
        folder = Path(config.hydra.sweep.dir).resolve()
        jobs, files = summarise(folder)
        link = log_to_parent(jobs, files, folder) if jobs else ""
        if jobs:
            print(f"\n{printed(jobs)}")
        if link:
            print(f"MLflow: {link}")
        print(folder, flush=True)
