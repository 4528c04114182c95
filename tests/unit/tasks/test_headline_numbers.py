"""Headline numbers are found with their intervals and controls, judged, and known as shares."""

import pytest

from vlmscope.config.schema import HeadlineConfig, numbers_of
from vlmscope.core.runs import Number, Reproduced
from vlmscope.report.page import Percent, duration, measured, range_of

METRICS: dict[str, float | None] = {
    "a/flip_rate": 0.5, "a/flip_rate_ci_low": 0.4, "a/flip_rate_ci_high": 0.6, "a/flip_rate_control": 0.01,
    "layers/x/layer_03": 0.2, "layers/x_ci_low/layer_03": 0.1, "layers/x_ci_high/layer_03": 0.3,
    "a/features": 781.0, "a/gap": -0.3, "a/undefined": None, "a/kl": 0.4,
}  # fmt: skip


def number(metric: str, low: float, high: float) -> Number:
    (found,) = numbers_of({metric: HeadlineConfig(low, high, "it works")}, METRICS)
    return found


def test_a_rate_has_its_interval_and_its_control() -> None:
    found = number("a/flip_rate", 0.45, 1.0)
    assert found.holds and found.share and found.rate is not None
    assert (found.rate.ci_low, found.rate.ci_high, found.rate.control) == (0.4, 0.6, 0.01)
    assert measured(found) is found.rate and range_of(found) == "45 to 100\u00a0%"


def test_a_number_of_a_layer_has_its_interval_too() -> None:
    found = number("layers/x/layer_03", 0.1, 0.3)
    assert found.share and found.rate is not None and (found.rate.ci_low, found.rate.ci_high) == (0.1, 0.3)


@pytest.mark.parametrize(
    ("metric", "low", "high", "share", "holds"),
    [
        ("a/flip_rate_control", 0.0, 0.05, True, True),
        ("a/features", 700.0, 800.0, False, True),
        ("a/features", 0.0, 700.0, False, False),
        ("a/gap", -1.0, 0.0, False, True),
        ("a/kl", 0.0, 0.5, False, True),  # between 0 and 1, and no share
        ("a/undefined", 0.0, 1.0, False, False),
        ("a/missing_rate", 0.0, 1.0, True, False),
    ],
)
def test_what_has_no_interval(metric: str, low: float, high: float, share: bool, holds: bool) -> None:
    found = number(metric, low, high)
    assert (found.share, found.holds, found.rate) == (share, holds, None)
    shown = measured(found)
    assert (shown == Percent(found.value)) if share and found.value is not None else (shown == found.value)


def test_one_number_out_of_range_or_a_problem_is_enough() -> None:
    good, bad = number("a/kl", 0.0, 0.5), number("a/kl", 0.41, 0.5)
    assert Reproduced("x", "x", "?", "", (good,), 1.0).holds
    assert not Reproduced("x", "x", "?", "", (good, bad), 1.0).holds
    assert not Reproduced("x", "x", "?", "", (good,), 1.0, "it fell over").holds
    assert bad.told == "a/kl = 0.4, range 0.41 to 0.5" and "missing" in number("a/undefined", 0, 1).told


def test_durations_are_told_as_people_say_them() -> None:
    told = {None: "–", 0.4: "0\u00a0s", 59.4: "59\u00a0s", 59.6: "1\u00a0min 00\u00a0s", 125.0: "2\u00a0min 05\u00a0s"}
    assert {seconds: duration(seconds) for seconds in told} == told
