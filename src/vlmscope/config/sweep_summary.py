"""What a sweep leaves behind beside its jobs: a table of all of them and, for transcoders, a figure."""

from pathlib import Path

from vlmscope.config.store import OVERRIDES, job_settings
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.sweep import differing, read_jobs, write_table


def summarise(folder: Path) -> list[Path]:
    """Write `sweep.csv` and perhaps `figures/sweep.png` into a sweep's folder; returns what was written.

    A job that failed is a row without numbers. Folders that are no jobs are passed over.
    """
    found = {path.parent: job_settings(read_yaml(path)) for path in sorted(folder.glob(f"*/{OVERRIDES}"), key=_number)}
    if not found:
        return []
    jobs = read_jobs(dict(zip(found, differing(list(found.values())), strict=True)))
    table = folder / "sweep.csv"
    write_table(jobs, table)
    written = [table]
    if any(name.startswith("layers/fvu/") for job in jobs for name in job.metrics or {}):
        from vlmscope.report.sweep_figure import sweep_overview  # drawing takes a second to import

        written.append(sweep_overview(jobs, folder / "figures" / "sweep.png"))
    return written


def _number(path: Path) -> tuple[int, str]:
    """Jobs in their order: 2 before 10."""
    name = path.parent.name
    return (int(name) if name.isdigit() else -1, name)
