"""Can the attribution graph of an answer tell that the answer is wrong, and more than the answer's probability tells?

A graph explains the model's own answer, whatever its probability. Its indicators (`attribution.indicators`) go into a
logistic classifier that is tested on scenes it was not fitted to, beside one that has the probability of the answer
and the entropy of all answers. A mix of questions makes errors easy to predict (some questions are harder), so all is
measured within questions too, and on questions that the classifier has never seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from tqdm import tqdm

from vlmscope.attribution.indicators import NAMES, PAPER, graph_indicators
from vlmscope.attribution.trace import trace
from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.data.orrery.objects import harder_scenes
from vlmscope.metrics.prediction import auc, bootstrap_auc, group_folds, held_out_scores, shuffled_aucs
from vlmscope.tasks.steps.intervene import rate_metrics

if TYPE_CHECKING:
    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.data.orrery.scenes import Question, Scene
    from vlmscope.tasks.steps.bench import Bench

VIEWS = ("pooled", "within", "unseen_question")
PREDICTORS = ("question", "question_probability", "probability", "paper", "graph", "both", "level", "level_both")
ABOUT_QUESTIONS = PREDICTORS[:2]  # nothing to say where questions are not compared


@dataclass(frozen=True)
class Case:
    """One question about one scene, what was said, and how its graph looks.

    `values` holds `probability` (of what was said), `answer_entropy` (nats, over the vocabulary) and the indicators.
    """

    scene: str
    question: str
    prompt: str
    answer: str
    said: str
    level: float
    image: np.ndarray
    values: dict[str, float]

    @property
    def wrong(self) -> bool:
        """Whether the answer is wrong."""
        return self.said != self.answer


@dataclass(frozen=True)
class Prediction:
    """How a predictor does in a view: its area with interval (`control`: shuffled), and held-out log-odds [n]."""

    area: Rate
    shuffled: np.ndarray
    scores: np.ndarray


def run(bench: Bench) -> None:
    """Leaves cases and predictions in `bench.records`; writes cases.parquet; metrics under errors/."""
    cases = list(asked_cases(bench))
    wrong = np.array([case.wrong for case in cases])
    if wrong.all() or not wrong.any():
        raise UserError(
            f"{int(wrong.sum())} of {len(cases)} answers are wrong: there is nothing to tell apart; change "
            "hallucination.levels or ask about more scenes (hallucination.scenes)"
        )
    if not any(0 < wrong[rows].sum() < len(rows) for rows in by_question(cases).values()):
        raise UserError(
            "no question has right and wrong answers: there is nothing to tell apart within one; change "
            "hallucination.levels or ask about more scenes (hallucination.scenes)"
        )
    write_cases(bench.run_dir / "cases.parquet", cases)
    predictions = {view: predict(bench, cases, view) for view in VIEWS}
    gains = {view: gain(bench, cases, view, found) for view, found in predictions.items()}
    bench.metrics |= case_metrics(cases) | prediction_metrics(predictions, gains)
    single = single_areas(bench, cases)
    bench.metrics |= {f"errors/single/{name}/auc": rate.value for name, rate in single.items()}
    bench.records["predict_errors"] = {"cases": cases, "predictions": predictions, "gains": gains, "single": single}


def by_question(cases: Sequence[Case]) -> dict[str, list[int]]:
    """The rows of each question's cases."""
    rows: dict[str, list[int]] = {}
    for row, case in enumerate(cases):
        rows.setdefault(case.question, []).append(row)
    return rows


def asked_cases(bench: Bench) -> Iterator[Case]:
    """Ask every question of every scene and trace the answer.

    Raises:
        UserError: fewer than two questions, so that none can be left unseen.
    """
    config = bench.cfg.hallucination
    scenes = harder_scenes(config.scenes, (config.levels[0], config.levels[1]), config.seed)
    asked = [(scene, question) for scene in scenes for question in scene.questions]
    questions = sorted({question.group for _, question in asked})
    if len(questions) < 2:
        raise UserError(
            f"hallucination.scenes asks {len(questions)} question ({', '.join(questions)}), and errors are predicted "
            "on questions not seen too; ask about another kind of scene"
        )
    settings = replace(bench.cfg.attribution, max_logits=1)  # more targets would tell how sure the model is
    for scene, question in tqdm(asked, desc="graphs", unit="graph"):
        yield one_case(bench, scene, question, settings)


def one_case(bench: Bench, scene: Scene, question: Question, settings: AttributionConfig) -> Case:
    """Trace the answer to one question."""
    assert scene.image is not None, "harder scenes have pictures"
    bench.token(question.answer)  # an answer of several tokens would never count as right
    inputs = bench.vlm.prepare(question.question, [Image.fromarray(scene.image)])
    traced = trace(bench.scope, inputs, settings)
    ends = traced.graph.nodes.ends()
    chances = traced.replacement.capped(traced.replacement.state.logits[-1].double()).log_softmax(-1)
    said = bench.vlm.tokenizer.decode([int(traced.graph.nodes.index[ends[0]])]).strip()
    values = {
        "probability": float(torch.exp(chances.max())),
        "answer_entropy": float(-(chances.exp() * chances).sum()),
        **graph_indicators(traced.pruned).values(),
    }
    level = float(scene.facts["level"])  # pyright: ignore[reportArgumentType]
    return Case(
        scene.key, question.group, question.question, question.answer, said, level, np.asarray(scene.image), values
    )


def columns(cases: Sequence[Case], names: Sequence[str]) -> np.ndarray:
    """[n, k] float64; the probability as log-odds, since its own scale hides what lies near 1."""
    table = np.array([[case.values[name] for name in names] for case in cases])
    if "probability" in names:
        at = list(names).index("probability")
        p = np.clip(table[:, at], 1e-12, 1 - 1e-12)
        table[:, at] = np.log(p) - np.log1p(-p)
    return table


def inputs_of(cases: Sequence[Case], predictor: str) -> np.ndarray:
    """[n, k], what a predictor may look at; the scene's level, which no model is told, only for comparison."""
    sure = ("probability", "answer_entropy")
    if predictor in ABOUT_QUESTIONS:
        questions = np.array([case.question for case in cases])
        which = (questions[:, None] == np.unique(questions)).astype(np.float64)
        return which if predictor == "question" else np.column_stack([which, columns(cases, sure)])
    if predictor.startswith("level"):
        rest = columns(cases, sure if predictor == "level" else (*sure, *NAMES))
        return np.column_stack([[case.level for case in cases], rest])
    names = {"probability": sure, "paper": PAPER, "graph": NAMES, "both": (*sure, *NAMES)}[predictor]
    return columns(cases, names)


def strata_of(cases: Sequence[Case], view: str) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """What is never split between folds [n], what values are centred by, and within what pairs are compared."""
    scenes = np.array([case.scene for case in cases])
    questions = np.array([case.question for case in cases])
    if view == "pooled":
        return scenes, None, None
    return (scenes, questions, questions) if view == "within" else (questions, None, questions)


def predict(bench: Bench, cases: Sequence[Case], view: str) -> dict[str, Prediction]:
    """Every predictor in one view."""
    config = bench.cfg.hallucination
    wrong, scenes = np.array([case.wrong for case in cases]), np.array([case.scene for case in cases])
    held, centred, compared = strata_of(cases, view)
    folds = group_folds(held, config.folds if view != "unseen_question" else None, config.seed)
    found = {}
    for name in PREDICTORS if view == "pooled" else PREDICTORS[len(ABOUT_QUESTIONS) :]:
        values = inputs_of(cases, name)
        scores = held_out_scores(values, wrong, folds, centred)
        null = shuffled_aucs(values, wrong, folds, config.shuffles, compared, config.seed, centred)
        area = bootstrap_auc(scores, wrong, scenes, compared, seed=config.seed)
        found[name] = Prediction(replace(area, control=float(null.mean())), null, scores)
    return found


def gain(bench: Bench, cases: Sequence[Case], view: str, found: dict[str, Prediction]) -> Rate:
    """What the graph adds to the probability: the difference of two areas, with its paired interval."""
    wrong, scenes = np.array([case.wrong for case in cases]), np.array([case.scene for case in cases])
    less, compared = found["probability"].scores, strata_of(cases, view)[2]
    return bootstrap_auc(found["both"].scores, wrong, scenes, compared, less, bench.cfg.hallucination.seed)


def single_areas(bench: Bench, cases: Sequence[Case]) -> dict[str, Rate]:
    """Each number and the scene's level alone, nothing fitted, within questions: above 0.5 where higher for wrong."""
    names = ("probability", "answer_entropy", *NAMES)
    table = columns(cases, names)
    wrong, scenes = np.array([case.wrong for case in cases]), np.array([case.scene for case in cases])
    questions = np.array([case.question for case in cases])
    table = np.column_stack([table, [case.level for case in cases]])
    seed = bench.cfg.hallucination.seed
    return {
        name: bootstrap_auc(table[:, i], wrong, scenes, questions, seed=seed)
        for i, name in enumerate((*names, "level"))
    }


def case_metrics(cases: Sequence[Case]) -> dict[str, float]:
    """How many there are, and the share of wrong answers in all and by question."""
    metrics = {"errors/cases": float(len(cases)), "errors/wrong_rate": float(np.mean([case.wrong for case in cases]))}
    for name in dict.fromkeys(case.question for case in cases):
        metrics[f"errors/{name}/wrong_rate"] = float(np.mean([c.wrong for c in cases if c.question == name]))
    return metrics


def prediction_metrics(predictions: dict[str, dict[str, Prediction]], gains: dict[str, Rate]) -> dict[str, float]:
    """`errors/<view>/<predictor>/auc` with interval; `_control` is the mean under shuffling, `_shuffled_high` its
    97.5 % quantile; `errors/<view>/gain` is that of the graph over the probability.
    """
    metrics: dict[str, float] = {}
    for view, found in predictions.items():
        for name, one in found.items():
            metrics |= rate_metrics(f"errors/{view}/{name}/auc", one.area)
            metrics[f"errors/{view}/{name}/auc_shuffled_high"] = float(np.quantile(one.shuffled, 0.975))
        metrics |= rate_metrics(f"errors/{view}/gain", gains[view])
    return metrics


def areas_by_question(cases: Sequence[Case], found: dict[str, Prediction]) -> dict[str, dict[str, float]]:
    """Question -> predictor -> area within it; nan where all answers are right, or all wrong."""
    wrong, questions = np.array([case.wrong for case in cases]), np.array([case.question for case in cases])
    return {
        name: {key: auc(one.scores[questions == name], wrong[questions == name]) for key, one in found.items()}
        for name in dict.fromkeys(questions.tolist())
    }


def write_cases(path: Path, cases: Sequence[Case]) -> None:
    """A row a case, without its picture."""
    words = ("scene", "question", "prompt", "answer", "said", "level", "wrong")
    rows = [{name: getattr(case, name) for name in words} | case.values for case in cases]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
