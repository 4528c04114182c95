"""Run every experiment that needs no training, hold its numbers against their ranges, and show all on one page."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vlmscope.config import AppConfig
    from vlmscope.core.runs import Reproduced
    from vlmscope.tasks.context import RunContext
    from vlmscope.tasks.reproduction.jobs import Ended
    from vlmscope.tasks.reproduction.plan import Job

RESUMES = True


@dataclass
class Config:
    """`only` names experiments that say `reproduce: true` (empty: all of them); `seeds` repeats each with these seeds,
    and writes the ranges that its numbers had.
    """

    only: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Run what this folder does not hold yet, and judge everything.

    Raises:
        UserError: before anything runs: an experiment that does not compose or lacks its files.
        CheckFailed: afterwards: an experiment failed or a number lies outside its range.
    """
    from vlmscope.core.errors import CheckFailed
    from vlmscope.tasks.reproduction.page import write_page, write_ranges
    from vlmscope.tasks.reproduction.plan import planned

    jobs = planned(cfg, context)
    ended = _run_all(cfg, context, jobs)
    found = [_judged(context.run_dir, job, how) for job, how in zip(jobs, ended, strict=True)]
    if cfg.task.seeds:
        write_ranges(context.run_dir, found)
    print(f"summary: {write_page(context.run_dir, context.overrides, found)}")
    metrics = _metrics(found)
    wrong = [told for one in found for told in _wrong(one)]
    if wrong:
        raise CheckFailed("; ".join(wrong), metrics)
    return metrics


def _run_all(cfg: "AppConfig", context: "RunContext", jobs: "list[Job]") -> "list[Ended]":
    """How every job ended, now or in an earlier run in this folder."""
    from tqdm import tqdm

    from vlmscope.tasks.reproduction.jobs import finished, run_job
    from vlmscope.tracking import sweep

    run_dir = context.run_dir
    before = {job.label: finished(run_dir, job.label, job.digest) for job in jobs}
    left = [job for job in jobs if before[job.label] is None]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} are in {run_dir} already", flush=True)
    data = _shards(run_dir) if any(job.needs_shards for job in left) else ()
    env = sweep.started_by(context.tracked.run_id, "reproduce")
    ended = dict(before)
    with tqdm(left, desc="experiments", unit="experiment") as bar:
        for job in bar:
            bar.set_postfix_str(job.label)
            own = data if job.needs_shards else ()
            how = ended[job.label] = run_job(run_dir, job.label, job.digest, (*job.overrides, *own), env)
            bar.write(_line(_judged(run_dir, job, how)))
    return [how for job in jobs if (how := ended[job.label]) is not None]


def _shards(run_dir: "Path") -> tuple[str, ...]:
    """Render the 2,000 validation scenes into the run folder; returns the override that names them.

    They are those of task=build_data, to the byte.

    Raises:
        RuntimeError: that failed.
    """
    import shutil

    from vlmscope.config.resolve import quote
    from vlmscope.data.orrery.scenes import KINDS
    from vlmscope.tasks.reproduction.jobs import finished, run_job
    from vlmscope.tasks.reproduction.plan import SHARDS, base_digest

    print("no shards of Orrery's validation scenes (task=build_data writes them): rendering those 2,000", flush=True)
    where = f"data.path={quote(str(run_dir / SHARDS / 'data'))}"
    none = [f"task.{split}={{{','.join(f'{kind}:0' for kind in KINDS)}}}" for split in ("train", "test")]
    digest = base_digest()
    if finished(run_dir, SHARDS, digest) is None:
        shutil.rmtree(run_dir / SHARDS / "data", ignore_errors=True)  # of other code, or not complete
        how = run_job(run_dir, SHARDS, digest, ["task=build_data", "tracking=none", where, *none], {})
        if how.code:
            raise RuntimeError(f"the validation scenes could not be rendered: {how.problem}")
    return (where,)


def _judged(run_dir: "Path", job: "Job", how: "Ended") -> "Reproduced":
    from vlmscope.core.artifacts import read_json
    from vlmscope.core.runs import Reproduced
    from vlmscope.tasks.headline_numbers import numbers_of
    from vlmscope.tasks.reproduction.page import key_picture

    folder = run_dir / job.label
    metrics = read_json(folder / "metrics.json") if how.code == 0 else {}
    report = f"{job.label}/report.html" if (folder / "report.html").is_file() else None
    return Reproduced(
        job.name, job.label, job.question, job.cfg.paper or "", numbers_of(job.cfg.headline, metrics), how.seconds,
        how.problem, report, key_picture(folder, job.cfg.figure) if how.code == 0 else None,
    )  # fmt: skip


def _line(one: "Reproduced") -> str:
    good = sum(number.holds for number in one.numbers)
    said = f"failed: {one.problem}" if one.problem else f"{good} of {len(one.numbers)} numbers in range"
    return f"{one.label}: {said} ({one.seconds:.0f} s)"


def _wrong(one: "Reproduced") -> list[str]:
    if one.problem:
        return [f"{one.label} failed: {one.problem}"]
    return [f"{one.label}: {number.told}" for number in one.numbers if not number.holds]


def _metrics(found: "list[Reproduced]") -> dict[str, float]:
    """Counts under reproduce/, and every headline number as `<experiment>/<metric>`."""
    numbers = [(one.label, number) for one in found for number in one.numbers]
    metrics = {
        "reproduce/experiments": float(len(found)),
        "reproduce/failed": float(sum(bool(one.problem) for one in found)),
        "reproduce/numbers": float(len(numbers)),
        "reproduce/out_of_range": float(sum(not number.holds for _, number in numbers)),
        "perf/reproduce_seconds": float(sum(one.seconds or 0.0 for one in found)),
    }
    return metrics | {f"{label}/{n.metric}": n.value for label, n in numbers if n.value is not None}
