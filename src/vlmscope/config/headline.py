"""The numbers by which an experiment is judged when it is run again (docs/reproduce.md)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import MISSING

from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.core.runs import Number

_SHARES = ("rate", "accuracy", "share", "frac")  # ends of names of shares of cases


@dataclass
class HeadlineConfig:
    """Where one metric of an experiment must lie, both ends included, and what it means, in one line."""

    low: float = MISSING
    high: float = MISSING
    says: str = MISSING

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(
                f"headline: low={self.low:g} and high={self.high:g} leave no range; low must be at most high"
            )
        if not self.says.strip():
            raise UserError(
                f"headline: the range {self.low:g} to {self.high:g} does not say what it means; fill in says"
            )

    def holds(self, value: float | None) -> bool:
        """Whether a measured value lies in the range; one that is missing or not a number does not."""
        return value is not None and self.low <= value <= self.high


def check_reproducible(reproduce: bool, paper: str | None, headline: dict[str, HeadlineConfig]) -> None:
    """Raise a UserError when an experiment is to be reproduced and does not say what must come out."""
    if reproduce and not headline:
        raise UserError("reproduce=true needs numbers to check: give headline.<metric> its low, high and says")
    if reproduce and not (paper or "").strip():
        raise UserError("reproduce=true needs paper: what the paper reports, in one sentence, or: nothing comparable")


def numbers_of(headline: Mapping[str, HeadlineConfig], metrics: Mapping[str, float | None]) -> tuple[Number, ...]:
    """The headline numbers of a run, each against its range; one that the run does not have is missing, and is out."""
    numbers = []
    for metric, wanted in headline.items():
        value, low, high, control = (
            metrics.get(_beside(metric, end)) for end in ("", "_ci_low", "_ci_high", "_control")
        )
        rate = None if value is None or low is None or high is None else Rate(value, low, high, 0, control)
        # Shown in per cent if value and range lie within 0 and 1, and its name or an interval says that it is a share.
        base = metric.removesuffix("_control")
        named = _beside(base, "_ci_low") in metrics or base.rpartition("/")[2].endswith(_SHARES)
        share = named and wanted.low >= 0 and wanted.high <= 1 and (value is None or 0 <= value <= 1)
        numbers.append(Number(metric, wanted.says, value, wanted.low, wanted.high, wanted.holds(value), share, rate))
    return tuple(numbers)


def _beside(metric: str, end: str) -> str:
    """The name of a number that belongs to a metric: `a/rate_ci_low`, but `layers/a_ci_low/layer_07`."""
    name, slash, layer = metric.rpartition("/")
    return f"{name}{end}/{layer}" if slash and re.fullmatch(r"layer_\d+", layer) else metric + end
