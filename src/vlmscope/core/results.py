"""Records of results, free of torch: rates, circuits, headline numbers, reproductions, sweeps, and text tables."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from vlmscope.core.artifacts import read_json, write_text
from vlmscope.core.records import FeatureId, PatchBox, Positions

MODES = ("direct", "frozen_attention", "free")


@dataclass(frozen=True)
class Rate:
    """A share of cases, or a mean over them, with its 95 % interval.

    `control` is the same measure under the matched controls.
    """

    value: float
    ci_low: float
    ci_high: float
    cases: int
    control: float | None = None

    def metrics(self, name: str) -> dict[str, float]:
        """Metrics `name`, `name_ci_low`, `name_ci_high` and, if there is a control, `name_control`."""
        metrics = {name: self.value, f"{name}_ci_low": self.ci_low, f"{name}_ci_high": self.ci_high}
        return metrics if self.control is None else metrics | {f"{name}_control": self.control}


@dataclass(frozen=True)
class FlipRow:
    """One row of the table of interventions."""

    method: str  # 'steer', 'patch' or 'ablate'
    mode: str  # one of MODES, or 'generate' (token by token, with a KV cache)
    question: str  # 'name', 'colour', 'cover' or 'worst' (of the questions)
    scope: str  # where it acted: 'all', 'no_last_layer', 'no_last_position', 'role_image', 'role_question', ...
    rate: Rate
    n_features: int
    changed: Rate | None = None  # how often the answer changed, if counted
    rank: str = ""  # among the trial and its control draws, such as "1 of 31"; or why there is none
    q: float | None = None  # the rank's p-value, corrected for all rows of the table (false discovery rate)


@dataclass(frozen=True)
class AnswerExample:
    """One picture before and after an intervention: top words with probabilities, greedy answers."""

    image_png: bytes
    question: str
    intervention: str
    before: str
    after: str
    probs_before: tuple[tuple[str, float], ...]
    probs_after: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Curve:
    """One named dose-response curve: `y[i]` with interval `low[i]` to `high[i]` at `x[i]`."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, name: str, x: Iterable[float], rates: Sequence[Rate]) -> Curve:
        """The curve of `rates` at `x`."""
        columns = (x, *([getattr(rate, key) for rate in rates] for key in ("value", "ci_low", "ci_high")))
        return cls(name, *(tuple(map(float, column)) for column in columns))

    @classmethod
    def line(cls, name: str, x: Iterable[float], y: Iterable[float]) -> Curve:
        """A curve without intervals."""
        values = tuple(map(float, y))
        return cls(name, tuple(map(float, x)), values, values, values)


@dataclass(frozen=True)
class FeatureExample:
    """A top activating example of a feature, with its activations on soft tokens and in a window of text."""

    activation: float
    caption: str
    image_png: bytes | None  # None for text alone
    patch_boxes: tuple[PatchBox, ...] = ()
    patch_activations: tuple[float, ...] = ()
    tokens: tuple[str, ...] = ()
    token_activations: tuple[float, ...] = ()


@dataclass(frozen=True)
class CircuitFeature:
    """A member of a supernode, with the evidence for it."""

    feature: FeatureId
    role: str
    contrast: float  # mean activation at `role` on the supernode's concept, minus that on the other concept
    influence: float  # total influence on the logit difference, mean over traced graphs; 0 if in none
    examples: tuple[FeatureExample, ...] = ()
    top_logits: tuple[tuple[str, float], ...] = ()
    bottom_logits: tuple[tuple[str, float], ...] = ()
    label: str = ""  # name, if known


@dataclass(frozen=True)
class Supernode:
    """A named group of features, for example 'mars'."""

    name: str
    features: tuple[CircuitFeature, ...] = field(default=())  # best first
    positions: Positions | None = None  # positions in a prompt that it refers to; None for all
    chosen: str = ""  # how its members were chosen, in words


@dataclass(frozen=True)
class CircuitEdge:
    """A direct effect between two parts of a circuit, mean over attribution graphs."""

    source: str  # a supernode, or another part of the graph ("picture", "answer: mars")
    target: str
    # Sum of the graph's edges from all members of the source to all of the target, at their positions, in units of the
    # target's pre-activations, or in logits for an answer.
    weight: float
    # Weight over the sum of the absolute edges from all sources into the target, -1 to 1, so that edges into different
    # targets are comparable.
    share: float
    graphs: int = 1  # number of graphs in which the target is active


WIDEST = 0.5  # of the range of a share or correlation


def toothless(low: float, high: float) -> bool:
    """Whether a range of a share or correlation is so wide that hardly any fault misses it."""
    return low >= -1 and high <= 1 and high - low > WIDEST + 1e-9


@dataclass(frozen=True)
class Number:
    """A headline number and the range in which it must lie."""

    metric: str  # name in metrics.json
    says: str  # meaning, in one line
    value: float | None  # as measured; None if the run has no such metric
    low: float
    high: float
    holds: bool
    share: bool = False  # a share of cases, shown in per cent
    rate: Rate | None = None  # the value with interval and control, if the run measured an interval

    @property
    def told(self) -> str:
        """The number and its range, for errors and logs."""
        value = "missing" if self.value is None else f"{self.value:.6g}"
        return f"{self.metric} = {value}, range {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Reproduced:
    """One experiment, or one seed of it."""

    name: str
    label: str  # name, and the seed if there are several
    question: str  # one-line description
    paper: str  # what the paper reports
    numbers: tuple[Number, ...]  # headline numbers in the order of its file
    seconds: float | None  # of the run; None if not measured
    problem: str = ""  # why there are no numbers, in one line; empty if it ran
    report: str | None = None  # its page, relative to the summary, if any
    picture: bytes | None = None  # a small PNG of its key figure, if any

    @property
    def holds(self) -> bool:
        """Whether it ran and every number is in its range."""
        return not self.problem and all(number.holds for number in self.numbers)


SEED = "seed="  # jobs that differ only in this override are repetitions


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep."""

    settings: tuple[str, ...]  # overrides that not all jobs share, such as ("transcoder.k=8", "seed=1")
    metrics: Mapping[str, float] | None  # finite numbers of its metrics.json; None if it failed

    @property
    def group(self) -> str:
        """The settings without the seed; jobs of a group are repetitions."""
        return ", ".join(setting for setting in self.settings if not setting.startswith(SEED)) or "all"


def read_jobs(settings: Mapping[Path, Sequence[str]]) -> list[SweepJob]:
    """Read the jobs of a sweep; `settings` are the overrides by run folder, of which those of all jobs are dropped."""
    shared = set.intersection(*map(set, settings.values())) if len(settings) > 1 else set()
    jobs = []
    for folder, overrides in settings.items():
        path = folder / "metrics.json"
        numbers = read_json(path) if path.is_file() else None
        metrics = None if numbers is None else {k: float(v) for k, v in numbers.items() if v is not None}
        jobs.append(SweepJob(tuple(override for override in overrides if override not in shared), metrics))
    return jobs


def job_rows(jobs: Sequence[SweepJob]) -> list[dict[str, str | float]]:
    """One row per job: each setting in a column of its own, status, and the job's metrics."""
    rows = []
    for job in jobs:
        settings = [text.partition("=") for text in job.settings]
        row: dict[str, str | float] = {key: value if equals else "true" for key, equals, value in settings}
        rows.append(row | {"status": "failed" if job.metrics is None else "finished"} | dict(job.metrics or {}))
    return rows


def table_columns(jobs: Sequence[SweepJob]) -> list[str]:
    """The columns of `job_rows`: settings, status, then every metric that any job has, sorted."""
    keys = dict.fromkeys(text.partition("=")[0] for job in jobs for text in job.settings)
    return [*keys, "status", *sorted({name for job in jobs for name in job.metrics or {}})]


def write_table(jobs: Sequence[SweepJob], path: Path) -> None:
    """Write `job_rows` as a CSV file."""
    out = io.StringIO()
    writer = csv.DictWriter(out, table_columns(jobs), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(job_rows(jobs))
    write_text(path, out.getvalue())


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as lines with aligned columns; control characters are escaped."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    )


class Shown(ABC):
    """A result that prints as a table, in notebooks as HTML."""

    @abstractmethod
    def _title(self) -> str: ...

    @abstractmethod
    def _rows(self) -> Sequence[tuple[str, ...]]: ...  # the head, then the rows

    def __repr__(self) -> str:
        return f"{self._title()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), self._title())


def html_table(rows: Sequence[Sequence[str]], caption: str) -> str:
    """Rows of equal length as an HTML table, the first one as its head; everything is escaped."""
    head, *body = [[escape(printable(cell)) for cell in row] for row in rows]
    lines = [f"<table><caption>{escape(printable(caption))}</caption>"]
    lines.append("<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return "\n".join([*lines, "</table>"])


def printable(text: str) -> str:
    """Text on one line, with unprintable characters, such as the newline of a token, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
