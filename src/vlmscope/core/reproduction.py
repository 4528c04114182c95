"""What came out when experiments were run again: numbers against their ranges. Plain records, read by the report."""

from __future__ import annotations

from dataclasses import dataclass

from vlmscope.core.intervention import Rate


@dataclass(frozen=True)
class Number:
    """A headline number.

    Attributes:
        metric: its name in metrics.json.
        says: what it means, in one line.
        value: as measured; None when the run has no such number.
        low, high: the range that it must lie in.
        holds: whether it does.
        share: it is a share of cases, to be shown in per cent.
        rate: the same with its interval and control, where the run has an interval of it.
    """

    metric: str
    says: str
    value: float | None
    low: float
    high: float
    holds: bool
    share: bool = False
    rate: Rate | None = None

    @property
    def told(self) -> str:
        """The number beside its range, for an error or a log."""
        value = "missing" if self.value is None else f"{self.value:.6g}"
        return f"{self.metric} = {value}, range {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Reproduced:
    """One experiment, or one seed of it.

    Attributes:
        name: of the experiment.
        label: name, and the seed where there are several.
        question: its one-line description.
        paper: what the paper reports.
        numbers: headline numbers in the order of its file.
        seconds: of the run, None when nobody measured it.
        problem: why there are no numbers, in one line; empty when it ran.
        report: its page, relative to the summary; None when it wrote none.
        picture: a small PNG of its key figure; None when it drew none.
    """

    name: str
    label: str
    question: str
    paper: str
    numbers: tuple[Number, ...]
    seconds: float | None
    problem: str = ""
    report: str | None = None
    picture: bytes | None = None

    @property
    def holds(self) -> bool:
        """It ran, and every number lies in its range."""
        return not self.problem and all(number.holds for number in self.numbers)
