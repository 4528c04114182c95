"""One job of the command line: its folder, its record in MLflow, and the task; alone or as one of several processes."""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from vlmscope.config.resolve import to_app_config
from vlmscope.config.store import OVERRIDES, job_settings, run_label
from vlmscope.core.artifacts import write_json, write_yaml
from vlmscope.core.errors import CheckFailed, UserError, first_line, is_out_of_memory
from vlmscope.core.launch import place_of
from vlmscope.tasks import registry
from vlmscope.tasks.ranks import claimed, remove_empty, together, work_along
from vlmscope.tasks.registry import RunContext
from vlmscope.tracking import RunInfo, TrackedRun, open_run, sweep

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import Task


def _flat_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON numbers. JSON has no NaN or infinity: such a value is written as null."""
    numbers = {key: float(value) for key, value in metrics.items()}
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


@contextmanager
def _log_file(run_dir: Path) -> Iterator[None]:
    """What is logged also goes into run.log in the run folder."""
    handler = logging.FileHandler(run_dir / "run.log", delay=True, encoding="utf-8", errors="backslashreplace")
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
def _enough_memory(task: "Task") -> Iterator[None]:
    """Memory that runs out is the user's to mend: one line that says what to lower.

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
        UserError: a launcher was chosen, and Hydra uses none without `-m`.
    """
    hydra = HydraConfig.get()
    launcher = hydra.runtime.choices["hydra/launcher"]
    if launcher != "basic" and (hydra.mode is None or hydra.mode.name != "MULTIRUN"):
        raise UserError(
            f"hydra/launcher={launcher} is for python run.py -m ...; add -m (a single job is a sweep of one)"
        )
    run_dir = Path(hydra.runtime.output_dir)
    overrides = tuple(hydra.overrides.task)
    app_cfg = to_app_config(cfg, overrides)
    task = registry.load(hydra.runtime.choices["task"])
    task.check_used(overrides)
    place = place_of(os.environ)
    context = RunContext(run_dir, TrackedRun(), overrides)
    if place is not None:
        with _enough_memory(task), together(place, task, app_cfg, run_dir) as (own_cfg, shared):
            context = replace(context, run_dir=shared, per_host=place.per_host)
            if place.main:
                _recorded_run(cfg, app_cfg, task, own_cfg, context)
            else:
                work_along(task, own_cfg, context, place.rank)
    elif task.recorded:
        with _enough_memory(task), claimed(run_dir):
            _recorded_run(cfg, app_cfg, task, app_cfg, context)
    else:
        task.run(app_cfg, context)
        remove_empty(run_dir)


def _recorded_run(cfg: Any, app_cfg: "AppConfig", task: "Task", own_cfg: "AppConfig", context: "RunContext") -> None:
    """Run the task with `own_cfg`; `app_cfg`, as it was composed from `cfg`, is what is written down."""
    hydra, run_dir, overrides = HydraConfig.get(), context.run_dir, context.overrides
    # Not by way of OmegaConf: a prompt that holds `${` would be taken for an interpolation.
    resolved = task.settings(app_cfg)
    write_yaml(run_dir / "config.yaml", resolved)
    write_yaml(run_dir / OVERRIDES, list(overrides))
    in_sweep = hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    parent = sweep.parent_id() if in_sweep and app_cfg.tracking.enabled else None
    # The folder of a sweep's job is a bare number, which says nothing where runs are compared.
    name = sweep.job_name(job_settings(overrides), run_dir.name) if in_sweep else run_dir.name
    study = run_label(cfg, hydra.runtime.choices)
    if not in_sweep:
        parent, study = sweep.starter() or (parent, study)
    info = RunInfo(study, name, resolved, overrides, parent)
    resume = app_cfg.trainer.resume or task.resumes
    with _log_file(run_dir), open_run(app_cfg.tracking, run_dir, info, resume=resume) as tracked:
        try:
            metrics = task.run(own_cfg, replace(context, tracked=tracked))
        except CheckFailed as failed:
            # Inside the tracked run, which is to end as FAILED, with all that was measured.
            _record(failed.metrics, tracked, run_dir)
            raise
        _record(metrics, tracked, run_dir)


def _record(metrics: Mapping[str, float], tracked: TrackedRun, run_dir: Path) -> None:
    """Write and log what a task returned, and print where it is."""
    tracked.log_metrics(metrics)
    write_json(run_dir / "metrics.json", _flat_metrics(metrics))
    tracked.log_artifacts(run_dir)
    print(run_dir, flush=True)
