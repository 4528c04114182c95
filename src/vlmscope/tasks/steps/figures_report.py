"""report.html of an experiment whose result is its figures: question, headline numbers, the figures, limits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.config import catalog
from vlmscope.config.catalog import conf_dir
from vlmscope.core.artifacts import read_text
from vlmscope.core.runs import Number
from vlmscope.report.page import (
    Figure,
    Percent,
    ReportPage,
    Section,
    Table,
    Text,
    Value,
    mapping_table,
    measured,
    range_of,
    show,
)
from vlmscope.report.style import label
from vlmscope.tasks.headline_numbers import numbers_of
from vlmscope.tasks.steps.report_parts import configuration, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def run(bench: Bench) -> None:
    """Write report.html from the metrics and figures that the steps before left."""
    name = bench.cfg.name or "experiment"
    numbers = numbers_of(bench.cfg.headline, bench.metrics)
    sections: list[Section] = [number_table(numbers)] if numbers else []
    drawn = sorted((bench.run_dir / "figures").glob("*.png"))
    if drawn:
        sections.append(Figure("Figures", tuple(picture(path, label(path.stem)) for path in drawn)))
    said = limits(conf_dir() / "experiment" / f"{name}.md")
    sections += [Text("Limits", (said,))] if said else []
    plain = {key: value for key, value in bench.metrics.items() if not key.startswith("perf/")}
    sections += [rerun(bench), mapping_table("All numbers", plain, ("metric", "value")), configuration(bench)]
    page = ReportPage(
        title=label(name),
        question=catalog.options("experiment").get(name, ""),
        summary="; ".join(f"{number.says}: {shown(number)}" for number in numbers) or "See the figures.",
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def number_table(numbers: tuple[Number, ...]) -> Table:
    """Each headline number with its interval, its control, and the range that the experiment states."""
    rows = tuple((n.says, measured(n), control(n), range_of(n), n.metric) for n in numbers)
    return Table("Result", ("what", "here, 95 % interval", "control", "stated range", "metric"), rows)


def control(number: Number) -> Value:
    """The same under its control, None without one."""
    value = None if number.rate is None else number.rate.control
    return Percent(value) if number.share and value is not None else value


def shown(number: Number) -> str:
    """A number in words."""
    return show(measured(number))


def limits(card: Path) -> str:
    """The paragraph of an experiment's card that says what its numbers do not; empty when there is none."""
    text = read_text(card) if card.is_file() else ""
    found = re.search(r"\*\*Limits\.\*\*\s*(.+?)(?:\n\n|\Z)", text, re.DOTALL)
    return " ".join(found[1].replace("`", "").replace("*", "").split()) if found else ""
