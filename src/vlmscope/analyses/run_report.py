"""report.html of an experiment, from what is in its run folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmscope.circuits.config import MarkConfig
from vlmscope.config import catalog
from vlmscope.config.schema import HeadlineConfig, numbers_of
from vlmscope.core.artifacts import read_text
from vlmscope.core.launch import program
from vlmscope.core.results import Number
from vlmscope.metrics.rates import measures_of
from vlmscope.report.figures import label
from vlmscope.report.marks import Folder, sections_of
from vlmscope.report.page import Details, Percent, ReportPage, Section, Table, Text, measured, range_of, show


def draw_report(folder: Path, settings: Mapping[str, Any], metrics: Mapping[str, float | None]) -> Path:
    """report.html from a run's folder, its resolved configuration and its numbers."""
    name = str(settings.get("name") or "experiment")
    # A run's config.yaml leaves out what is empty.
    headline, report, trials, places = (settings.get(key, {}) for key in ("headline", "report", "trials", "settings"))
    numbers = numbers_of({key: HeadlineConfig(**config) for key, config in headline.items()}, metrics)
    marks = {key: MarkConfig(**config) for key, config in report.items()}
    counted = {
        f"{trial}/{setting}": measures_of(config, where)[0]
        for trial, config in trials.items()
        for setting, where in places.items()
    }
    sections: list[Section] = [number_table(numbers)] if numbers else []
    sections += sections_of(Folder(folder, counted), marks)
    same = ("The same seed gives the same numbers on the same machine.",)
    own = settings.get("experiment_file")  # of an experiment outside the clone, which may have gone since
    source = Path(own) if own else catalog.conf_dir() / "experiment" / f"{name}.yaml"
    caveats = limits(source.with_suffix(".md"))
    sections += [Text("Limits", (caveats,))] if caveats else []
    sections.append(Text("Run it again", same, code=f"{program()} experiment={shlex.quote(own or name)}"))
    sections.append(Details("Configuration", "config.yaml of this run", read_text(folder / "config.yaml")))
    page = ReportPage(
        title=label(name),
        question=catalog.first_comment(source) if source.is_file() else "",
        summary="; ".join(f"{number.says}: {show(measured(number))}" for number in numbers) or "See the figures.",
        sections=tuple(sections),
        graph="graph.html" if (folder / "graph.html").is_file() else "",
        footer=f"vlmscope · {settings['model']['name']} · {folder.name}",
    )
    return page.write(folder / "report.html")


def number_table(numbers: Sequence[Number]) -> Table:
    """Each headline number with its interval, its control, and the range that the experiment states."""

    def control(number: Number) -> Any:
        value = None if number.rate is None else number.rate.control
        return Percent(value) if number.share and value is not None else value

    rows = tuple((n.says, measured(n), control(n), range_of(n), n.metric) for n in numbers)
    return Table("Result", ("what", "here, 95 % interval", "control", "stated range", "metric"), rows)


def limits(card: Path) -> str:
    """The paragraph "Limits" of an experiment's card; empty when there is none."""
    text = read_text(card) if card.is_file() else ""
    match = re.search(r"\*\*Limits\.\*\*\s*(.+?)(?:\n\n|\Z)", text, re.DOTALL)
    return " ".join(match[1].replace("`", "").replace("*", "").split()) if match else ""
