"""Figures and report.html of predicted against measured effects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmscope.metrics.prediction import Agreement
from vlmscope.report.experiment_figures import by_edit, predicted_scatter
from vlmscope.report.page import Card, Cards, Figure, ReportPage, Section, Table, Text
from vlmscope.report.style import label
from vlmscope.tasks.steps.predicted_effects import NAMES, Measured
from vlmscope.tasks.steps.report_parts import configuration, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

WORDS = {"edge": "direct edge", "total": "total effect"}
MEASURES = ("pearson", "spearman", "slope", "same_sign", "error")
CONTROL = "mean |correlation| of shuffled predictions"


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    record = bench.record("predicted_effects")
    table, found = record["table"], record["agreements"]
    edits = list(dict.fromkeys(table.edit.tolist()))
    inputs, features = len(record["asked"]), int(bench.metrics["predicted/features"])
    sections: tuple[Section, ...] = (
        headline(found, edits),
        scatter(bench, table, edits[0]),
        strengths(bench, found, edits),
        whole_table(found, inputs),
        band_table(bench, found),
        reading(),
        rerun(bench),
        configuration(bench),
    )
    page = ReportPage(
        title="Predicted against measured effects",
        question="An attribution graph says what each feature contributes to an answer. If one feature at one position "
        "is ablated or scaled, does the answer move by what the graph says?",
        summary=summary(found, edits, inputs, features),
        sections=sections,
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def shown(edit: str) -> str:
    """An edit in words."""
    return {"ablate": "ablate", "add_mean": "add mean"}.get(edit, edit.replace("times_", "× "))


def summary(found: dict[tuple[str, ...], Agreement], edits: list[str], inputs: int, features: int) -> str:
    """The result in one paragraph."""
    parts = []
    for mode in dict.fromkeys(key[0] for key in found):
        one = found[mode, edits[0], NAMES[mode]]
        parts.append(
            f"{label(mode)}: Pearson {one.pearson.value:.2f}, Spearman {one.spearman.value:.2f}, slope "
            f"{one.slope.value:.2f} against the {WORDS[NAMES[mode]]}"
        )
    did = shown(edits[0])
    return f"{did[:1].upper()}{did[1:]} each of {features} features of {inputs} inputs. " + "; ".join(parts) + "."


def headline(found: dict[tuple[str, ...], Agreement], edits: list[str]) -> Cards:
    """Numbers on top."""
    cards = []
    for mode in dict.fromkeys(key[0] for key in found):
        one = found[mode, edits[0], NAMES[mode]].spearman
        detail = f"Spearman, {shown(edits[0])}, against the {WORDS[NAMES[mode]]}; 95 % interval"
        cards.append(Card(label(mode), f"{one.value:.2f} ({one.ci_low:.2f} to {one.ci_high:.2f})", detail))
    return Cards("Result", tuple(cards))


def scatter(bench: Bench, table: Measured, edit: str) -> Figure:
    """Predicted against measured for one edit, a panel a mode."""
    panels = {}
    for mode in bench.intervention.modes:
        rows = table.where(mode=mode, edit=edit)
        panels[f"{label(mode)}, {WORDS[NAMES[mode]]}"] = (
            table.predicted[NAMES[mode]][rows],
            table.measured[rows],
            table.band[rows],
        )
    path = predicted_scatter(panels, band_names(bench), bench.run_dir / "figures" / "predicted.png")
    alt = f"Predicted and measured change of the logit difference, one point a feature ({shown(edit)})"
    return Figure("Predicted and measured", (picture(path, alt, wide=True),))


def strengths(bench: Bench, found: dict[tuple[str, ...], Agreement], edits: list[str]) -> Figure:
    """Correlation and slope by kind of edit."""
    series = [(mode, NAMES[mode]) for mode in bench.intervention.modes]
    series += [("free", "edge")] if "free" in bench.intervention.modes else []
    panels = {
        ylabel: {
            f"{label(mode)}, {WORDS[predictor]}": [getattr(found[mode, edit, predictor], name) for edit in edits]
            for mode, predictor in series
        }
        for ylabel, name in (("Spearman's correlation", "spearman"), ("slope (measured / predicted)", "slope"))
    }
    path = by_edit(panels, [shown(edit) for edit in edits], bench.run_dir / "figures" / "by_edit.png", CONTROL)
    return Figure("By strength", (picture(path, "Correlation and slope by kind of edit, with 95 % intervals", True),))


def band_names(bench: Bench) -> list[str]:
    """The bands of influence in words."""
    lows = [0.0, *bench.cfg.single_edits.shares]
    pairs = zip(lows[:-1], lows[1:], strict=True)
    return [f"influence {100 * low:.0f} to {100 * high:.0f} %" for low, high in pairs]


def number(rate: object) -> str:
    """A rate with its interval as text: correlations are no shares."""
    return f"{rate.value:.2f} ({rate.ci_low:.2f} to {rate.ci_high:.2f})"  # type: ignore[attr-defined]


def whole_table(found: dict[tuple[str, ...], Agreement], inputs: int) -> Table:
    """Everything over all features."""
    rows = tuple(
        (label(key[0]), shown(key[1]), WORDS[key[2]], *(number(getattr(one, name)) for name in MEASURES),
         f"{one.spearman.control:.2f}", one.pearson.cases)
        for key, one in found.items()
        if len(key) == 3
    )  # fmt: skip
    columns = ("mode", "edit", "predicted by", "Pearson", "Spearman", "slope", "same sign", "relative error",
               "Spearman, shuffled", "features")  # fmt: skip
    note = (
        f"Intervals resample the {inputs} inputs, not features, which hang together within one. Relative error: summed "
        "|measured - predicted| over summed |predicted|. Shuffled: predictions permuted within each input, mean "
        "absolute correlation. No p-values: intervals are of single numbers, not corrected for their number."
    )
    return Table("All edits", columns, rows, note=note)


def band_table(bench: Bench, found: dict[tuple[str, ...], Agreement]) -> Table:
    """Ablation by band of influence."""
    names = band_names(bench)
    rows = tuple(
        (label(key[0]), names[int(key[3].removeprefix("band_"))], *(number(getattr(one, name)) for name in MEASURES),
         one.pearson.cases)
        for key, one in found.items()
        if len(key) == 4
    )  # fmt: skip
    columns = ("mode", "features", "Pearson", "Spearman", "slope", "same sign", "relative error", "number")
    return Table("Ablation by influence", columns, rows)


def reading() -> Text:
    """What is compared."""
    return Text(
        "How to read this",
        (
            "What moves is the right answer's logit minus the other answer's. The direct edge is the feature's own "
            "edge in the graph; the total effect lets active features above respond linearly. direct: attention, norms "
            "and MLPs frozen, where the direct edge is exact up to rounding. frozen attention: norms and MLPs live. "
            "free: nothing frozen.",
            "A band holds the features that carry the named part of the influence on the answer, most influential "
            "first; equally many are drawn from each. Few features carry the first half.",
        ),
    )
