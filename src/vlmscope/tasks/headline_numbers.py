"""The headline numbers of a run, each against the range that its experiment states."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vlmscope.config.headline import HeadlineConfig
from vlmscope.core.intervention import Rate
from vlmscope.core.runs import Number

_SHARES = ("rate", "accuracy", "share", "frac")


def numbers_of(headline: Mapping[str, HeadlineConfig], metrics: Mapping[str, float | None]) -> tuple[Number, ...]:
    """The headline numbers of a run, each against its range; one that the run does not have is missing, and is out."""
    found = []
    for metric, wanted in headline.items():
        value = metrics.get(metric)
        rate = _rate(metric, metrics)
        share = _is_share(metric, value, wanted, metrics)
        holds = wanted.holds(value)
        found.append(Number(metric, wanted.says, value, wanted.low, wanted.high, holds, share, rate))
    return tuple(found)


def _is_share(metric: str, value: float | None, wanted: HeadlineConfig, metrics: Mapping[str, float | None]) -> bool:
    """Whether it is to be shown in per cent: value and range lie within 0 and 1, and its name or interval says so."""
    base = metric.removesuffix("_control")
    known = _beside(base, "_ci_low") in metrics or base.rpartition("/")[2].endswith(_SHARES)
    return known and wanted.low >= 0 and wanted.high <= 1 and (value is None or 0 <= value <= 1)


def _rate(metric: str, metrics: Mapping[str, float | None]) -> Rate | None:
    value, low, high, control = (metrics.get(_beside(metric, end)) for end in ("", "_ci_low", "_ci_high", "_control"))
    return None if value is None or low is None or high is None else Rate(value, low, high, 0, control)


def _beside(metric: str, end: str) -> str:
    """The name of a number that belongs to a metric: `a/rate_ci_low`, but `layers/a_ci_low/layer_07`."""
    name, slash, layer = metric.rpartition("/")
    return f"{name}{end}/{layer}" if slash and re.fullmatch(r"layer_\d+", layer) else metric + end
