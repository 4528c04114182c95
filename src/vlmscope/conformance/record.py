"""One identity, checked: what it says, how far it was off, whether that is within its tolerance, and the time taken."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

TOLERANCE = 1e-9  # of the sum of |incoming edges|, in float64 under `exact_float64`

_Subject = TypeVar("_Subject")
_Args = ParamSpec("_Args")


class Skipped(Exception):
    """Raised by a check that has nothing to look at here; its text says why."""


@dataclass(frozen=True)
class Check:
    """The outcome of one identity.

    Attributes:
        name: short name, as in the table and in `metrics.json`.
        claim: what it says, in one line.
        error: the largest error found (for `at_least`, the effect measured); None when skipped.
        tolerance: what the error may not exceed (for `at_least`, must exceed).
        seconds: time taken.
        at_least: whether `error` must lie above `tolerance` instead of below.
        reason: why it was skipped, "" when it was not.
    """

    name: str
    claim: str
    error: float | None
    tolerance: float
    seconds: float
    at_least: bool = False
    reason: str = ""

    @property
    def skipped(self) -> bool:
        """Whether nothing was measured."""
        return self.error is None

    @property
    def held(self) -> bool:
        """Whether it was measured and holds; NaN never does."""
        if self.error is None:
            return False
        return self.error > self.tolerance if self.at_least else self.error <= self.tolerance

    @property
    def failed(self) -> bool:
        """Whether it was measured and does not hold."""
        return not self.skipped and not self.held


def check(
    name: str, claim: str, tolerance: float = TOLERANCE, *, at_least: bool = False
) -> Callable[[Callable[Concatenate[_Subject, _Args], float]], Callable[Concatenate[_Subject, _Args], Check]]:
    """Turn a function that measures an error, or raises `Skipped`, into one that returns a `Check`.

    Args:
        name: see `Check`.
        claim: see `Check`.
        tolerance: see `Check`.
        at_least: see `Check`.
    """

    def decorate(
        measure: Callable[Concatenate[_Subject, _Args], float],
    ) -> Callable[Concatenate[_Subject, _Args], Check]:
        @wraps(measure)
        def run(subject: _Subject, *args: _Args.args, **kwargs: _Args.kwargs) -> Check:
            start = time.perf_counter()
            error, reason = None, ""
            try:
                error = float(measure(subject, *args, **kwargs))
            except Skipped as skipped:
                reason = str(skipped)
            return Check(name, claim, error, tolerance, time.perf_counter() - start, at_least, reason)

        return run

    return decorate
