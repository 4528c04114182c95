"""Hydra callbacks of a sweep: its tracked parent run, a table of all jobs and, for transcoders, a figure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from vlmscope.config.catalog import OVERRIDES, job_settings, run_label
from vlmscope.config.schema import TrackingConfig
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.launch import place_of
from vlmscope.core.results import read_jobs, write_table
from vlmscope.tracking import sweep


def summarise(folder: Path) -> list[Path]:
    """Write `sweep.csv` and, for transcoders, `figures/sweep.png` into a sweep's folder; return the written files.

    A failed job is a row without numbers. Other folders are ignored.
    """
    paths = sorted(folder.glob(f"*/{OVERRIDES}"), key=_number)
    if not paths:
        return []
    jobs = read_jobs({path.parent: job_settings(read_yaml(path)) for path in paths})
    table = folder / "sweep.csv"
    write_table(jobs, table)
    written = [table]
    if any(name.startswith("layers/fvu/") for job in jobs for name in job.metrics or {}):
        from vlmscope.report.figures import sweep_overview

        written.append(sweep_overview(jobs, folder / "figures" / "sweep.png"))
    return written


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
        sweep.note_overrides(list(config.hydra.overrides.task))
        if not tracking.enabled:
            return
        label = run_label(config, config.hydra.runtime.choices)
        folder = config.hydra.sweep.dir
        try:
            sweep.open_parent(tracking, folder, label, list(config.hydra.overrides.task))
        except UserError as error:
            raise SweepRefused(str(error)) from error
        except OSError as error:
            raise SweepRefused(f"cannot write {folder}: {error.strerror}; choose another hydra.sweep.dir") from error

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write and log the table of all jobs, then print the folder of the sweep."""
        folder = Path(config.hydra.sweep.dir).resolve()
        sweep.log_to_parent(summarise(folder), folder)
        print(folder, flush=True)
