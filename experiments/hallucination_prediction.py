"""Can the attribution graph of an answer tell that the answer is wrong, and more than its own uncertainty tells?

A graph explains the model's own answer, whatever its probability. Its indicators go into a logistic classifier that is
tested on scenes it was not fitted to, next to one of the answer's probability and entropy, and next to these alone,
with nothing fitted (the prior). Some questions are harder, so all is also measured within questions, and on questions
not fitted to. The graph predicts more only if the difference of areas, on the same scenes, has an interval above 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from vlmscope.attribution.influence import graph_indicators
from vlmscope.attribution.trace import trace
from vlmscope.core.errors import UserError, check_least
from vlmscope.data.orrery.dataset import harder_scenes, pictures
from vlmscope.metrics.prediction import PredictorTest, group_folds, prior
from vlmscope.report.figures import rate_bars
from vlmscope.report.marks import write_rows

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

SURE = ("probability", "answer_entropy")
PAPER = ("entropy", "distance", "top1")
NAMES = (*PAPER, "image_share", "text_share", "error_share", "replacement", "completeness", "nodes")
# What each predictor looks at; a scene's level of hardness, which no model is told, only for comparison.
PREDICTORS = {
    "question": (), "question_probability": SURE, "probability": SURE, "paper": PAPER, "graph": NAMES,
    "both": (*SURE, *NAMES), "level": ("level", *SURE), "level_both": ("level", *SURE, *NAMES),
}  # fmt: skip
# Differences of areas, paired over scenes; the entropy alone is the prior that a graph has to beat.
GAINS = {"gain": ("both", "probability")} | {f"{n}_over_entropy": (n, "entropy_alone") for n in ("graph", "both")}


@dataclass
class Settings:
    """`scenes` of each kind from the test split, made harder by a level between the two `levels` (0: as in training);
    `folds` of the cross-validation, which never split a scene; `shuffles` of which answers are wrong, for controls.
    """

    scenes: dict[str, int]
    levels: list[float]
    folds: int
    shuffles: int

    def __post_init__(self) -> None:
        if len(self.levels) != 2 or not 0 <= self.levels[0] <= self.levels[1] <= 1:
            raise UserError(f"analysis.levels={list(self.levels)}: give two levels, 0 <= least <= highest <= 1")
        if sum(self.scenes.values()) < 2 or min(self.scenes.values()) < 0:
            raise UserError(f"analysis.scenes={dict(self.scenes)}: they count scenes; ask for two or more")
        check_least("analysis", self, folds=2, shuffles=1)


def analyse(bench: Bench) -> dict[str, float]:
    """Write cases.parquet (a row per case), areas.parquet and figures/areas.png, single.png; metrics `errors/...`.

    `errors/<view>/<predictor>/auc` (`_control` is the mean under shuffling, `_shuffled_high` its 97.5 % quantile),
    `errors/<view>/<gain>` of `GAINS`, `errors/single/<number>/auc`, and `prior`, the share of the most frequent answer.
    """
    cases, seed, settings = pd.DataFrame(asked_cases(bench)), bench.cfg.seed, bench.analysis
    check_errors(cases)
    bench.write_table("cases", cases, "zstd")
    wrong, scenes, questions = (cases[name].to_numpy() for name in ("wrong", "scene", "question"))
    metrics = {"errors/cases": float(len(cases)), "errors/wrong_rate": float(wrong.mean())}
    metrics |= {f"errors/{name}/wrong_rate": float(part.mean()) for name, part in cases.groupby("question").wrong}
    metrics |= {f"errors/{name}/prior": prior(part.tolist()) for name, part in cases.groupby("question").answer}
    by_scene, by_question = (group_folds(*held, seed) for held in ((scenes, settings.folds), (questions, None)))
    # View -> folds, within what values are centred, and within what pairs are compared.
    views: dict[str, tuple[Any, Any, Any]] = {"pooled": (by_scene, None, None),
        "within": (by_scene, questions, questions), "unseen_question": (by_question, None, questions)}  # fmt: skip
    tests = {view: PredictorTest(wrong, scenes, *folds, settings.shuffles, seed) for view, folds in views.items()}
    areas, shown = {}, {}
    for view, test in tests.items():
        scores = {"entropy_alone": cases.answer_entropy.to_numpy(), "probability_alone": -cases.probability.to_numpy()}
        areas |= {(view, name): test.area(score) for name, score in scores.items()}
        for name in PREDICTORS if view == "pooled" else list(PREDICTORS)[2:]:
            scores[name], areas[view, name], high = test.fitted(inputs_of(cases, name))
            metrics[f"errors/{view}/{name}/auc_shuffled_high"] = high
        for name in scores:
            metrics |= areas[view, name].metrics(f"errors/{view}/{name}/auc")
        for name, (more, less) in GAINS.items():
            areas[view, name] = gain = test.area(scores[more], scores[less])
            shown[view, name] = "shown" if gain.ci_low > 0 else "not shown"
            metrics |= gain.metrics(f"errors/{view}/{name}")
    # Each number alone, nothing fitted, within questions: above 0.5 where it is higher for wrong answers.
    alone = (*SURE, *NAMES, "level")
    single = [tests["within"].area(column) for column in inputs_of(cases, alone).T]
    areas |= {("each number alone", name): area for name, area in zip(alone, single, strict=True)}
    metrics |= {f"errors/single/{name}/auc": area.value for name, area in zip(alone, single, strict=True)}
    rows = [{"pairs": key[0], "predictor": key[1], "area": area.value, "from": area.ci_low, "to": area.ci_high,
             "shuffled": area.control, "predicts more": shown.get(key, "")} for key, area in areas.items()]  # fmt: skip
    write_rows(bench.run_dir / "areas.parquet", rows)
    bars = list(dict.fromkeys(name for view, name in areas if view in views and name not in GAINS))
    series = {view.replace("unseen", "unfitted"): [areas.get((view, name)) for name in bars] for view in views}
    folder, ylabel = bench.run_dir / "figures", "area under the ROC curve (%)"
    rate_bars(bars, series, folder / "areas.png", "Held-out areas", ylabel, "wrong and right shuffled")
    rate_bars(list(alone), {"alone": single}, folder / "single.png", "Each number alone, within a question", ylabel)
    return metrics


def check_errors(cases: pd.DataFrame) -> None:
    """Refuse answers that are all right or all wrong within every question."""
    if not any(0 < part.sum() < len(part) for _, part in cases.groupby("question").wrong):
        counts = f"{int(cases.wrong.sum())} of all {len(cases)} are wrong; ask about more scenes (analysis.scenes)"
        raise UserError(f"no question has right and wrong answers ({counts}), or change analysis.levels")


def asked_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ask every question of every scene, of which there must be two, and trace the answer: a row per case.

    `probability` is that of the answer, `answer_entropy` (nats) that of all next tokens; the rest are indicators.
    """
    harder = harder_scenes(bench.analysis.scenes, tuple(bench.analysis.levels), bench.cfg.seed)
    prompts = [(scene, question) for scene in harder for question in scene.questions]
    if len(questions := {question.group for _, question in prompts}) < 2:
        more = "and errors are predicted on questions not fitted too; ask about another kind of scene"
        raise UserError(f"analysis.scenes asks {len(questions)} question ({', '.join(questions)}), {more}")
    settings = replace(bench.cfg.attribution, max_logits=1)  # more targets would tell how sure the model is
    for scene, question in tqdm(prompts, desc="graphs", unit="graph"):
        bench.token(question.answer)  # an answer of several tokens would never count as right
        shown = bench.recorded("test", scene.key, pictures([scene]), "cross-validation")
        (inputs,) = bench.inputs(shown, question.question)
        traced = trace(bench.scope, inputs, settings)
        ends = traced.graph.nodes.ends()
        chances = traced.replacement.capped(traced.replacement.state.logits[-1].double()).log_softmax(-1)
        answer = bench.vlm.tokenizer.decode([int(traced.graph.nodes.index[ends[0]])]).strip()
        yield {
            "scene": scene.key, "question": question.group, "prompt": question.question, "answer": question.answer,
            "said": answer, "level": float(scene.facts["level"]),  # pyright: ignore[reportArgumentType]
            "wrong": answer != question.answer, "probability": float(torch.exp(chances.max())),
            "answer_entropy": float(-(chances.exp() * chances).sum()), **graph_indicators(traced.pruned),
        }  # fmt: skip


def inputs_of(cases: pd.DataFrame, predictor: str | tuple[str, ...]) -> np.ndarray:
    """[n, k], what a predictor may look at: columns (the probability as log-odds), and one for each question."""
    table = cases[list(PREDICTORS[predictor] if isinstance(predictor, str) else predictor)].astype(np.float64)
    if "probability" in table:
        p = np.clip(table.probability, 1e-12, 1 - 1e-12)
        table["probability"] = np.log(p) - np.log1p(-p)
    asked = pd.get_dummies(cases.question) if str(predictor).startswith("question") else cases[[]]
    return np.column_stack([asked.to_numpy(np.float64), table.to_numpy()])
