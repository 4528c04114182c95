"""Pages of a finished run, drawn from its folder."""

from __future__ import annotations

from pathlib import Path

from vlmscope.analyses.run_report import draw_report
from vlmscope.config import AppConfig
from vlmscope.core.artifacts import read_json, read_yaml
from vlmscope.core.errors import UserError
from vlmscope.tasks.job import remove_empty
from vlmscope.tasks.settings import RunContext
from vlmscope.viewer.graphs import export_graph, export_with_report


def run_export(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """A run's graph as one HTML file with its feature panels, to open from disk or send: task.run=FOLDER.

    Write graph.html and print where it is, its size, and how many features have a panel.
    """
    if cfg.task.run is None:
        raise UserError("task.run is not given: a folder with a graph.json, as in task.run=outputs/my_trace")
    path, panels = export_graph(
        Path(cfg.task.run), [Path(one) for one in (cfg.task.study, cfg.task.tower_study) if one]
    )
    remove_empty(context.run_dir)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {panels} features with examples)")
    return {}


def run_report(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Draw report.html of a finished experiment again from its folder, without its model: task.run=FOLDER.

    Read the run's own configuration and numbers, and draw its marks.
    """
    if cfg.task.run is None:
        raise UserError("task.run is not given: the folder of a finished experiment, as in task.run=outputs/my_run")
    folder = Path(cfg.task.run)
    settings, metrics = read_yaml(folder / "config.yaml"), read_json(folder / "metrics.json")
    if not isinstance(settings, dict) or not settings.get("report"):
        raise UserError(f"task.run={folder}: its config.yaml declares no report; give the folder of an experiment")
    export_with_report(folder)
    print(draw_report(folder, settings, metrics))
    return {}
