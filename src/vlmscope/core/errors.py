"""Exceptions that are reported in one line, such as usage errors and failed checks, and checks of settings."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct: one line that says what is wrong, where, and what to do.

    `vlmscope.app` prints it as `error: ...` without a traceback and exits with code 2. Broken invariants of the program
    are `assert`s or other exceptions, which show a traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """The one line that IPython shows in a notebook."""
        return [f"error: {self}"]


class BadPicture(UserError):
    """A file that cannot be decoded; nothing was computed from it, so work can resume once it is repaired."""

    def __init__(self, message: str, path: Path | None) -> None:
        super().__init__(message)
        self.path = path


def bad_picture(error: BaseException | None) -> Path | None:
    """Path of the undecodable picture that caused an error, directly or indirectly; None if none did."""
    while error is not None and not isinstance(error, BadPicture):
        error = error.__cause__
    return error.path if error is not None else None


class NoRoom(UserError):
    """A disk or quota is full; code that skips bad data must not skip this error."""


_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or a GPU."""
    # torch raises RuntimeError for that, safetensors OSError.
    named = isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in _NO_MEMORY)
    return named or isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """First line of an error's message, printable characters only, at most 200."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(filter(str.isprintable, lines[0]))[:200]


class CheckFailed(Exception):
    """A property that a task checks does not hold; the message says in one line which.

    `vlmscope.app` records `metrics` as for any task, prints the line without a traceback and exits with code 1.
    """

    def __init__(self, message: str, metrics: Mapping[str, float]) -> None:
        super().__init__(message)
        self.metrics = dict(metrics)


class Terminated(KeyboardInterrupt):
    """SIGTERM, sent by SLURM, containers and `kill`: handled like Ctrl-C, with exit code 143."""


class NotMainRank(Exception):
    """Not an error: the shared work is done, and the main process, rank 0, finishes alone."""


class RankLost(Exception):
    """Another rank ended or does not answer; the message says in one line what to do."""


def check_choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise `UserError` for a `value` that is not one of `allowed`, with the nearest one as a hint."""
    if value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(allowed)}"
        hint = "several values make a sweep; add -m" if "," in value else hint
        raise UserError(f"{key}={value}: no such choice; {hint}")


def check_least(group: str, settings: object, **least: float) -> None:
    """Raise `UserError` for an attribute below its bound, as in `check_least("study", self, top=1)`; None passes."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:  # not `<`, which NaN would pass
            raise UserError(f"{group}.{name}={value}: it must be at least {bound}")
