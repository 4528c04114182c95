"""The parts of a pairs' report about amplified changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.report import figures
from vlmscope.report.page import Section, Table
from vlmscope.tasks.steps.report_parts import figure

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def amplify_sections(bench: Bench, folder: Path) -> list[Section]:
    """What amplifying the change within pairs does to either side."""
    sections: list[Section] = []
    for name, curves in bench.record("amplify")["curves"].items():
        drawn = figures.dose_response(
            curves, folder / f"amplify_{name}.png", "strength (1 = mean change in training pairs)", "new answer (%)"
        )
        words = ("logit gap, counterfactual's word minus original's", "probability of the counterfactual's word")
        rows = tuple(
            (side, *(bench.metrics[f"amplify/{name}/{side}/{key}"] for key in ("logit_gap", "p_counterfactual")))
            for side in ("original", "counterfactual")
        )
        sections += [
            Table(f"Before any edit: {name}", ("side", *words), rows),
            figure(f"Amplified: {name}", drawn, "Share answered with the counterfactual's word, by strength"),
        ]
    return sections


def amplify_summary(bench: Bench) -> str:
    """The strength that parts the two sides most, in a sentence a question."""
    parts = []
    for name, curves in bench.record("amplify")["curves"].items():
        sides = {curve.name: curve for curve in curves}
        freed, spilled = sides["counterfactual"], sides["original"]
        at = int(np.argmax(np.array(freed.y) - np.array(spilled.y)))
        parts.append(
            f"{name}: at strength {freed.x[at]:g} the counterfactual's word is the answer to {freed.y[at]:.0%} of the "
            f"counterfactuals and {spilled.y[at]:.0%} of the originals; without an edit, to "
            f"{bench.metrics[f'base/{name}/counterfactual/accuracy']:.0%} of the counterfactuals"
        )
    return "; ".join(parts) + "."
