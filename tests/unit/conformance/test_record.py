"""A check holds only when something was measured and is within its tolerance."""

import math

import pytest

from vlmscope.conformance import Check, Skipped, check


@check("a number is small", 0.5)
def half(subject: float) -> float:
    if subject < 0:
        raise Skipped("negative")
    return subject


@check("a number is large", 0.5, at_least=True)
def moves(subject: float) -> float:
    return subject


@pytest.mark.parametrize(
    ("function", "value", "held"),
    [
        (half, 0.5, True),
        (half, 0.6, False),
        (half, math.nan, False),
        (half, math.inf, False),
        (moves, 0.6, True),
        (moves, 0.5, False),
        (moves, math.nan, False),
    ],
)
def test_held_and_failed_are_opposites(function, value: float, held: bool) -> None:
    found = function(value)
    assert (found.held, found.failed, found.skipped) == (held, not held, False)


def test_what_is_skipped_neither_holds_nor_fails() -> None:
    found = half(-1.0)
    assert isinstance(found, Check)
    assert (found.held, found.failed, found.skipped, found.reason, found.error) == (
        False,
        False,
        True,
        "negative",
        None,
    )
    assert (found.name, found.claim, found.tolerance) == ("half", "a number is small", 0.5)


def test_other_exceptions_are_not_swallowed() -> None:
    with pytest.raises(TypeError):
        half("no number")  # pyright: ignore[reportArgumentType]
