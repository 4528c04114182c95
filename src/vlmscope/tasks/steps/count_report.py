"""The parts of a pairs' report about numbers: tuning curves, readouts, dose, and what features generalise over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.intervention import Rate
from vlmscope.report import figures
from vlmscope.report.page import Figure, Percent, Section, Table, flip_table
from vlmscope.tasks.steps.number_line import COLUMNS, COUNTS
from vlmscope.tasks.steps.report_parts import figure, picture

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench
    from vlmscope.tasks.steps.pair_transfer import Transfer

PLACE_WORDS = {"last": "at the last position", "picture": "summed over the picture"}


def number_sections(bench: Bench, folder: Path) -> list[Section]:
    """What features say of the count."""
    pictures, rows = [], []
    for place, found in bench.record("number_line").items():
        words = PLACE_WORDS[place]
        kinds = figures.layer_role_heatmap(
            found["counts"], bench.transcoders.layers, COLUMNS, folder / f"kinds_{place}.png", "features",
            f"shape of the tuning curve, {words}",
        )  # fmt: skip
        pictures.append(picture(kinds, f"Number of features by layer and shape of their tuning curve, {words}"))
        if found["curves"]:
            drawn = figures.dose_response(
                found["curves"], folder / f"tuning_{place}.png", "shapes in the picture (number)",
                "activation (share of its highest mean)", percent=False,
            )  # fmt: skip
            said = f"Tuning curves {words}, on scenes not used to choose: the feature of each kind most tied to count"
            pictures.append(picture(drawn, said))
        read = figures.dose_response(
            found["read"], folder / f"read_{place}.png", "layer", "held-out accuracy of the count (%)"
        )
        pictures.append(picture(read, f"Readout fitted to one shape or colour, {words}"))
        for kind in ("up", "down", "peak"):
            rows.append(kind_row(bench, place, kind))
    columns = ("place", "tuning curve", "features", "same curve on held-out scenes", "by chance, all kinds")
    note = (
        "A feature depends on the count by analysis of variance over the training scenes, with 1 % false discoveries "
        "among all features, layers and places (Benjamini-Hochberg); by chance: the same with counts shuffled. A peak "
        f"is at {COUNTS[1]} to {COUNTS[-2]}."
    )
    return [
        Figure("Is there a number line?", tuple(pictures)),
        Table("Features that depend on the count", columns, tuple(rows), note=note),
        area_table(bench),
    ]


def kind_row(bench: Bench, place: str, kind: str) -> tuple:
    """A row of the table of kinds."""
    key = f"numbers/{place}/{kind}"
    held = metric_rate(bench, f"{key}/holds")
    count, chance = bench.metrics[f"{key}/features"], bench.metrics[f"numbers/{place}/by_chance"]
    return (PLACE_WORDS[place], kind, int(count), held, int(chance))


def metric_rate(bench: Bench, key: str) -> Rate | None:
    """A rate as the metrics have it; None where there is none."""
    m = bench.metrics
    return Rate(m[key], m[f"{key}_ci_low"], m[f"{key}_ci_high"], 0) if key in m else None


def area_table(bench: Bench) -> Table:
    """Count against painted area."""
    names = (("rho", "mean rank correlation with the count"), ("rho_at_equal_area", "the same at equal painted area"))
    rows = []
    for place in bench.record("number_line"):
        for name, said in (*names, ("same_sign_at_equal_area", "share that keeps its sign at equal area")):
            rate = metric_rate(bench, f"numbers/{place}/monotone/{name}")
            if rate is not None:
                ends = f"{rate.value:.2f} ({rate.ci_low:.2f} to {rate.ci_high:.2f})"
                rows.append((PLACE_WORDS[place], said, ends))
    note = "Features that go up or down, signed so that a feature which goes down counts positive; held-out scenes."
    return Table("Count or painted area?", ("place", "measure", "value, 95 % interval"), tuple(rows), note=note)


def dose_sections(bench: Bench, folder: Path) -> list[Section]:
    """What carrying more than the whole way does."""
    found = bench.record("number_dose")
    drawn = figures.dose_response(
        found["curves"], folder / "dose.png", "dose (1 = the counterfactual's activations)",
        "number said minus number before", percent=False,
    )  # fmt: skip
    said = f"{found['pairs']} pairs whose original has at most three shapes; the counterfactual has one more."
    table = Table(
        "Which number is said, by dose",
        ("dose", "the same", "one more", "two more", "three more"),
        tuple((f"{strength:g}", *shares) for strength, shares in found["shares"]),
    )
    sections: list[Section] = [figure("Dose and response", drawn, "Shift of the number said, by dose", said), table]
    if found["rows"]:
        note = "Kinds of tuning curve at the last position, chosen on scenes that are no pairs."
        sections.append(flip_table("Carrying one kind of feature only", [one.row for one in found["rows"]], note=note))
    return sections


def number_summary(bench: Bench) -> str:
    """Dose in a sentence."""
    curve = bench.record("number_dose")["curves"][0]
    parts = [f"{y:+.2f} at {x:g}" for x, y in zip(curve.x, curve.y, strict=True) if x in (1.0, 2.0, 4.0)]
    return f"By dose the number said moves by {', '.join(parts)}." if parts else ""


def transfer_sections(bench: Bench, folder: Path) -> list[Section]:
    """Chosen on one value, tested on the others."""
    found: list[Transfer] = bench.record("pair_transfer")
    pictures = []
    for one in found:
        path = figures.layer_role_heatmap(
            one.recovered, one.values, one.values, folder / f"transfer_{one.question}_{one.fact}.png",
            f"recovered share, question: {one.question}", f"{one.fact.replace('_', ' ')} of the test pairs",
            f"{one.fact.replace('_', ' ')} chosen on",
        )  # fmt: skip
        pictures.append(picture(path, f"Features chosen on one {one.fact}, carried on pairs of each"))
    rows = tuple(
        (one.question, one.fact, which, recovered, follows)
        for one in found
        for which, recovered, follows in (
            ("the same", one.own, one.own_follows),
            ("another", one.other, one.other_follows),
            ("matched features", control(one.own), control(one.own_follows)),
        )
    )
    columns = ("question", "fact", "features chosen on pairs of", "recovered, 95 % interval", "follows, 95 % interval")
    return [
        Figure("Chosen on one value, tested on another", tuple(pictures)),
        Table("What the features generalise over", columns, rows),
    ]


def control(rate: Rate) -> Percent:
    """The matched features' share."""
    assert rate.control is not None
    return Percent(rate.control)
