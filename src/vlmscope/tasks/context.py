"""What a task is handed besides its configuration."""

from dataclasses import dataclass
from pathlib import Path

from vlmscope.tracking.run import TrackedRun


@dataclass(frozen=True)
class RunContext:
    """One run: its folder (it exists), where it is tracked, and the overrides that the user typed."""

    run_dir: Path
    tracked: TrackedRun
    overrides: tuple[str, ...] = ()
