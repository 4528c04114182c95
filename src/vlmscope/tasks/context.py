"""What a task is handed besides its configuration."""

from dataclasses import dataclass
from pathlib import Path

from vlmscope.tracking.run import TrackedRun


@dataclass(frozen=True)
class RunContext:
    """One run: its folder (it exists), where it is tracked, and the overrides that the user typed.

    `per_host` is how many of the processes that share the run stand on one host; None where it runs alone.
    """

    run_dir: Path
    tracked: TrackedRun
    overrides: tuple[str, ...] = ()
    per_host: int | None = None
