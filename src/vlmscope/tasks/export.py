"""A run's graph as one HTML file with its feature panels, to open from disk or send: task.run=FOLDER."""

from __future__ import annotations

from pathlib import Path

from vlmscope.config import AppConfig
from vlmscope.core.errors import UserError
from vlmscope.tasks.job import remove_empty
from vlmscope.tasks.settings import RunContext
from vlmscope.viewer.graphs import export_graph


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write graph.html and print where it is, its size, and how many features have a panel."""
    if cfg.task.run is None:
        raise UserError("task.run is not given: a folder with a graph.json, as in task.run=outputs/my_trace")
    path, panels = export_graph(
        Path(cfg.task.run), [Path(one) for one in (cfg.task.study, cfg.task.tower_study) if one]
    )
    remove_empty(context.run_dir)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {panels} features with examples)")
    return {}
