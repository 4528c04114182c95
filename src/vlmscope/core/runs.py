"""Records of finished runs, and small tables of them: reproduced experiments, jobs of a sweep, tables for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from vlmscope.core.artifacts import read_json, write_text
from vlmscope.core.intervention import Rate


@dataclass(frozen=True)
class Number:
    """A headline number with the range that it must lie in."""

    metric: str  # its name in metrics.json
    says: str  # what it means, in one line
    value: float | None  # as measured; None when the run has no such number
    low: float
    high: float
    holds: bool
    share: bool = False  # a share of cases, to be shown in per cent
    rate: Rate | None = None  # the same with its interval and control, where the run has an interval of it

    @property
    def told(self) -> str:
        """The number beside its range, for an error or a log."""
        value = "missing" if self.value is None else f"{self.value:.6g}"
        return f"{self.metric} = {value}, range {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Reproduced:
    """One experiment, or one seed of it."""

    name: str
    label: str  # name, and the seed where there are several
    question: str  # its one-line description
    paper: str  # what the paper reports
    numbers: tuple[Number, ...]  # headline numbers in the order of its file
    seconds: float | None  # of the run, None when nobody measured it
    problem: str = ""  # why there are no numbers, in one line; empty when it ran
    report: str | None = None  # its page, relative to the summary; None when it wrote none
    picture: bytes | None = None  # a small PNG of its key figure; None when it drew none

    @property
    def holds(self) -> bool:
        """It ran, and every number lies in its range."""
        return not self.problem and all(number.holds for number in self.numbers)


SEED = "seed="  # an override with this key makes a repetition, not another setting


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep."""

    settings: tuple[str, ...]  # what it sets beside the others, such as ("transcoder.k=8", "seed=1")
    metrics: Mapping[str, float] | None  # as in its metrics.json, finite numbers alone; None when it failed

    @property
    def group(self) -> str:
        """The settings without the seed: jobs of one group repeat each other."""
        return ", ".join(s for s in self.settings if not s.startswith(SEED)) or "all"


def read_jobs(settings: Mapping[Path, Sequence[str]]) -> list[SweepJob]:
    """The jobs of a sweep by run folder, each with what it sets that not all of them set."""
    shared = set.intersection(*map(set, settings.values())) if len(settings) > 1 else set()
    jobs = []
    for folder, own in settings.items():
        path = folder / "metrics.json"
        numbers = read_json(path) if path.is_file() else None
        metrics = None if numbers is None else {k: float(v) for k, v in numbers.items() if v is not None}
        jobs.append(SweepJob(tuple(one for one in own if one not in shared), metrics))
    return jobs


def write_table(jobs: Sequence[SweepJob], path: Path) -> None:
    """CSV: a row a job, with its settings, whether it finished, and every metric that any of them has."""
    names = sorted({name for job in jobs for name in job.metrics or {}})
    out = io.StringIO()
    writer = csv.DictWriter(out, ["settings", "status", *names], restval="", lineterminator="\n")
    writer.writeheader()
    for job in jobs:
        status = "failed" if job.metrics is None else "finished"
        writer.writerow({"settings": ", ".join(job.settings), "status": status, **(job.metrics or {})})
    write_text(path, out.getvalue())


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as lines with aligned columns; control characters of a token are written out."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[at]) for row in shown) for at in range(len(shown[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


def html_table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """The same as an HTML table; everything is escaped."""
    head, *body = [[escape(printable(cell)) for cell in row] for row in rows]
    lines = [f"<table><caption>{escape(printable(caption))}</caption>"]
    lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def printable(text: str) -> str:
    """Text on one line: what cannot be printed, such as the newline of a token, is written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
