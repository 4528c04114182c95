"""The table of an anatomy (`vlmscope.analyses.anatomy`) as words, as a section of a page and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.core.results import text_table
from vlmscope.report.figures import COLOURS, FILLS, INK, MARKERS, drawing, percent_axis, pick, tidy
from vlmscope.report.page import Figure, Percent, Section, Table, Value, drawn, show

# What the console, pages and metrics show first: name -> what is ablated, by its mean.
HEADLINES = {
    "without_mlp": {"blocks": "mlp"},
    "without_mlp_image": {"blocks": "mlp", "positions": "image"},
    "without_mlp_last": {"blocks": "mlp", "positions": "last"},
}
PLACES = {"image": "at soft tokens", "question": "at the question", "last": "at the last position", "all": "everywhere"}
ROLES = {"image": "soft tokens", "question": "question", "last": "last position", "special": "template"}
NEAR = 0.2  # an accuracy this close to the prior leaves little to explain
SAYS = (
    'Accuracy, or KL in nats where answers are not known or hardly ever right. From "at soft tokens" to the ranges of '
    "layers the outputs of all MLPs are replaced by their mean over the cases, there or everywhere; then those of all "
    "attention. Need: how much of what the model can do beyond its answer prior is lost without MLPs. What is not "
    "lost, no graph of MLP features explains."
)


def measure_of(table: pd.DataFrame) -> str:
    """accuracy where every question has one and the model beats the prior of some by `NEAR`, else kl."""
    rows: Any = table[(table.measure == "accuracy") & table.blocks.isin(["none", "prior"])]
    by_question = rows.pivot_table("value", "question", "blocks")
    known = set(by_question.index) == set(table.question)
    return "accuracy" if known and bool((by_question["none"] - by_question["prior"] >= NEAR).any()) else "kl"


def value(table: pd.DataFrame, question: str, measure: str, **where: str) -> float | None:
    """One number; layers and positions are all, and the method the mean, unless given."""
    chosen = {"layers": "all", "positions": "all", "question": question, "measure": measure} | where
    if chosen["blocks"] in ("mlp", "attention", "both"):
        chosen.setdefault("method", "mean")
    rows: Any = table[np.logical_and.reduce([table[column] == text for column, text in chosen.items()])]
    return float(rows.value.iloc[0]) if len(rows) else None


def headline(table: pd.DataFrame, question: str) -> tuple[str, dict[str, float]]:
    """accuracy or kl, and that of the model as it is, of the prior, and of `HEADLINES`."""
    measure = measure_of(table)
    numbers = {name: value(table, question, measure, **where) for name, where in HEADLINES.items()}
    numbers |= {
        name: value(table, question, measure, blocks=key) for name, key in (("as_it_is", "none"), ("prior", "prior"))
    }
    return measure, {name: number for name, number in numbers.items() if number is not None}


def need(table: pd.DataFrame, question: str) -> float | None:
    """The share 0..1 of what the model can do beyond its prior that is lost without MLPs; None where that is little."""
    measure, numbers = headline(table, question)
    base, prior, without = numbers.get("as_it_is", 0.0), numbers["prior"], numbers["without_mlp"]
    if measure == "accuracy" and base - prior < NEAR or prior == base:
        return None
    return abs(float(np.clip((without - base) / (prior - base), 0.0, 1.0)))  # not -0


def overview(table: pd.DataFrame) -> tuple[tuple[str, ...], list[tuple[Value, ...]]]:
    """Columns and a row per question: as it is, without MLPs by place and by layers, without attention, prior, need."""
    measure = measure_of(table)
    ranges = [layers for layers in dict.fromkeys(table.layers) if layers != "all"]
    graphs = bool((table.measure == "influence").any())
    columns = ("question (cases)", "as it is", *PLACES.values(), *(f"layers {layers}" for layers in ranges))
    columns += ("no attention", "prior", "need of MLPs", *(["influence at soft tokens"] if graphs else []))
    rows: list[tuple[Value, ...]] = []

    def number(found: float | None) -> Value:
        return None if found is None else Percent(found) if measure == "accuracy" else found

    for question in dict.fromkeys(table.question):

        def at(question: str = question, **where: str) -> Value:
            return number(value(table, question, measure, **where))

        share, seen = need(table, question), value(table, question, "influence", blocks="features", positions="image")
        cases: Any = table[(table.question == question) & (table.measure == "kl")].cases
        row = (
            f"{question} ({cases.max()})",
            at(blocks="none"),
            *(at(blocks="mlp", positions=place) for place in PLACES),
        )
        row += (*(at(blocks="mlp", layers=layers) for layers in ranges), at(blocks="attention"), at(blocks="prior"))
        row += (None if share is None else Percent(share),)
        rows.append(row + ((None if seen is None else Percent(seen),) if graphs else ()))
    return columns, rows


def console(table: pd.DataFrame) -> str:
    """The overview as text."""
    columns, rows = overview(table)
    cells = [[f"{x.share:.2f}" if isinstance(x, Percent) else show(x) for x in row] for row in rows]
    return f"{' ' * 10}with the outputs of all MLPs averaged:\n{text_table([columns, *cells])}"


def summary(table: pd.DataFrame) -> str:
    """The mean need of MLPs, and the questions that need them least and most, in a sentence."""
    needs = {question: need(table, question) for question in dict.fromkeys(table.question)}
    known = {question: share for question, share in needs.items() if share is not None}
    if not known:
        return "The model answers no question better than its prior, so there is nothing that MLPs could be needed for."
    least, most = min(known, key=lambda name: known[name]), max(known, key=lambda name: known[name])
    mean = sum(known.values()) / len(known)
    return (
        f"Without MLPs {mean:.0%} of what the model can do beyond its answer prior is lost, mean over questions; "
        f"{known[least]:.0%} ({least}) to {known[most]:.0%} ({most})."
    )


def told(numbers: Mapping[str, float], measure: str) -> str:
    """The headline numbers of a question in one line."""
    words = {name: f"{number:.2f}" if measure == "accuracy" else f"{number:.2g}" for name, number in numbers.items()}
    beside = f"as it is {words['as_it_is']}, most frequent answer" if measure == "accuracy" else "answer prior"
    places = [
        ("everywhere", "without_mlp"),
        ("at soft tokens", "without_mlp_image"),
        ("at the last position", "without_mlp_last"),
    ]
    listed = ", ".join(f"{words[name]} {place}" for place, name in places if name in words)
    unit = "accuracy" if measure == "accuracy" else "KL in nats"
    return f"all MLPs averaged: {unit} {listed} ({beside} {words['prior']})"


def anatomy_sections(table: pd.DataFrame, path: Path, title: str = "Anatomy", says: str = "") -> list[Section]:
    """The overview and the figure, which is drawn to `path`."""
    columns, rows = overview(table)
    draw_anatomy(table, path)
    alt = "What remains of each answer without MLPs and without attention, and where the graphs' influence lies"
    return [Table(title, columns, tuple(rows), says or SAYS), Figure(f"{title}: figure", (drawn(path, alt, True),))]


def draw_anatomy(table: pd.DataFrame, path: str | Path) -> Path:
    """A line per question: what remains without MLPs and without attention, by place, and shares of influence."""
    questions, measure = list(dict.fromkeys(table.question)), measure_of(table)
    influence = bool((table.measure == "influence").any())
    y = np.arange(len(questions))
    with drawing(path, 9.6 + 4.0 * influence, 1.9 + 0.42 * len(questions)) as figure:
        axes = figure.subplots(1, 2 + influence, sharey=True)
        for panel, (blocks, title) in zip(
            axes, (("mlp", "MLPs averaged"), ("attention", "Attention averaged")), strict=False
        ):
            _remaining(panel, table, questions, measure, blocks)
            panel.set_title(title, loc="left")
            panel.set_xlabel("accuracy (%)" if measure == "accuracy" else "KL from the unedited answer (nats)")
        axes[0].set_yticks(y, [question if len(question) < 36 else f"{question[:34]} ..." for question in questions])
        axes[0].set_ylim(len(questions) - 0.4, -0.6)
        if influence:
            _influence(axes[2], table, questions)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)
        if influence:
            figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=2, frameon=False)
    return Path(path)


def _remaining(axes: Any, table: pd.DataFrame, questions: Sequence[str], measure: str, blocks: str) -> None:
    """Markers of one kind of blocks: the model, the prior, and ablations by place; a line joins each question's."""
    series: list[tuple[str, dict[str, str], dict[str, Any]]] = [
        ("as it is", {"blocks": "none"}, {"marker": "|", "s": 160, "color": INK, "linewidths": 2.2}),
        ("answer prior", {"blocks": "prior"}, {"marker": "x", "s": 46, "color": INK, "linewidths": 1.6}),
    ]
    for number, (place, words) in enumerate(PLACES.items()):
        style = {"marker": pick(MARKERS, number), "s": 34, "color": pick(COLOURS, number), "zorder": 3}
        series.append((words, {"blocks": blocks, "positions": place}, style))
    hollow = {"marker": pick(MARKERS, 3), "s": 34, "facecolors": "none", "edgecolors": pick(COLOURS, 3), "zorder": 3}
    series.append(("everywhere, another case's", {"blocks": blocks, "method": "resample"}, hollow))
    for row, question in enumerate(questions):
        found = [value(table, question, measure, **where) for _, where, _ in series]
        known = [number for number in found if number is not None]
        axes.plot([min(known), max(known)], [row, row], color="#d0d0d0", linewidth=1.2, zorder=1)
    for number, (words, where, style) in enumerate(series):
        shift = 0.11 * (number - 3.5) if number > 1 else 0.0  # so that equal values stay visible
        points = [(value(table, question, measure, **where), row + shift) for row, question in enumerate(questions)]
        points = [point for point in points if point[0] is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), label=words, **style)
    if measure == "accuracy":
        axes.set_xlim(-0.02, 1.03)
        percent_axis(axes.xaxis)
    tidy(axes, "x")


def _influence(axes: Any, table: pd.DataFrame, questions: Sequence[str]) -> None:
    """Stacked bars: shares of the influence of features by position role."""
    left = np.zeros(len(questions))
    for number, (role, words) in enumerate(ROLES.items()):
        found = [
            value(table, question, "influence", blocks="features", positions=role) or 0.0 for question in questions
        ]
        fill, hatch = pick(FILLS, number)
        axes.barh(
            range(len(questions)), found, 0.7, left, label=words, color=fill, hatch=hatch, edgecolor=INK, linewidth=0.5
        )
        left += found
    axes.set(xlim=(0, 1), xlabel="influence of features (%)")
    axes.set_title("Where features have influence", loc="left")
    percent_axis(axes.xaxis)
    tidy(axes, "x")
