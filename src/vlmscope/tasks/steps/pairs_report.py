"""Figures and report.html of interchange interventions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.core.intervention import AnswerExample, Rate
from vlmscope.data.images import png_bytes
from vlmscope.interventions.run import run_edited
from vlmscope.report import figures
from vlmscope.report.page import Card, Cards, Examples, Figure, Percent, ReportPage, Section, Table, Text, flip_table
from vlmscope.report.style import label
from vlmscope.tasks.steps.interchange import ALL, CIRCUIT, InterchangeRow, PairCase, roles_of
from vlmscope.tasks.steps.report_parts import configuration, picture, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

# What the page asks besides, by the step that answers it.
QUESTIONS = {}


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    folder = bench.run_dir / "figures"
    record = bench.record("interchange")
    said = summary(record["rows"])
    sections: list[Section] = [headline(record), data(bench, record), examples(bench, record, folder)]
    sections += rate_sections(record["rows"], folder)
    sections += curve_sections(record, folder)
    sections += grid_sections(bench, record, folder)
    sections.append(reading())
    sections += [rerun(bench), configuration(bench)]
    pairs = bench.cfg.pairs
    what = "own pairs" if pairs is None or pairs.change is None else label(pairs.change)
    more = next((words for step, words in QUESTIONS.items() if step in bench.records), "")
    page = ReportPage(
        title=f"Interchange: {what}",
        question="Two inputs differ in a fact. If features are carried from one run into the other, which answers "
        f"follow, and which stay? {more}".strip(),
        summary=said,
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def data(bench: Bench, record: dict) -> Table:
    """What was asked of how many pairs."""
    pairs = bench.cfg.pairs
    assert pairs is not None, "the step interchange has run"
    rows = tuple(
        (
            name,
            case.pairs[0].original.prompt,
            "differs" if case.subject.moves else "stays",
            case.subject.accuracy[2],
            case.subject.size,
        )
        for name, case in record["cases"].items()
    )
    columns = ("question", "words", "answer in a pair", "right on both sides, 95 % interval", "pairs used")
    circuit = bench.cfg.interchange.circuit
    chosen = f"chosen on {pairs.train} other pairs" if circuit is None else f"those of {circuit}"
    note = f"Features are {chosen}. Only pairs answered rightly on both sides are used."
    return Table("Data", columns, rows, note=note)


def headline_rows(rows: list[InterchangeRow]) -> list[InterchangeRow]:
    """Everywhere, in free mode."""
    return [found for found in rows if (found.row.mode, found.row.scope) == ("free", "all")]


def own_rows(rows: list[InterchangeRow]) -> list[InterchangeRow]:
    """Of these, each question under all features and under its own; of a circuit that was given, under all of it."""
    own = [found for found in headline_rows(rows) if found.outcome.recovered is not None and found.own]
    whole = [found for found in own if found.row.method in (ALL, CIRCUIT)]
    return whole if any(found.row.method == CIRCUIT for found in whole) else own


def summary(rows: list[InterchangeRow]) -> str:
    """The result in one paragraph."""
    parts = []
    for found in own_rows(rows):
        row, gained = found.row, found.outcome.recovered
        assert gained is not None
        control = "" if row.rate.control is None else f" (matched features: {row.rate.control:.0%})"
        parts.append(
            f"carrying {row.n_features} {row.method}, {row.question} follows on {row.rate.value:.0%} of "
            f"{row.rate.cases} pairs{control} and {gained.value:.0%} of the logit difference moves"
        )
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + "."


def headline(record: dict) -> Cards:
    """Numbers on top."""
    cards = [
        Card(
            f"{found.row.question}: {found.row.method}",
            Percent(found.row.rate.value),
            f"95 % interval {found.row.rate.ci_low:.0%} to {found.row.rate.ci_high:.0%}; "
            f"{found.row.n_features} features",
        )
        for found in own_rows(record["rows"])
    ]
    return Cards("Answers that follow", tuple(cards))


def examples(bench: Bench, record: dict, folder: Path) -> Examples:
    """Counterfactual pairs before and after every feature was carried over."""
    from vlmscope.circuits.interchange import whole_plan

    shown: list[AnswerExample] = []
    moving: list[PairCase] = [case for case in record["cases"].values() if case.subject.moves]
    for case in moving:
        subject = case.subject
        plan = whole_plan(bench.scope, subject.other)
        logits = run_edited(bench.scope, subject.batch, plan)
        for i in range(min(max(bench.intervention.examples // len(moving), 1), subject.size)):
            pair = case.pairs[i]
            before, after = (bench.words(found[i]) for found in (subject.base.logits, logits))
            sides = [np.asarray(side.images[0]) for side in (pair.original, pair.counterfactual) if side.images]
            joined = png_bytes(np.concatenate(sides, 1), 256) if same_height(sides) else png_bytes(blank())
            said = f"{pair.original.answer} to {pair.counterfactual.answer}: all features"
            shown.append(AnswerExample(joined, pair.original.prompt, said, before[0][0], after[0][0], before, after))
    figures.answer_shift(shown, folder / "answer_shift.png")
    return Examples("Original and counterfactual, and the answer before and after", tuple(shown))


def same_height(sides: list[np.ndarray]) -> bool:
    """Whether pictures [H, W, 3] can stand beside each other."""
    return bool(sides) and len({side.shape[0] for side in sides}) == 1


def blank() -> np.ndarray:
    """What stands for a pair without pictures."""
    return np.full((8, 8, 3), 255, np.uint8)


def rate_sections(rows: list[InterchangeRow], folder: Path) -> list[Section]:
    """Flip rates by question, mode and scope, and the table of all."""
    moving = [found.row for found in rows if found.outcome.recovered is not None]
    still = [found.row for found in headline_rows(rows) if found.outcome.recovered is None]
    drawn = [(figures.flip_rates(moving, folder / "follow_rates.png"), "Share of answers that follow, by question")]
    if still:
        drawn.append((figures.flip_rates(still, folder / "side_effects.png"), "Share of other answers that changed"))
    table = Table(
        "Recovered logit difference",
        ("features", "mode", "question", "where", "recovered, 95 % interval", "matched features"),
        tuple(
            (
                found.row.method,
                label(found.row.mode),
                found.row.question,
                label(found.row.scope),
                Rate(gained.value, gained.ci_low, gained.ci_high, gained.cases),
                None if found.recovered_control is None else Percent(found.recovered_control),
            )
            for found in rows
            if (gained := found.outcome.recovered) is not None
        ),
        note="0 %: nothing moved; 100 %: the logits are as far apart as in the counterfactual's own run.",
    )
    note = (
        "For a question whose answer is the same on both sides, the rate is that of answers that changed. A control "
        "carries as many other features, matched by layer and mean activation, from the same counterfactuals."
    )
    return [
        Figure("What follows", tuple(picture(path, alt) for path, alt in drawn)),
        flip_table("All rates", [found.row for found in rows], note=note),
        table,
    ]


def curve_sections(record: dict, folder: Path) -> list[Section]:
    """How many features it takes."""
    curves = record["curves"]
    if not curves["follows"]:
        return []
    paths = [
        figures.feature_count_curve(
            curves["follows"], folder / "count_follows.png", "features carried", "follow rate (%)"
        ),
        figures.feature_count_curve(
            curves["recovered"], folder / "count_recovered.png", "features carried", "recovered logit difference (%)"
        ),
    ]
    alts = ("Follow rate against the number of features", "Recovered share against the number of features")
    return [Figure("How many features", tuple(picture(path, alt) for path, alt in zip(paths, alts, strict=True)))]


def grid_sections(bench: Bench, record: dict, folder: Path) -> list[Section]:
    """Where the fact is carried."""
    pictures = []
    for name, grid in record["grids"].items():
        path = figures.layer_role_heatmap(
            np.round(grid[..., 0], 3) + 0.0,
            bench.transcoders.layers,
            roles_of(record["cases"][name].subject),
            folder / f"grid_{name}.png",
            f"recovered share, question: {name}",
        )
        pictures.append(picture(path, f"Recovered share when one layer and position role is carried: {name}"))
    return [
        Figure("Where it is", tuple(pictures), "All features of one layer at the positions of one role, free mode.")
    ]


def reading() -> Text:
    """What the numbers do not say."""
    return Text(
        "How to read this",
        (
            "Features are set to their activation in the counterfactual's run, position by position; what the "
            "transcoders do not explain (the errors) stays that of the original. Only pairs that the model answers "
            "rightly on both sides count.",
            "Carrying every feature at every position moves almost all that MLPs write, so it shows what the features "
            "hold together, not which of them matter; the rows without the last layer or position, the grid, the curve "
            "over the number of features and the questions that should not move say more.",
        ),
    )
