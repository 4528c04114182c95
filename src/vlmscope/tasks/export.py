"""A run's graph as one HTML file with its feature panels, to open from disk or send: task.run=FOLDER."""

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
    """`run` is a folder with a graph.json; graph.html is written next to it.

    `study` is the run of a study that tells what features stand for, `tower_study` of those of the vision tower; by
    default those that come with vlmscope.
    """

    run: str | None = None
    study: str | None = None
    tower_study: str | None = None


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write graph.html and print where it is, its size, and how many features have a panel."""
    from vlmscope.tasks.job import remove_empty
    from vlmscope.viewer.export import export_graph

    if cfg.task.run is None:
        raise UserError("task.run is not given: a folder with a graph.json, as in task.run=outputs/my_trace")
    path, panels = export_graph(
        Path(cfg.task.run), [Path(one) for one in (cfg.task.study, cfg.task.tower_study) if one]
    )
    remove_empty(context.run_dir)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB, {panels} features with examples)")
    return {}
