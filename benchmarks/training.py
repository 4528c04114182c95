"""Transcoder training against eai-sparsify on the same model, data and shapes: `python benchmarks/training.py`.

Every measurement is a process of its own (`training_worker.py`), and the two trainers take turns, so that what else the
machine does falls on both. Records are appended to OUT/records.jsonl; a run goes on where the last one stopped, and
prints its tables from all records. `--quick` takes under 4 minutes once the data is prepared.

The peer is not a dependency of vlmscope. Install it beside, without its dependencies that are here already:

    pip install --no-deps --target outputs/benchmarks/sparsify-site \
        eai-sparsify==1.3.3 einops natsort schedulefree simple-parsing docstring-parser
    pip install accelerate

Its Trainer knows `input_ids` alone. So the two are compared end to end on text (all layers of Orrery, packed text), and
on pictures from captured activations of one layer, which its own Trainer reads through a model that looks them up.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
HERE = Path(__file__).parent
NARROW = {"batch": 2048, "width": 128, "latents": 2048, "k": 16}
WIDE = {"batch": 1024, "width": 640, "latents": 10240, "k": 32}
WHO = {
    "ours": {"who": "ours"},
    "ours, half the steps": {"who": "ours", "share": 0.5},
    "ours, a third of the steps": {"who": "ours", "share": 1 / 3},
    "sparsify (signum)": {"who": "peer", "optimizer": "signum"},
    "sparsify (Adam)": {"who": "peer", "optimizer": "adam"},
    # Its own choice of rate is 1.41e-2 here; these two say what a search as ours would have found.
    "sparsify (signum, half the rate)": {"who": "peer", "optimizer": "signum", "lr": 7.07e-3},
    "sparsify (signum, a quarter of the rate)": {"who": "peer", "optimizer": "signum", "lr": 3.54e-3},
}


def jobs(quick: bool, reps: int, long_threads: int, clock: str) -> Iterator[Record]:
    """What is to be measured, repetitions outermost; runs that are judged have `long_threads` threads."""

    def job(stage: str, name: str, threads: int, shape: dict[str, int], steps: int, marks: int, rep: int) -> Record:
        who = dict(WHO.get(name, {}))
        steps = round(steps * who.pop("share", 1))
        return {
            "stage": stage,
            "name": name,
            "threads": threads,
            "rep": rep,
            "steps": steps,
            "marks": marks,
            "clock": clock,
            **shape,
            **who,
        }

    pairs = ("ours", "sparsify (Adam)")
    for rep in range(reps):
        if quick:
            yield job("kernels", "", 1, NARROW, 20, 0, rep)
            for name in ("ours", "sparsify (signum)"):
                yield job("pictures", name, 1, NARROW, 100, 10, rep)
            continue
        for threads in (1, 2):
            for shape in (NARROW, WIDE):
                yield job("kernels", "", threads, shape, 15 if shape is NARROW else 5, 0, rep)
        for name in WHO:
            yield job("pictures", name, long_threads, NARROW, 240, 12, rep)
        for threads in (1, 2):
            for name in pairs:
                yield job("pictures", name, threads, WIDE, 15, 0, rep)
        for name in pairs:
            yield job("pictures", name, 1, NARROW, 30, 0, rep)
        yield job("layers", "", 1, NARROW, 12, 0, rep)
        for name in ("ours", "ours, half the steps", "sparsify (signum)"):
            yield job("text", name, long_threads, NARROW, 40, 5, rep)


def measure(job: Record, given: argparse.Namespace) -> Record:
    """Run one job in a process of its own."""
    threads = str(job["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    asked = {**job, "folder": str(given.out), "peer_site": str(given.peer_site)}
    command = [sys.executable, str(HERE / "training_worker.py"), json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RECORD ")]
    if done.returncode or not lines:
        sys.exit(f"{job['stage']} {job['name']} failed:\n{done.stderr[-3000:]}")
    return {**json.loads(lines[-1].removeprefix("RECORD ")), "job": job}


def median(rows: Sequence[Record], value: Callable[[Record], float]) -> float:
    """The median over repetitions."""
    return statistics.median(value(row) for row in rows)


def cell(rows: Sequence[Record], value: Callable[[Record], float], form: str) -> str:
    """Median (lowest to highest) in Markdown."""
    found = sorted(value(row) for row in rows)
    return f"{statistics.median(found):{form}} ({found[0]:{form}} to {found[-1]:{form}})"


def seconds_to(curve: Sequence[Sequence[float]], target: float) -> float | None:
    """When a run's FVU first was the target, between its marks by straight lines; None when it never was."""
    for (_, before, high), (_, after, low) in zip(curve, curve[1:], strict=False):
        if low <= target:
            share = (high - target) / (high - low) if high > target else 0.0
            return before + share * (after - before)
    return None


def grouped(records: Sequence[Record], stage: str) -> dict[tuple[int, int], dict[str, list[Record]]]:
    """(threads, width) -> who -> repetitions."""
    found: dict[tuple[int, int], dict[str, list[Record]]] = {}
    for one in records:
        if one["stage"] == stage:
            found.setdefault((one["threads"], one["width"]), {}).setdefault(one["job"]["name"], []).append(one)
    return dict(sorted(found.items()))


def run_table(records: Sequence[Record], stage: str) -> list[str]:
    """A line a trainer: speed, memory and where it ended."""
    lines = ["| threads | width | trainer | n | ms a step | tokens/s | MB above start | steps | FVU at the end |"]
    lines.append("| --- " * 9 + "|")
    for (threads, width), runs in grouped(records, stage).items():
        for name, rows in runs.items():
            end = cell(rows, lambda r: r["curve"][-1][2], ".4f") if rows[0]["curve"] else "-"
            lines.append(
                f"| {threads} | {width} | {name} | {len(rows)} | {cell(rows, lambda r: 1e3 * r['step_s'], '.0f')} | "
                f"{median(rows, lambda r: r['tokens'] / r['step_s']):,.0f} | "
                f"{cell(rows, lambda r: (r['peak'] - r['before']) / 1e6, '.0f')} | {rows[0]['steps']} | {end} |"
            )
    return lines


def kernel_table(records: Sequence[Record]) -> list[str]:
    """A line a shape: the step without the optimiser against its roofline and the peer's."""
    lines = ["| threads | width | n | ours, ms | sparsify, ms | product, ms | sparse passes, ms | of the roofline |"]
    lines.append("| --- " * 8 + "|")
    for (threads, width), runs in grouped(records, "kernels").items():
        rows = runs[""]
        columns = " | ".join(f"{1e3 * median(rows, lambda r, k=k: r[k]):.1f}" for k in _KERNELS)
        share = cell(rows, lambda r: r["roofline_s"] / r["ours_s"], ".0%")
        lines.append(f"| {threads} | {width} | {len(rows)} | {columns} | {share} |")
    return lines


_KERNELS = ("ours_s", "peer_s", "product_s", "sparse_s")


def ratios(records: Sequence[Record]) -> list[str]:
    """The goals, a line each: ours over the peer's, medians."""
    lines: list[str] = []
    for stage in ("pictures", "text"):
        for (threads, width), runs in grouped(records, stage).items():
            where = f"{stage}, width {width}, {threads} thread(s)"
            own = next((n for n in runs if n.startswith("ours")), None)
            for name in (n for n in runs if n.startswith("sparsify")):
                if own is None:
                    continue
                one, other = runs[own], runs[name]
                step = median(one, lambda r: r["step_s"]) / median(other, lambda r: r["step_s"])
                peak = median(one, lambda r: r["peak"]) / median(other, lambda r: r["peak"])
                lines.append(f"{where}: time a step {step:.2f}, peak memory {peak:.2f} of {name}'s")
                lines += [f"{where}: {text}" for text in time_to(runs, name)]
    for (threads, width), runs in grouped(records, "kernels").items():
        share = median(runs[""], lambda r: r["roofline_s"] / r["ours_s"])
        step = median(runs[""], lambda r: r["ours_s"] / r["peer_s"])
        where = f"coder's step without optimiser, width {width}, {threads} thread(s)"
        lines.append(f"{where}: {share:.0%} of the roofline, {step:.2f} of sparsify's time")
    for (threads, _width), runs in grouped(records, "layers").items():
        share = median(runs[""], lambda r: r["together_s"] / r["alone_s"])
        lines.append(f"all layers together, {threads} thread(s): {share:.2f} of the sum of single layers")
    return lines


def time_to(runs: dict[str, list[Record]], name: str) -> Iterator[str]:
    """Seconds until ours has the FVU that the peer ends with, of the peer's seconds."""
    if not runs[name][0]["curve"]:
        return
    target = median(runs[name], lambda r: r["curve"][-1][2])
    whole = median(runs[name], lambda r: r["curve"][-1][1])
    for who in (n for n in runs if n.startswith("ours") and runs[n][0]["curve"]):
        found = [seconds_to(r["curve"], target) for r in runs[who]]
        reached = [seconds for seconds in found if seconds is not None]
        if len(reached) * 2 <= len(found):
            yield f"{who} does not reach {name}'s FVU {target:.4f}"
        else:
            yield f"{who} reaches {name}'s FVU {target:.4f} in {statistics.median(reached) / whole:.2f} of its time"


def figure(records: Sequence[Record], path: Path) -> None:
    """FVU against tokens and against seconds, pictures above, text below: every repetition a line."""
    from matplotlib.ticker import StrMethodFormatter

    from vlmscope.report.figures import COLOURS, LINES, drawing

    with drawing(path, 9.0, 6.4) as drawn:
        axes = drawn.subplots(2, 2, sharey="row")
        for row, stage in enumerate(("pictures", "text")):
            longest = [one for one in records if one["stage"] == stage and one["curve"]]
            runs = next(iter(grouped(longest, stage).values()), {})
            for number, (name, rows) in enumerate(runs.items()):
                look = {"color": COLOURS[number], "linestyle": LINES[number], "linewidth": 1.2}
                for rep, one in enumerate(rows):
                    steps, seconds, fvus = zip(*one["curve"], strict=True)
                    shown = name if rep == 0 else None
                    axes[row, 0].plot([s * one["tokens"] / 1e3 for s in steps], fvus, label=shown, **look)
                    axes[row, 1].plot(seconds, fvus, **look)
            axes[row, 0].set(ylabel=f"FVU, {stage}", yscale="log", xlabel="thousand tokens")
            for ticks in ("major", "minor"):
                getattr(axes[row, 0].yaxis, f"set_{ticks}_formatter")(StrMethodFormatter("{x:g}"))
            axes[row, 1].set(xlabel="seconds")
            axes[row, 0].legend()


def main() -> None:
    """Measure what is missing, print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the narrow shape on one thread, under 4 minutes")
    parser.add_argument("--reps", type=int, default=5, help="repetitions")
    parser.add_argument("--only", choices=("pictures", "text", "layers", "kernels"), help="one part")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no measurement after so long")
    parser.add_argument("--trainers", nargs="+", choices=list(WHO), help="these alone")
    parser.add_argument("--threads", type=int, default=2, help="threads of the runs that are judged")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where other work runs besides")
    parser.add_argument("--data", type=Path, default=Path("outputs/data/orrery"), help="Orrery's shards")
    parser.add_argument("--peer-site", type=Path, default=Path("outputs/benchmarks/sparsify-site"), help="see above")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/training"), help="data and records")
    parser.add_argument("--figure", type=Path, help="draw the curves there (.png)")
    given = parser.parse_args()
    if not (given.peer_site / "sparsify").is_dir():
        sys.exit(f"{given.peer_site}: no sparsify there; install it as the top of {__file__} says, or give --peer-site")
    if not (given.out / "text.safetensors").exists():
        command = "import sys, pathlib, training_data as t; t.prepare(*map(pathlib.Path, sys.argv[1:]))"
        subprocess.run(
            [sys.executable, "-c", command, str(given.data.resolve()), str(given.out.resolve())], cwd=HERE, check=True
        )
    start, kept = time.monotonic(), given.out / ("quick.jsonl" if given.quick else "records.jsonl")
    records: list[Record] = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = [one["job"] for one in records]
    for job in jobs(given.quick, given.reps, given.threads, given.clock):
        left_out = given.trainers and job["name"] not in given.trainers
        if job in known or left_out or (given.only and job["stage"] != given.only):
            continue
        if time.monotonic() - start > given.minutes * 60:
            print("stopped for time; run again to go on")
            break
        began = time.monotonic()
        records.append(measure(job, given))
        with kept.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(
            f"{job['stage']} {job['name']} rep {job['rep']}: {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores, python {platform.python_version()}"
    print(f"{machine}; medians (lowest to highest)\n")
    for stage in ("pictures", "text"):
        print(f"{stage}:\n\n" + "\n".join(run_table(records, stage)) + "\n")
    print("the coder's step without the optimiser:\n\n" + "\n".join(kernel_table(records)) + "\n")
    print("\n".join(ratios(records)))
    if given.figure:
        figure(records, given.figure)


if __name__ == "__main__":
    main()
