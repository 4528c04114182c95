"""Draw report.html of a finished experiment again from its folder, without its model: task.run=FOLDER."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

RECORDED = False  # nothing is measured


@dataclass
class Config:
    """`run` is the folder of a run of `task=experiment`; its report is written there."""

    run: str | None = None


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Read the run's own configuration and numbers, and draw its marks."""
    from vlmscope.analyses.run_report import draw_report
    from vlmscope.core.artifacts import read_json, read_yaml
    from vlmscope.viewer.export import export_with_report

    if cfg.task.run is None:
        raise UserError("task.run is not given: the folder of a finished experiment, as in task.run=outputs/my_run")
    folder = Path(cfg.task.run)
    settings, metrics = read_yaml(folder / "config.yaml"), read_json(folder / "metrics.json")
    if not isinstance(settings, dict) or not settings.get("report"):
        raise UserError(f"task.run={folder}: its config.yaml declares no report; give the folder of an experiment")
    export_with_report(folder)
    print(draw_report(folder, settings, metrics))
    return {}
