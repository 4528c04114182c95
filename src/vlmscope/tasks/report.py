"""Draw report.html of a finished experiment again from its folder, without its model: task.run=FOLDER."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext

RECORDED = False  # nothing is measured


@dataclass
class Config:
    """`run` is the folder of a run of `task=experiment`; its report is written there."""

    run: str = MISSING


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Read the run's own configuration and numbers, and draw its marks."""
    from vlmscope.core.artifacts import read_json, read_yaml

    folder = Path(cfg.task.run)
    settings, metrics = read_yaml(folder / "config.yaml"), read_json(folder / "metrics.json")
    if not isinstance(settings, dict) or not settings.get("report"):
        raise UserError(f"task.run={folder}: its config.yaml declares no report; give the folder of an experiment")
    print(draw_report(folder, settings, metrics))
    return {}


def draw_report(folder: Path, settings: Mapping[str, Any], metrics: Mapping[str, float | None]) -> Path:
    """report.html from a run's folder, its resolved configuration and its numbers.

    Raises:
        UserError: a mark that cannot be drawn from what the folder has.
    """
    from vlmscope.circuits.trial_config import MarkConfig
    from vlmscope.config import catalog
    from vlmscope.config.headline import HeadlineConfig
    from vlmscope.core.artifacts import read_text
    from vlmscope.report.marks import Folder, sections_of
    from vlmscope.report.page import Details, ReportPage, Section, Text, measured, show
    from vlmscope.report.style import label
    from vlmscope.tasks.headline_numbers import numbers_of
    from vlmscope.tasks.steps.figures_report import number_table

    name = str(settings.get("name") or "experiment")
    numbers = numbers_of({key: HeadlineConfig(**one) for key, one in settings["headline"].items()}, metrics)
    marks = {key: MarkConfig(**one) for key, one in settings["report"].items()}
    found = Folder(folder, {key: one["measure"] for key, one in settings["trials"].items()}, settings["settings"])
    sections: list[Section] = [number_table(numbers)] if numbers else []
    sections += sections_of(found, marks)
    same = ("The same seed gives the same numbers on the same machine.",)
    sections.append(Text("Run it again", same, code=f"python run.py experiment={name}"))
    sections.append(Details("Configuration", "config.yaml of this run", read_text(folder / "config.yaml")))
    page = ReportPage(
        title=label(name),
        question=catalog.options("experiment").get(name, ""),
        summary="; ".join(f"{number.says}: {show(measured(number))}" for number in numbers) or "See the figures.",
        sections=tuple(sections),
        footer=f"vlmscope · {settings['model']['name']} · {folder.name}",
    )
    return page.write(folder / "report.html")
