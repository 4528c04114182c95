"""Figures and report.html of a matrix of concepts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.circuits.concept_matrix import METHODS, NO_LAST_LAYER, Cell, mean_rate
from vlmscope.report.figures import share_matrices
from vlmscope.report.page import Card, Cards, Figure, Percent, ReportPage, Section, Table
from vlmscope.report.style import label
from vlmscope.tasks.steps.report_parts import configuration, limits, picture, rerun

if TYPE_CHECKING:
    from vlmscope.circuits.matrix_config import ConceptMatrixConfig
    from vlmscope.core.intervention import Rate
    from vlmscope.tasks.steps.bench import Bench

WORDS = {"steer": "steering", "patch": "patching", NO_LAST_LAYER: "steering, last layer left alone"}


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    found = bench.record("concept_matrix")
    config: ConceptMatrixConfig = found["config"]
    cells: list[Cell] = found["cells"]
    third: Mapping[tuple[str, str], Rate] = found["third"]
    means = {method: mean_rate(cells, method) for method in WORDS}
    cards = [
        Card(words, means[method], f"mean of {len(cells)} cells, 95 % interval") for method, words in WORDS.items()
    ]
    cards.append(Card("matched random features", Percent(means["steer"].control or 0.0), "the same edits, steering"))
    if third:
        spoilt = float(np.mean([rate.value for rate in third.values()]))
        cards.append(Card("third concepts called the donor", Percent(spoilt), "by the same steering"))
    page = ReportPage(
        title=f"Each of {len(config.concepts)} turned into each other",
        question="Can the features of any of these be exchanged for those of any other, so that the model answers with "
        "the other's word?",
        summary=summary(config, cells, means),
        sections=(
            Cards("Result", tuple(cards)),
            data(bench, config),
            *matrices(bench, config, cells, third),
            weakest(cells),
            limits(bench.intervention.gate is not None),
            rerun(bench),
            configuration(bench),
        ),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def summary(config: ConceptMatrixConfig, cells: list[Cell], means: Mapping[str, Rate]) -> str:
    """The result in one paragraph."""
    sure = {method: sum(cell.q[method] < config.alpha for cell in cells) for method in METHODS}
    control = means["steer"].control or 0.0
    return (
        f"Steering makes the model say the other's word on {means['steer'].value:.0%} of pictures (mean over "
        f"{len(cells)} cells of recipient, donor and question), patching on {means['patch'].value:.0%}, matched random "
        f"features on {control:.0%}. {sure['steer']} cells of steering and {sure['patch']} of patching are above their "
        f"controls at a false discovery rate of {config.alpha:.0%}."
    )


def data(bench: Bench, config: ConceptMatrixConfig) -> Table:
    """What was asked, and how often rightly answered."""
    rows = tuple(
        (
            label(name),
            question.prompt,
            *(Percent(bench.metrics[f"base/{name}/{concept}/accuracy"]) for concept in config.concepts),
        )
        for name, question in config.questions.items()
    )
    return Table(
        "Data",
        ("question", "words", *config.concepts),
        rows,
        intro=f"Circuits were found on {config.pictures} pictures of each and tested on {config.test} others.",
        note="Rightly answered unedited; only these pictures count. Where two share a word, that cell is left out.",
    )


def matrices(
    bench: Bench, config: ConceptMatrixConfig, cells: list[Cell], third: Mapping[tuple[str, str], Rate]
) -> list[Section]:
    """A row of matrices for each method and one for what else the steering does."""
    folder = bench.run_dir / "figures"
    at = {concept: i for i, concept in enumerate(config.concepts)}

    def shares(method: str, question: str, control: bool = False) -> np.ndarray:
        found = np.full((len(at), len(at)), np.nan)
        for cell in cells:
            if cell.question == question:
                rate = cell.rates[method]
                value = rate.control if control else rate.value
                found[at[cell.recipient], at[cell.donor]] = np.nan if value is None else value
        return found

    first = next(iter(config.questions))
    others = np.full((len(at), len(at)), np.nan)
    for (recipient, donor), rate in third.items():
        others[at[recipient], at[donor]] = rate.value
    rows = {
        method: {label(name): shares(method, name) for name in config.questions} for method in (*METHODS, NO_LAST_LAYER)
    }
    rows["beside"] = {
        f"{label(first)}: matched, steering": shares("steer", first, control=True),
        f"{label(first)}: matched, patching": shares("patch", first, control=True),
        f"{label(first)}: others called the donor": others,
    }
    titles = {**{method: words[:1].upper() + words[1:] for method, words in WORDS.items()}, "beside": "Controls"}
    intros = {"beside": "Right: pictures of all other concepts under the same steering, called by the donor's word."}
    sections: list[Section] = []
    for method, panels in rows.items():
        drawn = share_matrices(config.concepts, panels, folder / f"matrix_{method.replace('/', '_')}.png")
        alt = "Answers with the donor's word in per cent; rows: what is shown, columns: whose features are given"
        sections.append(Figure(titles[method], (picture(drawn, alt, wide=True),), intros.get(method, "")))
    return sections


def weakest(cells: list[Cell], count: int = 10) -> Table:
    """The cells that steering flips least: where the story ends."""
    chosen = sorted(cells, key=lambda cell: cell.rates["steer"].value)[:count]
    rows = tuple(
        (
            cell.recipient, cell.donor, label(cell.question), cell.rates["steer"].cases, cell.rates["steer"],
            cell.rates["patch"], cell.rates[NO_LAST_LAYER], Percent(cell.rates["steer"].control or 0.0),
            cell.q["steer"],
        )
        for cell in chosen
    )  # fmt: skip
    columns = (
        "pictures of", "given", "question", "pictures", "steering", "patching", "steering, last layer left alone",
        "matched, steering", "q of steering",
    )  # fmt: skip
    return Table(
        f"The {len(chosen)} weakest cells", columns, rows, note="q: corrected over all cells and both methods."
    )
