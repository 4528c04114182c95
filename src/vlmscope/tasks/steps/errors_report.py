"""Figures and report.html of predicted errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.records import generator
from vlmscope.report.experiment_figures import AskedPicture, areas, asked_pictures, probabilities
from vlmscope.report.page import Card, Cards, Percent, ReportPage, Section, Table, Text
from vlmscope.tasks.steps.predict_errors import Case, Prediction, areas_by_question
from vlmscope.tasks.steps.report_parts import configuration, figure, rerun

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

VIEWS = {
    "pooled": "all questions together",
    "within": "within a question",
    "unseen_question": "within a question, fitted to the others",
}
PREDICTORS = {
    "question": "which question it is",
    "question_probability": "which question, and probability",
    "probability": "probability and entropy of answers",
    "paper": "graph: entropy, distance, top feature",
    "graph": "graph: all indicators",
    "both": "graph and probability",
    "level": "how hard, and probability",
    "level_both": "how hard, graph and probability",
}
INDICATORS = {
    "probability": "probability of the answer",
    "answer_entropy": "entropy of answers",
    "entropy": "entropy of contributions",
    "distance": "mean token distance",
    "top1": "top feature's share",
    "image_share": "influence from the picture",
    "text_share": "influence from words",
    "error_share": "influence from errors",
    "replacement": "replacement score",
    "completeness": "completeness score",
    "nodes": "nodes after pruning",
    "level": "how hard the picture was made",
}


def run(bench: Bench) -> None:
    """Write figures/ and report.html."""
    folder = bench.run_dir / "figures"
    record = bench.record("predict_errors")
    cases: list[Case] = record["cases"]
    predictions: dict[str, dict[str, Prediction]] = record["predictions"]
    sections: list[Section] = [headline(predictions, record["gains"])]
    sections += case_sections(bench, cases, folder)
    sections += area_sections(record["single"], predictions, record["gains"], folder)
    sections += [by_question(cases, predictions["within"]), reading(bench), rerun(bench), configuration(bench)]
    page = ReportPage(
        title="Predicting wrong answers from graphs",
        question="Does the attribution graph of an answer tell that the answer is wrong, and more than the answer's "
        "probability tells?",
        summary=summary(cases, predictions, record["gains"]),
        sections=tuple(sections),
        footer=f"vlmscope · {bench.vlm.name} · {bench.run_dir.name}",
    )
    page.write(bench.run_dir / "report.html")


def area_text(area: Rate) -> str:
    """An area, or a difference of areas, with its interval."""
    return f"{area.value:.2f} ({area.ci_low:.2f} to {area.ci_high:.2f})"


def summary(cases: Sequence[Case], predictions: dict[str, dict[str, Prediction]], gains: dict[str, Rate]) -> str:
    """The result in one paragraph."""
    found, share = predictions["within"], np.mean([case.wrong for case in cases])
    more = gains["within"]
    verdict = "adds to" if more.ci_low > 0 else "takes from" if more.ci_high < 0 else "adds nothing certain to"
    return (
        f"Of {len(cases)} answers {share:.0%} are wrong. Within a question, the graph's indicators find wrong answers "
        f"with an area of {area_text(found['graph'].area)}, the answer's probability and entropy with "
        f"{area_text(found['probability'].area)}, both with {area_text(found['both'].area)}: the graph {verdict} the "
        f"probability ({more.value:+.3f}, {more.ci_low:+.3f} to {more.ci_high:+.3f}). Shuffled answers: "
        f"{found['both'].shuffled.mean():.2f}."
    )


def headline(predictions: dict[str, dict[str, Prediction]], gains: dict[str, Rate]) -> Cards:
    """Numbers on top: within questions."""
    found = predictions["within"]
    cards = [
        Card(PREDICTORS[name], round(found[name].area.value, 3),
             f"95 % interval {found[name].area.ci_low:.2f} to {found[name].area.ci_high:.2f}; shuffled "
             f"{found[name].shuffled.mean():.2f}")
        for name in ("graph", "probability", "both")
    ]  # fmt: skip
    more = gains["within"]
    cards.append(Card("gain over the probability", round(more.value, 3), f"{more.ci_low:+.3f} to {more.ci_high:+.3f}"))
    return Cards("Area under the curve, within a question", tuple(cards))


def case_sections(bench: Bench, cases: Sequence[Case], folder: Path) -> list[Section]:
    """What was asked, how often the answer is wrong, and how sure it is."""
    rng = generator(bench.cfg.seed, "report pictures")
    shown: list[Case] = []
    for wrong in (False, True):
        some = [case for case in cases if case.wrong is wrong]
        picked = rng.permutation(len(some))[: bench.cfg.hallucination.examples]
        shown += [some[i] for i in picked.tolist()]
    rows = []
    for name in dict.fromkeys(case.question for case in cases):
        of = [case for case in cases if case.question == name]
        bad = [case for case in of if case.wrong]
        sure = [np.mean([c.values["probability"] for c in some]) if some else None
                for some in ([c for c in of if not c.wrong], bad)]  # fmt: skip
        shares = [None if value is None else Percent(float(value)) for value in sure]
        rows.append((of[0].prompt, len(of), Percent(len(bad) / len(of)), *shares))
    columns = ("question", "cases", "wrong", "mean probability of right answers", "of wrong answers")
    config = bench.cfg.hallucination
    intro = (
        f"Test scenes made smaller, darker and noisy by one level between {config.levels[0]:g} and "
        f"{config.levels[1]:g}; hands have five or six fingers (six were never in training)."
    )
    sections: list[Section] = [Table("What was asked", columns, tuple(rows), intro)]
    if shown:
        pictures = [AskedPicture(c.image, c.prompt, c.said, c.answer, c.values["probability"]) for c in shown]
        drawn = asked_pictures(pictures, folder / "asked.png", max(config.examples, 1))
        sections.append(figure("Right and wrong answers, drawn at random", drawn, "Pictures with answers", wide=True))
    values = np.array([case.values["probability"] for case in cases])
    wrong = np.array([case.wrong for case in cases])
    drawn = probabilities(values[~wrong], values[wrong], folder / "probabilities.png")
    return [*sections, figure("How sure the model is", drawn, "Probability of right and of wrong answers")]


def area_sections(
    single: dict[str, Rate],
    predictions: dict[str, dict[str, Prediction]],
    gains: dict[str, Rate],
    folder: Path,
) -> list[Section]:
    """Areas of all predictors and views, and of each number alone."""
    groups = {VIEWS[v]: {PREDICTORS[name]: one.area for name, one in of.items()} for v, of in predictions.items()}
    drawn = areas(groups, folder / "areas.png")
    rows = [
        (VIEWS[view], PREDICTORS[name], area_text(one.area), round(float(one.shuffled.mean()), 3),
         round(float(np.quantile(one.shuffled, 0.975)), 3))
        for view, found in predictions.items() for name, one in found.items()
    ]  # fmt: skip
    rows += [(VIEWS[view], "gain of the graph over the probability", area_text(more), None, None)
             for view, more in gains.items()]  # fmt: skip
    columns = ("pairs compared", "predictor", "area, 95 % interval", "shuffled: mean", "97.5 % of the draws below")
    alone = {INDICATORS[name]: area for name, area in single.items()}
    each = areas({"each number alone": alone}, folder / "single.png")
    return [
        figure("Areas under the curve", drawn, "Area of each predictor, by what pairs are compared", wide=True),
        Table("All areas", columns, tuple(rows)),
        figure(
            "Each number alone", each, "Area of each number, nothing fitted",
            "Within questions, nothing fitted: above 0.5 where the number is higher for wrong answers. How hard the "
            "picture was made is not known to the model; it is there for comparison.", wide=True,
        ),
    ]  # fmt: skip


def by_question(cases: Sequence[Case], found: dict[str, Prediction]) -> Table:
    """Areas within each question."""
    names = ("probability", "graph", "both")
    rows = tuple(
        (question, *(None if np.isnan(table[name]) else round(table[name], 2) for name in names))
        for question, table in areas_by_question(cases, found).items()
    )
    return Table("Within each question", ("question", *(PREDICTORS[name] for name in names)), rows)


def reading(bench: Bench) -> Text:
    """What the numbers do not say."""
    nodes = bench.cfg.attribution.max_nodes
    return Text(
        "How to read this",
        (
            "A graph explains the model's own answer alone, and no indicator depends on that answer's probability, so "
            "what the graph knows is not the probability in other clothes. Values are standardised, and within "
            "questions centred, on the training folds; a scene's questions always share a fold.",
            "All questions together flatter every predictor: some questions are harder, and graphs differ by question. "
            "Pairs within a question are the fair test; the classifier fitted to other questions is the hard one. "
            "Shuffled answers come out a little below 0.5: a fold with more errors leaves fewer to those fitted to.",
            "How hard the picture was made is what we know and the model is not told. It stands beside the others, "
            "since a graph may tell no more than that the picture is hard.",
            f"Graphs hold the {nodes:,} most influential features; the others are summed by layer. The scenes are "
            "harder than any in training, so this is about errors under noise and about fingers that are denied, not "
            "about invented facts in long answers.",
        ),
    )
