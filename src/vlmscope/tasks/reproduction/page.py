"""The summary page of task=reproduce, and the ranges that repeated seeds gave."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import write_json, write_text
from vlmscope.core.runs import Reproduced
from vlmscope.metrics.causal import RULE, half_width, suggested_range
from vlmscope.report.page import Card, Cards, Experiments, ReportPage, Section, Text, duration, mapping_table
from vlmscope.report.thumbnails import decode, enlarge, png_bytes
from vlmscope.tracking.client import git_state, package_versions

_THUMB = 380  # pixels of the longer edge: twice the width at which it is shown
_COLOURS = 64


def key_picture(folder: Path, figure: str | None) -> bytes | None:
    """A small PNG of the figure that the experiment names, else of the first that it drew; None without one."""
    named = folder / "figures" / figure if figure is not None else None
    files = [named] if named is not None and named.is_file() else sorted(folder.joinpath("figures").glob("*.png"))
    if not files:
        return None
    return png_bytes(enlarge(decode(files[0].read_bytes()), _THUMB).quantize(_COLOURS))


def write_page(run_dir: Path, overrides: Sequence[str], found: Sequence[Reproduced]) -> Path:
    """Write summary.html; returns its path."""
    numbers = [number for one in found for number in one.numbers if not one.problem]
    good, whole = sum(number.holds for number in numbers), sum(one.holds for one in found)
    failed = sum(bool(one.problem) for one in found)
    total = sum(one.seconds or 0.0 for one in found)
    sections: list[Section] = [
        Cards(
            "In short",
            (
                Card("experiments as stated", f"{whole} of {len(found)}", f"{failed} failed" if failed else ""),
                Card("numbers in range", f"{good} of {len(numbers)}", "against the ranges that their files state"),
                Card("time", duration(total), f"{os.cpu_count()} cores, one experiment after another"),
            ),
        ),
        Experiments(
            "Experiments",
            tuple(sorted(found, key=lambda one: one.holds)),
            "What is out of range comes first. Small print: 95 % interval, and the control: the same with matched "
            "random features, or in random order (the hollow diamond).",
        ),
        _reading(),
        mapping_table("Machine and versions", _machine(), ("what", "here")),
        Text("Run it again", code=" ".join(["python run.py", *overrides])),
    ]
    page = ReportPage(
        title="What the paper reports, what Orrery shows",
        question=(
            "Every experiment that needs no training, run on the shipped model and transcoders, each headline number "
            "held against the range that its file states."
        ),
        summary=_summary(found, good, len(numbers), total),
        sections=tuple(sections),
        footer=f"vlmscope · task=reproduce · {run_dir.name}",
    )
    return page.write(run_dir / "summary.html")


def _summary(found: Sequence[Reproduced], good: int, count: int, total: float) -> str:
    off = [one.label for one in found if not one.holds]
    said = (
        f"{len(found)} experiments ran and all {count} headline numbers lie in their ranges"
        if not off
        else f"{len(off)} of {len(found)} experiments did not come out as stated ({', '.join(off)}); "
        f"{good} of {count} headline numbers lie in their ranges"
    )
    return f"{said}. {duration(total)} on {_processor()}, {os.cpu_count()} cores."


def _reading() -> Text:
    return Text(
        "How to read this",
        (
            "The paper studies Gemma-3-4B-it; these numbers are of Orrery, a small model of the same classes whose "
            "tasks mirror the paper's case studies. So what can agree is the finding, not the figure.",
            "A range comes from three seeds of the pictures, pairs and controls on these assets, widened by the "
            "interval of one run or the spread between them (docs/reproduce.md). It is meant to hold another seed and "
            "to be missed by a broken build.",
        ),
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in names if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _machine() -> dict[str, Any]:
    commit, changed = git_state()
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": platform.system() + " " + platform.machine(),
        "commit": commit + (" with changes" if changed else ""),
        **package_versions(),
    }


def ranges_of(found: Sequence[Reproduced]) -> dict[str, dict[str, Any]]:
    """Experiment -> metric -> what the seeds gave, what is stated, and the range that they suggest."""
    table: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(one.name for one in found):
        runs = [one for one in found if one.name == name and not one.problem]
        for at, stated in enumerate(runs[0].numbers if runs else ()):
            same = [one.numbers[at] for one in runs]
            values = [number.value for number in same if number.value is not None]
            halves = [half_width(n.rate.value, n.rate.ci_low, n.rate.ci_high) for n in same if n.rate is not None]
            low, high = suggested_range(values, halves, stated.share) if values else (None, None)
            table.setdefault(name, {})[stated.metric] = {
                "values": {one.label: one.numbers[at].value for one in runs},
                "half_widths": halves,
                "stated": [stated.low, stated.high],
                "suggested": [low, high],
                "says": stated.says,
            }
    return table


def write_ranges(run_dir: Path, found: Sequence[Reproduced]) -> None:
    """Write ranges.json, and ranges.yaml with blocks that can be pasted into the experiments."""
    table = ranges_of(found)
    write_json(run_dir / "ranges.json", {"rule": RULE, "experiments": table})
    lines = [f"# {RULE}"]
    for name, metrics in table.items():
        lines += [f"# experiments/{name}.yaml", "headline:"]
        for metric, one in metrics.items():
            low, high = one["suggested"]
            says = json.dumps(one["says"], ensure_ascii=False)  # a quoted string is the same in YAML
            lines.append(f"  {metric}: {{low: {low}, high: {high}, says: {says}}}")
    write_text(run_dir / "ranges.yaml", "\n".join(lines) + "\n")
