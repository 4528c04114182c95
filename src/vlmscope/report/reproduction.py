"""The summary page of task=reproduce, and the ranges that repeated seeds gave."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import write_json, write_text
from vlmscope.core.launch import program
from vlmscope.core.results import Reproduced, toothless
from vlmscope.data.images import png_bytes
from vlmscope.metrics.rates import RULE, half_width, suggested_range
from vlmscope.report.page import Card, Cards, Experiments, ReportPage, Text, duration, mapping_table
from vlmscope.report.pictures import decode, enlarge
from vlmscope.tracking.client import git_state, package_versions

_THUMB = 380  # pixels of the longer edge: twice the width at which it is shown
_COLOURS = 64
_READING = (
    "The paper studies Gemma-3-4B-it; these numbers are of Orrery, a small model of the same classes whose tasks "
    "mirror the paper's case studies. So what can agree is the finding, not the figure.",
    "A range comes from three other seeds of the pictures, pairs and controls on these assets, widened by the interval "
    "of one run or the spread between them (docs/reproduce.md). It is meant to hold a seed that did not make it and to "
    "be missed by a broken build.",
)


def key_picture(folder: Path, figure: str | None) -> bytes | None:
    """A small PNG of the figure that the experiment names, else of the first that it drew; None without one."""
    named = folder / "figures" / figure if figure is not None else None
    files = [named] if named is not None and named.is_file() else sorted(folder.joinpath("figures").glob("*.png"))
    if not files:
        return None
    return png_bytes(enlarge(decode(files[0].read_bytes()), _THUMB).quantize(_COLOURS))


def write_page(run_dir: Path, overrides: Sequence[str], results: Sequence[Reproduced]) -> Path:
    """Write summary.html; returns its path."""
    numbers = [number for result in results for number in result.numbers if not result.problem]
    good, count = sum(number.holds for number in numbers), len(numbers)
    failed = sum(bool(result.problem) for result in results)
    off = [result.label for result in results if not result.holds]
    total = duration(sum(result.seconds or 0.0 for result in results))
    machine = _machine()
    summary = f"{len(results)} experiments ran and all {count} headline numbers lie in their ranges"
    if off:
        summary = (
            f"{len(off)} of {len(results)} experiments did not come out as stated ({', '.join(off)}); "
            f"{good} of {count} headline numbers lie in their ranges"
        )
    cards = (
        Card(
            "experiments as stated", f"{len(results) - len(off)} of {len(results)}", f"{failed} failed" * bool(failed)
        ),
        Card("numbers in range", f"{good} of {count}", "against the ranges that their files state"),
        Card("time", total, f"{os.cpu_count()} cores, one experiment after another"),
    )
    note = (
        "What is out of range comes first. Small print: 95 % interval, and the control: the same with matched "
        "random features, or in random order (the hollow diamond)."
    )
    page = ReportPage(
        title="What the paper reports, what Orrery shows",
        question=(
            "Every experiment that needs no training, run on the shipped model and transcoders, each headline number "
            "held against the range that its file states."
        ),
        summary=f"{summary}. {total} on {machine['processor']}.",
        sections=(
            Cards("In short", cards),
            Experiments("Experiments", tuple(sorted(results, key=lambda result: result.holds)), note),
            Text("How to read this", _READING),
            mapping_table("Machine and versions", machine, ("what", "here")),
            Text("Run it again", code=" ".join([program(), *overrides])),
        ),
        footer=f"vlmscope · task=reproduce · {run_dir.name}",
    )
    return page.write(run_dir / "summary.html")


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    commit, changed = git_state()
    return {
        "processor": f"{named or platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "system": platform.system() + " " + platform.machine(),
        "commit": commit + (" with changes" if changed else ""),
        **package_versions(),
    }


def write_ranges(run_dir: Path, results: Sequence[Reproduced], tested: int) -> None:
    """Write ranges.json, and ranges.yaml with blocks that can be pasted into the experiments.

    By experiment and metric: the values of all seeds, the stated range, and the range that the values suggest, with its
    width. Values of the seed `tested`, on which the ranges are judged, make none of them; whether the suggested range
    `holds` them is told.
    """
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(result.name for result in results):
        runs = [result for result in results if result.name == name and not result.problem]
        for i, stated in enumerate(runs[0].numbers if runs else ()):
            seeds = {run.label: run.numbers[i] for run in runs}
            held_out = seeds.get(f"{name}_seed_{tested}")
            makers = [number for number in seeds.values() if number is not held_out]
            values = [number.value for number in makers if number.value is not None]
            rates = [number.rate for number in makers if number.rate is not None]
            halves = [half_width(rate.value, rate.ci_low, rate.ci_high) for rate in rates]
            made = suggested_range(values, halves, stated.share) if values else None
            tried = None if held_out is None else held_out.value
            table.setdefault(name, {})[stated.metric] = {
                "values": {label: number.value for label, number in seeds.items()},
                "half_widths": halves,
                "stated": [stated.low, stated.high],
                "suggested": list(made or (None, None)),
                "width": made and made[1] - made[0],
                "holds": None if made is None or tried is None else made[0] <= tried <= made[1],
                "says": stated.says,
            }
    write_json(run_dir / "ranges.json", {"rule": RULE, "tested": tested, "experiments": table})
    lines = [f"# {RULE}"]
    for name, metrics in table.items():
        lines += [f"# experiments/{name}.yaml", "headline:"]
        for metric, row in metrics.items():
            low, high = row["suggested"]
            says = json.dumps(row["says"], ensure_ascii=False)  # a quoted string is the same in YAML
            wide = low is not None and toothless(low, high)
            note = "  # too wide to be missed: measure more cases, or say why" * wide
            lines.append(f"  {metric}: {{low: {low}, high: {high}, says: {says}}}{note}")
    write_text(run_dir / "ranges.yaml", "\n".join(lines) + "\n")
