"""Hydra callbacks of a sweep: its tracked parent run, a table of all jobs and, for transcoders, a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from vlmscope.config.catalog import OVERRIDES, job_settings, run_label
from vlmscope.config.schema import TrackingConfig
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.launch import place_of
from vlmscope.core.results import SweepJob, job_rows, read_jobs, table_columns, text_table, write_table
from vlmscope.tracking.run import log_to_parent, note_overrides, open_parent

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
