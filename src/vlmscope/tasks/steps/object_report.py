"""The parts of a pairs' report about objects: the double dissociation, and where in the picture features fire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.report import figures
from vlmscope.report.page import Figure, Percent, Section, Table
from vlmscope.report.study_figures import object_maps
from vlmscope.report.style import label
from vlmscope.tasks.steps.report_parts import picture

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench
    from vlmscope.tasks.steps.dissociation import Cell


def dissociation_sections(bench: Bench, folder: Path) -> list[Section]:
    """Each fact's features on each question."""
    del folder
    found = bench.record("dissociation")
    cells: list[Cell] = found["cells"]
    columns = (
        "pairs differ in", "features carried", "question", "answer follows, 95 % interval",
        "answer changed, 95 % interval", "recovered, 95 % interval", "changed under matched features",
    )  # fmt: skip
    rows = tuple(
        (
            label(cell.change),
            f"those of {label(cell.features)}",
            label(cell.question),
            cell.follows if cell.gained is not None else None,
            cell.changed,
            cell.gained,
            Percent(cell.changed.control or 0.0),
        )
        for cell in cells
    )
    own = frozenset(i for i, cell in enumerate(cells) if cell.features == cell.question)
    note = "A dash: the answer is the same on both sides of these pairs, so that there is nothing to follow."
    contrasts = Table(
        "Own answer against the other",
        ("features", "recovered share of its own answer minus the other's, 95 % interval"),
        tuple((f"those of {label(fact)}", rate) for fact, rate in found["contrasts"].items()),
        note="On pairs that differ in both.",
    )
    activity = Table(
        "Are the features there when another question is asked?",
        ("features", "question", "change within pairs, in shares of that under its own question"),
        tuple((f"those of {label(f)}", label(n), Percent(share)) for (f, n), share in found["activity"].items()),
        note="Features that are silent under a question cannot change its answer, whatever they stand for.",
    )
    return [Table("Double dissociation", columns, rows, note=note, strong=own), contrasts, activity]


def object_summary(bench: Bench) -> str:
    """The dissociation, where it was measured, and where features fire, in a sentence each."""
    said = ""
    if "dissociation" in bench.records:
        parts = [
            f"those of {label(fact)} {rate.value:.0%} ({rate.ci_low:.0%} to {rate.ci_high:.0%})"
            for fact, rate in bench.record("dissociation")["contrasts"].items()
        ]
        said = f"Features recover more of their own answer than of the other's: {', '.join(parts)}. "
    m, places = bench.metrics, []
    for fact in dict.fromkeys(fact for fact, _ in bench.record("object_places")["hits"]):
        key = f"places/{fact}/fires/on_object"
        places.append(f"of {label(fact)} {m[key]:.0%} (objects take {m[key + '_control']:.0%} of the soft tokens)")
    return f"{said}Of what features write in the picture lies on objects: {', '.join(places)}."


def place_sections(bench: Bench, folder: Path) -> list[Section]:
    """On the objects or beside them, by layer."""
    found = bench.record("object_places")
    pictures = []
    for what, said in (("fires", "what features write"), ("changes", "how that changes within pairs")):
        drawn = figures.dose_response(
            found["curves"][what], folder / f"places_{what}.png", "layer", "share on the objects' soft tokens (%)"
        )
        pictures.append(picture(drawn, f"Share of {said} that lies on soft tokens with an object, by layer"))
    shown = found["drawn"]
    drawn = object_maps(
        [one.image for one in shown], [one.boxes for one in shown], [one.maps for one in shown],
        folder / "object_maps.png",
    )  # fmt: skip
    pictures.append(picture(drawn, "Test pictures, and where the features of each fact fire and change, all layers"))
    rows = tuple(
        (label(fact), what, rate, Percent(rate.control or 0.0)) for (fact, what), rate in found["hits"].items()
    )
    columns = ("features of", "map", "peak on an object, 95 % interval", "soft tokens on an object")
    note = "A soft token lies on an object when a quarter of its part of the picture is painted."
    carried = Table(
        "Carrying what lies on the objects, or on the ground",
        ("answer", "all features carried at", "recovered, 95 % interval"),
        tuple((label(fact), where, rate) for (fact, where), rate in found["carried"].items()),
        note="All layers, only at soft tokens of the picture; the other positions are left as they are.",
    )
    return [Figure("Where in the picture", tuple(pictures)), Table("Pointing", columns, rows, note=note), carried]
