"""The jobs of a sweep as records, read from their run folders, and their table."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmscope.core.artifacts import read_json, write_text

SEED = "seed="  # an override with this key makes a repetition, not another setting


@dataclass(frozen=True)
class SweepJob:
    """One job.

    Attributes:
        settings: what it sets beside the others, such as ("transcoder.k=8", "seed=1").
        metrics: name -> number, as in its `metrics.json`; None when it failed. A number that was not finite is left
        out.
    """

    settings: tuple[str, ...]
    metrics: Mapping[str, float] | None

    @property
    def group(self) -> str:
        """The settings without the seed: jobs of one group repeat each other."""
        return ", ".join(s for s in self.settings if not s.startswith(SEED)) or "all"


def read_jobs(settings: Mapping[Path, Sequence[str]]) -> list[SweepJob]:
    """The jobs of a sweep; `settings` maps each job's run folder to what it sets."""
    jobs = []
    for folder, found in settings.items():
        path = folder / "metrics.json"
        numbers = read_json(path) if path.is_file() else None
        metrics = None if numbers is None else {k: float(v) for k, v in numbers.items() if v is not None}
        jobs.append(SweepJob(tuple(found), metrics))
    return jobs


def differing(all_settings: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """What each job sets that not all of them set."""
    shared = set.intersection(*(set(found) for found in all_settings)) if len(all_settings) > 1 else set()
    return [tuple(s for s in found if s not in shared) for found in all_settings]


def write_table(jobs: Sequence[SweepJob], path: Path) -> None:
    """CSV: a row a job, with its settings, whether it finished, and every metric that any of them has."""
    names = sorted({name for job in jobs for name in job.metrics or {}})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["settings", "status", *names])
    for job in jobs:
        status = "failed" if job.metrics is None else "finished"
        writer.writerow([", ".join(job.settings), status, *((job.metrics or {}).get(name, "") for name in names)])
    write_text(path, out.getvalue())
