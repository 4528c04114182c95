"""Can the attribution graph of an answer tell that the answer is wrong, and more than the answer's probability tells?

A graph explains the model's own answer, whatever its probability. Its indicators go into a logistic classifier that is
tested on scenes it was not fitted to, next to one that has the probability of the answer and the entropy of all
answers. A mix of questions makes errors easy to predict (some questions are harder), so everything is also measured
within questions, and on questions that the classifier has never seen.

With I the influence on the graph's ends (`attribution.influence`), over feature nodes i (the first three are those by
which arXiv 2605.22902 predicts hallucinations):

    c_i = I_i / sum_j I_j                               contribution
    entropy   = -sum_i c_i log c_i                      nats
    distance  = sum_i c_i (T - 1 - position_i)          tokens before the last one
    top1      = max_i c_i

Shares are of the influence that ends at sources. None depends on the scale of the ends' weights, hence not on the
probability of the answer. Shapes: n cases, k numbers per case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from vlmscope.attribution.trace import trace
from vlmscope.core.errors import UserError, check_least
from vlmscope.core.graph import NodeKind, PrunedGraph
from vlmscope.core.records import generator
from vlmscope.core.results import Rate
from vlmscope.data.orrery.dataset import plainly_asked
from vlmscope.data.orrery.rendering import hand_scene, make_scene
from vlmscope.data.orrery.scenes import PICTURED, SIDE, Scene
from vlmscope.metrics.prediction import bootstrap_auc, group_folds, held_out_scores, shuffled_aucs
from vlmscope.report.figures import rate_bars
from vlmscope.report.marks import write_rows

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

SURE = ("probability", "answer_entropy")
PAPER = ("entropy", "distance", "top1")
NAMES = (*PAPER, "image_share", "text_share", "error_share", "replacement", "completeness", "nodes")
# What each predictor looks at; a scene's level of hardness, which no model is told, only for comparison.
PREDICTORS = {
    "question": (),
    "question_probability": SURE,
    "probability": SURE,
    "paper": PAPER,
    "graph": NAMES,
    "both": (*SURE, *NAMES),
    "level": ("level", *SURE),
    "level_both": ("level", *SURE, *NAMES),
}


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

    `errors/<view>/<predictor>/auc`; `_control` is the mean under shuffling, `_shuffled_high` its 97.5 % quantile;
    `errors/<view>/gain` is that of the graph over the probability; `errors/single/<number>/auc` of each number alone.
    """
    cases, seed = pd.DataFrame(asked_cases(bench)), bench.cfg.seed
    check_errors(cases)
    bench.write_table("cases", cases, "zstd")
    wrong, scenes, questions = (cases[name].to_numpy() for name in ("wrong", "scene", "question"))
    metrics = {"errors/cases": float(len(cases)), "errors/wrong_rate": float(wrong.mean())}
    metrics |= {f"errors/{name}/wrong_rate": float(part.mean()) for name, part in cases.groupby("question").wrong}
    # View -> what is never split between folds, what values are centred by, within what pairs are compared.
    views = {
        "pooled": (scenes, None, None),
        "within": (scenes, questions, questions),
        "unseen_question": (questions, None, questions),
    }
    bars: dict[str, dict[str, Rate]] = {}
    for view, (held, centred, compared) in views.items():
        folds = group_folds(held, bench.analysis.folds if view != "unseen_question" else None, seed)
        scores = {}
        for name in PREDICTORS if view == "pooled" else list(PREDICTORS)[2:]:
            values = inputs_of(cases, name)
            scores[name] = held_out_scores(values, wrong, folds, centred)
            null = shuffled_aucs(values, wrong, folds, bench.analysis.shuffles, compared, seed, centred)
            area = replace(bootstrap_auc(scores[name], wrong, scenes, compared, seed=seed), control=float(null.mean()))
            metrics |= area.metrics(f"errors/{view}/{name}/auc")
            metrics[f"errors/{view}/{name}/auc_shuffled_high"] = float(np.quantile(null, 0.975))
            bars.setdefault(name, {})[view] = area
        gain = bootstrap_auc(scores["both"], wrong, scenes, compared, scores["probability"], seed)
        metrics |= gain.metrics(f"errors/{view}/gain")
    # Each number alone, nothing fitted, within questions: above 0.5 where it is higher for wrong answers.
    alone = (*SURE, *NAMES, "level")
    values = columns(cases, alone)
    single = [bootstrap_auc(values[:, i], wrong, scenes, questions, seed=seed) for i in range(len(alone))]
    metrics |= {f"errors/single/{name}/auc": area.value for name, area in zip(alone, single, strict=True)}
    rows = [(view, name, area) for name, areas in bars.items() for view, area in areas.items()]
    rows += [("each number alone", name, area) for name, area in zip(alone, single, strict=True)]
    names = ("pairs", "predictor", "area", "from", "to", "shuffled")
    table = [(view, name, area.value, area.ci_low, area.ci_high, area.control) for view, name, area in rows]
    write_rows(bench.run_dir / "areas.parquet", [dict(zip(names, row, strict=True)) for row in table])
    series = {view: [areas.get(view) for areas in bars.values()] for view in views}
    folder, ylabel = bench.run_dir / "figures", "area under the ROC curve (%)"
    rate_bars(list(bars), series, folder / "areas.png", "Held-out areas", ylabel, "wrong and right shuffled")
    rate_bars(list(alone), {"alone": single}, folder / "single.png", "Each number alone, within a question", ylabel)
    return metrics


def check_errors(cases: pd.DataFrame) -> None:
    """Refuse answers that are all right or all wrong, also within every question."""
    wrong, more = cases.wrong, "change analysis.levels or ask about more scenes (analysis.scenes)"
    if wrong.all() or not wrong.any():
        raise UserError(f"{int(wrong.sum())} of {len(cases)} answers are wrong: there is nothing to tell apart; {more}")
    if not any(0 < part.sum() < len(part) for _, part in cases.groupby("question").wrong):
        raise UserError(f"no question has right and wrong answers: there is nothing to tell apart within one; {more}")


def asked_cases(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ask every question of every scene and trace the answer: a row per case.

    `probability` is that of the answer, `answer_entropy` (nats) that of all next tokens; the rest are indicators.

    Raises:
        UserError: fewer than two questions, so that none can be left unseen.
    """
    scenes = harder_scenes(bench.analysis.scenes, tuple(bench.analysis.levels), bench.cfg.seed)
    prompts = [(scene, question) for scene in scenes for question in scene.questions]
    questions = sorted({question.group for _, question in prompts})
    if len(questions) < 2:
        raise UserError(
            f"analysis.scenes asks {len(questions)} question ({', '.join(questions)}), and errors are predicted "
            "on questions not seen too; ask about another kind of scene"
        )
    settings = replace(bench.cfg.attribution, max_logits=1)  # more targets would tell how sure the model is
    for scene, question in tqdm(prompts, desc="graphs", unit="graph"):
        assert scene.image is not None, "harder scenes have pictures"
        bench.token(question.answer)  # an answer of several tokens would never count as right
        traced = trace(bench.scope, bench.vlm.prepare(question.question, [Image.fromarray(scene.image)]), settings)
        ends = traced.graph.nodes.ends()
        chances = traced.replacement.capped(traced.replacement.state.logits[-1].double()).log_softmax(-1)
        answer = bench.vlm.tokenizer.decode([int(traced.graph.nodes.index[ends[0]])]).strip()
        yield {
            "scene": scene.key,
            "question": question.group,
            "prompt": question.question,
            "answer": question.answer,
            "said": answer,
            "level": float(scene.facts["level"]),  # pyright: ignore[reportArgumentType]
            "wrong": answer != question.answer,
            "probability": float(torch.exp(chances.max())),
            "answer_entropy": float(-(chances.exp() * chances).sum()),
            **graph_indicators(traced.pruned),
        }


# Harder scenes, on which Orrery errs often enough that errors can be predicted, are smaller, darker and noisy by one
# level u: these are the shares of side and brightness that u = 1 takes, and the noise (pixels in 0..1) that it adds.
SMALLER, DARKER, NOISE = 0.5, 0.7, 0.12


def degrade(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """A picture uint8 [64, 64, 3] made harder; level 0 gives it back as it is.

    It is shrunk onto the picture's median colour at a random place, darkened, and given Gaussian noise.
    """
    side = round(SIDE * (1 - SMALLER * level))
    row, column = (int(value) for value in rng.integers(0, SIDE - side + 1, 2))
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    canvas = np.empty(image.shape, np.float64)
    canvas[:] = np.median(image.reshape(-1, 3), axis=0)
    canvas[row : row + side, column : column + side] = np.asarray(small)
    dark = canvas / 255.0 * (1 - DARKER * level)
    noisy = dark + rng.normal(0.0, 1.0, image.shape) * NOISE * level
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8)


def harder_scenes(counts: dict[str, int], levels: tuple[float, float], seed: int = 0) -> list[Scene]:
    """Test scenes with their questions in the canonical words; `facts["level"]` says how hard each is.

    The facts stay as they are, so the right answers do. Hands have five or six fingers, each half of the time.

    Args:
        counts: scenes of each kind that has pictures.
        levels: the least and the highest level, between which it is uniform.
        seed: of scenes and levels.
    """
    scenes = []
    for kind, count in counts.items():
        if kind not in PICTURED:
            raise UserError(f"no harder scenes of {kind!r}: choose from {', '.join(PICTURED)}")
        for i in range(count):
            rng = generator(seed, "harder", kind, i)
            level = float(rng.uniform(*levels))
            if kind == "hands":
                scene = replace(hand_scene(rng, int(rng.choice([5, 6]))), key=f"test-hands-{i:06d}")
            else:
                scene = make_scene("test", kind, i, seed)
            assert scene.image is not None, "kinds with pictures have one"
            facts = {**scene.facts, "level": level}
            scenes.append(replace(plainly_asked(scene), image=degrade(scene.image, level, rng), facts=facts))
    return scenes


def graph_indicators(pruned: PrunedGraph) -> dict[str, float]:
    """The indicators of a graph. Without a feature that has influence, entropy, distance and top1 are 0."""
    graph, flow, scores = pruned.graph, pruned.influence, pruned.scores
    features = graph.nodes.of(NodeKind.FEATURE)
    share = flow[features]
    share = share / share.sum() if share.sum() > 0 else share
    used = share > 0
    tokens = graph.nodes.of(NodeKind.TOKEN)
    seen = float(flow[tokens].sum())
    image = float(flow[tokens[graph.is_image[graph.nodes.position[tokens]]]].sum())
    return {
        "entropy": float(-(share[used] * np.log(share[used])).sum()),
        "distance": float(share @ (len(graph.tokens) - 1 - graph.nodes.position[features])),
        "top1": float(share.max()) if len(share) else 0.0,
        "image_share": scores.token_share * image / seen if seen else 0.0,
        "text_share": scores.token_share * (1 - image / seen) if seen else 0.0,
        "error_share": scores.error_share,
        "replacement": scores.replacement,
        "completeness": scores.completeness,
        "nodes": float(pruned.n_nodes),
    }


def columns(cases: pd.DataFrame, names: tuple[str, ...]) -> np.ndarray:
    """[n, k] float64; the probability as log-odds, since its own scale hides what lies near 1."""
    table = cases[list(names)].copy()
    if "probability" in names:
        p = np.clip(table.probability, 1e-12, 1 - 1e-12)
        table["probability"] = np.log(p) - np.log1p(-p)
    return table.to_numpy(np.float64)


def inputs_of(cases: pd.DataFrame, predictor: str) -> np.ndarray:
    """[n, k], what a predictor may look at; the question as a column for each."""
    values = columns(cases, PREDICTORS[predictor])
    if not predictor.startswith("question"):
        return values
    questions = cases.question.to_numpy(str)
    return np.column_stack([(questions[:, None] == np.unique(questions)).astype(np.float64), values])
