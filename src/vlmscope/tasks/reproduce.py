"""Run every experiment that needs no training, compare its numbers with their ranges, and show all on one page."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from vlmscope.config import AppConfig
from vlmscope.config.schema import numbers_of
from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import CheckFailed
from vlmscope.core.results import Reproduced
from vlmscope.report.reproduction import key_picture, write_page, write_ranges
from vlmscope.tasks.registry import RunContext
from vlmscope.tasks.reproduction import Ended, Job, finished, planned, run_job
from vlmscope.tracking import sweep


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Run the experiments that this folder does not hold yet, and judge all of them.

    Raises:
        UserError: before any run: an experiment that does not compose or lacks its files.
        CheckFailed: afterwards: an experiment failed or a number lies outside its range.
    """
    results = _run_all(context, planned(cfg, context))
    if cfg.task.seeds:
        write_ranges(context.run_dir, results, cfg.seed)
    print(f"summary: {write_page(context.run_dir, context.overrides, results)}")
    numbers = [(result.label, number) for result in results for number in result.numbers]
    metrics = {
        "reproduce/experiments": float(len(results)),
        "reproduce/failed": float(sum(bool(result.problem) for result in results)),
        "reproduce/numbers": float(len(numbers)),
        "reproduce/out_of_range": float(sum(not number.holds for _, number in numbers)),
        "perf/reproduce_seconds": float(sum(result.seconds or 0.0 for result in results)),
    }
    metrics |= {f"{label}/{n.metric}": n.value for label, n in numbers if n.value is not None}
    wrong = []
    for result in results:
        if result.problem:
            wrong.append(f"{result.label} failed: {result.problem}")
        else:
            wrong += [f"{result.label}: {number.told}" for number in result.numbers if not number.holds]
    if wrong:
        raise CheckFailed("; ".join(wrong), metrics)
    return metrics


def _run_all(context: RunContext, jobs: list[Job]) -> list[Reproduced]:
    """The result of every job, run now or earlier in this folder."""
    run_dir = context.run_dir
    ended = {job.label: finished(run_dir, job.label, job.digest) for job in jobs}
    left = [job for job in jobs if ended[job.label] is None]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} are in {run_dir} already", flush=True)
    env = sweep.started_by(context.tracked.run_id, "reproduce")
    with tqdm(left, desc="experiments", unit="experiment") as bar:
        for job in bar:
            bar.set_postfix_str(job.label)
            end = ended[job.label] = run_job(run_dir, job.label, job.digest, job.overrides, env)
            result = _judged(run_dir, job, end)
            good = sum(number.holds for number in result.numbers)
            outcome = f"failed: {end.problem}" if end.problem else f"{good} of {len(result.numbers)} numbers in range"
            bar.write(f"{job.label}: {outcome} ({end.seconds:.0f} s)")
    return [_judged(run_dir, job, end) for job in jobs if (end := ended[job.label]) is not None]


def _judged(run_dir: Path, job: Job, end: Ended) -> Reproduced:
    folder, done = run_dir / job.label, end.code == 0
    metrics = read_json(folder / "metrics.json") if done else {}
    report = f"{job.label}/report.html" if (folder / "report.html").is_file() else None
    return Reproduced(
        job.name, job.label, job.question, job.cfg.paper or "", numbers_of(job.cfg.headline, metrics), end.seconds,
        end.problem, report, key_picture(folder, job.cfg.figure) if done else None,
    )  # fmt: skip
