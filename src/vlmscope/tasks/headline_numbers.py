"""The headline numbers of a run, each against the range that its experiment states."""

from __future__ import annotations

from collections.abc import Mapping

from vlmscope.config.headline import HeadlineConfig
from vlmscope.core.intervention import Rate
from vlmscope.core.reproduction import Number

_SHARES = ("rate", "accuracy", "share", "frac", "pointing")


def numbers_of(headline: Mapping[str, HeadlineConfig], metrics: Mapping[str, float | None]) -> tuple[Number, ...]:
    """The headline numbers of a run, each against its range; one that the run does not have is missing, and is out."""
    found = []
    for metric, wanted in headline.items():
        value = metrics.get(metric)
        rate = _rate(metric, metrics)
        base = metric.removesuffix("_control")
        share = base.rpartition("/")[2].endswith(_SHARES) or base.startswith("layers/modality_")
        holds = wanted.holds(value)
        found.append(Number(metric, wanted.says, value, wanted.low, wanted.high, holds, share, rate))
    return tuple(found)


def _rate(metric: str, metrics: Mapping[str, float | None]) -> Rate | None:
    value, low, high = (metrics.get(f"{metric}{end}") for end in ("", "_ci_low", "_ci_high"))
    if value is None or low is None or high is None:
        return None
    return Rate(value, low, high, 0, metrics.get(f"{metric}_control"))
