"""Records of results, free of torch: what an intervention did and how sure that is, circuits, headline numbers,
reproduced experiments, jobs of a sweep, and small tables for people.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from vlmscope.core.artifacts import read_json, write_text
from vlmscope.core.records import FeatureId, PatchBox, Positions

MODES = ("direct", "frozen_attention", "free")


@dataclass(frozen=True)
class Rate:
    """A share of cases, or a mean over them, with its bootstrap 95 % interval.

    `control` is the same measure under the matched controls.
    """

    value: float
    ci_low: float
    ci_high: float
    cases: int
    control: float | None = None

    def metrics(self, name: str) -> dict[str, float]:
        """Metrics: its value as `name`, with `_ci_low`, `_ci_high` and, where there is one, `_control`."""
        found = {name: self.value, f"{name}_ci_low": self.ci_low, f"{name}_ci_high": self.ci_high}
        return found if self.control is None else found | {f"{name}_control": self.control}


@dataclass(frozen=True)
class FlipRow:
    """One row of the table of results."""

    method: str  # 'steer', 'patch' or 'ablate'
    mode: str  # one of MODES, or 'generate' (token by token, with a KV cache)
    question: str  # 'name', 'colour', 'cover' or 'worst' (of the questions)
    scope: str  # where it acted: 'all', 'no_last_layer', 'no_last_position', 'role_image', 'role_question', ...
    rate: Rate
    n_features: int
    changed: Rate | None = None  # how often the answer was another than before, where that was counted
    p: float | None = None  # that no more cases than under the control flip (change, for 'ablate')
    q: float | None = None  # p corrected for all rows of the table (false discovery rate)


@dataclass(frozen=True)
class AnswerExample:
    """One picture before and after: top words with probabilities, greedy answer texts."""

    image_png: bytes
    question: str
    intervention: str
    before: str
    after: str
    probs_before: tuple[tuple[str, float], ...]
    probs_after: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Curve:
    """A dose-response curve: `y[i]` with interval at `x[i]`, for one named series."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, name: str, x: Iterable[float], rates: Sequence[Rate]) -> Curve:
        """Rates at `x` with their intervals."""
        columns = (x, *([getattr(rate, key) for rate in rates] for key in ("value", "ci_low", "ci_high")))
        return cls(name, *(tuple(map(float, column)) for column in columns))


@dataclass(frozen=True)
class FeatureExample:
    """A top activating example of a feature: where it fired and how strongly.

    image_png is None for text alone; patch_boxes with activations cover the soft tokens (activation grid);
    tokens with token_activations is the text window; peak is the index of the strongest position among all tokens.
    """

    activation: float
    caption: str
    image_png: bytes | None
    patch_boxes: tuple[PatchBox, ...] = ()
    patch_activations: tuple[float, ...] = ()
    tokens: tuple[str, ...] = ()
    token_activations: tuple[float, ...] = ()


@dataclass(frozen=True)
class CircuitFeature:
    """A member of a supernode with the evidence for it."""

    feature: FeatureId
    role: str
    contrast: float  # mean activation on the supernode's concept minus on the other one, at `role`
    influence: float  # mean over traced graphs of its total influence on the logit difference; 0 when it was in none
    examples: tuple[FeatureExample, ...] = ()
    top_logits: tuple[tuple[str, float], ...] = ()
    bottom_logits: tuple[tuple[str, float], ...] = ()
    label: str = ""  # what it is called, where that is known


@dataclass(frozen=True)
class Supernode:
    """A named group of features, for example 'mars'."""

    name: str
    features: tuple[CircuitFeature, ...] = field(default=())  # best first
    positions: Positions | None = None  # where in a prompt it is meant; everywhere when None
    chosen: str = ""  # how its members were chosen, in words


@dataclass(frozen=True)
class CircuitEdge:
    """A direct effect between two parts of a circuit, mean over `graphs` attribution graphs."""

    source: str  # a supernode, or what is around it ("picture", "answer: mars")
    target: str
    # Sum of the graph's edges from all members of the source to all of the target, at their positions: in units of the
    # target's pre-activations, of an answer in logits.
    weight: float
    # Weight over the sum of the absolute edges from all sources into the target, -1 to 1, so that edges into different
    # targets can be compared.
    share: float
    graphs: int = 1  # in how many of the graphs the target is active


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
