"""Draw report.html of a finished experiment again from its folder, without its model: task.run=FOLDER."""

from __future__ import annotations

from pathlib import Path

from vlmscope.analyses.run_report import draw_report
from vlmscope.config import AppConfig
from vlmscope.core.artifacts import read_json, read_yaml
from vlmscope.core.errors import UserError
from vlmscope.tasks.settings import RunContext
from vlmscope.viewer.graphs import export_with_report


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Read the run's own configuration and numbers, and draw its marks."""
    if cfg.task.run is None:
        raise UserError("task.run is not given: the folder of a finished experiment, as in task.run=outputs/my_run")
    folder = Path(cfg.task.run)
    settings, metrics = read_yaml(folder / "config.yaml"), read_json(folder / "metrics.json")
    if not isinstance(settings, dict) or not settings.get("report"):
        raise UserError(f"task.run={folder}: its config.yaml declares no report; give the folder of an experiment")
    export_with_report(folder)
    print(draw_report(folder, settings, metrics))
    return {}
