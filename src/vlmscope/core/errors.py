"""Exceptions that are told in one line, a mistake of the user or a failed check; checks of settings that raise them."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can mend: one line that says what is wrong, where, and what to do.

    `vlmscope.app` prints it as `error: ...` without a traceback and exits with code 2. Broken invariants of the
    program itself are `assert`s or other exceptions, which do show a traceback.
    """


class BadPicture(UserError):
    """A file cannot be decoded: nothing was computed from it; work may continue once it is mended."""

    def __init__(self, message: str, path: Path | None) -> None:
        super().__init__(message)
        self.path = path


def bad_picture(error: BaseException | None) -> Path | None:
    """The picture that an error, or one that caused it, found undecodable."""
    while error is not None and not isinstance(error, BadPicture):
        error = error.__cause__
    return error.path if error is not None else None


class NoRoom(UserError):
    """A disk or a quota is full: nothing that skips bad data may go on after it."""


_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the CPU or a GPU; torch raises `RuntimeError` for that, safetensors `OSError`."""
    named = isinstance(error, RuntimeError | OSError) and any(sign in str(error).lower() for sign in _NO_MEMORY)
    return named or isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """What an error of some library says, in one short line that can be printed."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return "".join(filter(str.isprintable, lines[0]))[:200]


class CheckFailed(Exception):
    """What a task was asked to check does not hold: one line that says what; nobody's mistake in typing.

    `vlmscope.app` records `metrics` as those of any task, prints the line without a traceback and exits with code 1.
    """

    def __init__(self, message: str, metrics: Mapping[str, float]) -> None:
        super().__init__(message)
        self.metrics = dict(metrics)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which SLURM, containers and `kill` send: handled as Ctrl-C is, but the exit code is 143."""


class NotMainRank(Exception):
    """Not an error: the work that this process shared is done, and the main process, rank 0, finishes alone."""


class RankLost(Exception):
    """Another process of those that work together ended or does not answer: one line that says what to do."""


def check_choice(key: str, value: str, allowed: Collection[str]) -> None:
    """Refuse a `value` that is not one of `allowed`, naming the nearest one."""
    if value not in allowed:
        near = get_close_matches(value, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(allowed)}"
        hint = "several values make a sweep; add -m" if "," in value else hint
        raise UserError(f"{key}={value}: no such choice; {hint}")


def check_least(group: str, settings: object, **least: float) -> None:
    """Refuse a setting of `settings` that is below its bound: `check_least("study", self, top=1)`. None passes."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if value is not None and not value >= bound:
            raise UserError(f"{group}.{name}={value}: it must be at least {bound}")
