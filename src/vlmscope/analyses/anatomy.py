"""Anatomy of a behaviour: how much of it remains without MLPs or attention, and where a graph's influence lies.

A graph of MLP features can explain an answer only as far as the answer needs MLPs. For each question the blocks of many
layers are ablated together (`vlmscope.interventions.ablation`), by range of layers and position role, and what remains
stands between what the model does as it is and the answer prior, the most one can do without seeing the case. The
share of a question that needs the MLPs is
    need = (as it is - without all MLPs) / (as it is - prior)
of accuracies, or KL(without) / KL(prior) where no answers are known; KL is from the unedited distribution p_c of each
case to the ablated one, and the prior is their mean over cases.

anatomy.parquet, a row per question, what is ablated, and measure:
    question, cases
    blocks      none (as it is), prior, mlp, attention, both; of a graph: features, tokens, errors
    method      mean or resample; empty for none, prior and graphs
    layers      all, or a range such as 0-3
    positions   all, image (soft tokens), question, last; of a graph also special
    measure     accuracy (where answers are known), same (the unedited top token), kl (nats),
                influence (share of all influence of nodes of this kind, mean over graphs)
    value, ci_low, ci_high      the interval of shares of cases: Wilson's 95 %; null for other measures
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import influence, logit_weights
from vlmscope.attribution.trace import attribute
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import ROLES
from vlmscope.data.inputs import Side, orrery_questions
from vlmscope.data.orrery.scenes import COMPOSED, PICTURED, vocabulary
from vlmscope.interventions.ablation import BLOCKS, METHODS, Ablation, divergence, outcomes
from vlmscope.metrics.rates import wilson_interval
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch, aligned, make_batch
from vlmscope.models.loading import VLM
from vlmscope.models.orrery import SPECIAL
from vlmscope.replacement import build_replacement
from vlmscope.report.anatomy import headline, need, told
from vlmscope.scope import Scope

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

PLACES = (None, "image", "question", "last")  # position roles that are ablated; None is all positions
CHOSEN: tuple[tuple[str, ...], ...] = (("mlp",), ("attention",), BLOCKS)
KINDS = {NodeKind.FEATURE: "features", NodeKind.TOKEN: "tokens", NodeKind.ERROR: "errors"}


@dataclass(frozen=True)
class CaseSet:
    """The n cases of a question, those that align in one batch."""

    name: str
    batches: tuple[InputBatch, ...]
    inputs: tuple[ModelInputs, ...]  # n, in the order of the batches
    answers: tuple[str, ...]  # n right words; empty where some are not known

    def __len__(self) -> int:
        return len(self.inputs)


def case_set(vlm: VLM, name: str, sides: Sequence[Side]) -> CaseSet:
    """Prepare the cases of a question.

    Raises:
        UserError: fewer than two cases, or a prompt that the model refuses.
    """
    if len(sides) < 2:
        raise UserError(f"the question {name!r} has {len(sides)} case; a mean needs two or more")
    prompts = [vlm.prepare(side.prompt, list(side.images)) for side in sides]
    groups = aligned(prompts)
    batches = tuple(make_batch(vlm.adapter, [prompts[i] for i in group]) for group in groups)
    order = [i for group in groups for i in group]
    answers = tuple(sides[i].answer for i in order)
    return CaseSet(name, batches, tuple(prompts[i] for i in order), answers if all(answers) else ())


def default_questions(vlm: VLM, count: int, seed: int = 0) -> dict[str, list[Side]]:
    """Orrery's questions, as far as the model takes pictures, or text without one.

    Those of composed scenes are for a model with their vocabulary, Orrery 2.
    """
    knows_all = set(vlm.tokenizer.get_vocab()) == {*SPECIAL, *vocabulary(COMPOSED)}
    kinds = (*PICTURED, *COMPOSED) if knows_all else PICTURED
    return orrery_questions(count, kinds if vlm.adapter.has_vision else (), not vlm.adapter.needs_pictures, seed)


def answer_ids(tokenizer: Any, word: str) -> set[int]:
    """Tokens that begin an answer, spelt with and without a capital and a leading space."""
    begins = set()
    for spelt in (f"{space}{text}" for text in (word, word.capitalize()) for space in ("", " ")):
        for token in tokenizer(spelt, add_special_tokens=False)["input_ids"]:
            if tokenizer.decode([token]).strip():  # the first that is more than a space
                begins.add(int(token))
                break
    return begins - {tokenizer.unk_token_id}


def ablations(n_layers: int, roles: Sequence[str], parts: int, methods: Sequence[str] = METHODS) -> list[Ablation]:
    """All blocks of all layers by role, and everywhere by `parts` equal ranges of layers (means only)."""
    whole = (0, n_layers - 1)
    places = [role for role in PLACES if role is None or role in roles]
    chosen = [Ablation(blocks, method, whole, role) for method, blocks, role in product(methods, CHOSEN, places)]
    ranges = [(int(part[0]), int(part[-1])) for part in np.array_split(np.arange(n_layers), parts) if len(part)]
    return chosen + [Ablation(blocks, "mean", span) for blocks in CHOSEN for span in ranges if span != whole]


def measured(vlm: VLM, cases: CaseSet, chosen: Sequence[Ablation], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the table for one question: as it is, the prior, and each ablation."""
    base, results = outcomes(vlm.adapter, cases.batches, chosen, seed)
    top = base.argmax(-1).numpy(force=True)
    right = [answer_ids(vlm.tokenizer, answer) for answer in cases.answers]
    whole = f"0-{vlm.adapter.n_layers - 1}"
    rows: list[dict[str, Any]] = []

    def add(blocks: str, measure: str, values: np.ndarray, method: str = "", layers: str = whole, role: Any = None):
        values = values[~np.isnan(values)]
        if not len(values):
            return
        share, low, high = float(values.mean()), None, None
        if measure != "kl":
            low, high = map(float, wilson_interval(np.asarray(share), np.asarray(len(values))))
        place = {"layers": "all" if layers == whole else layers, "positions": role or "all"}
        what = {"question": cases.name, "cases": len(values), "blocks": blocks, "method": method, **place}
        rows.append({**what, "measure": measure, "value": share, "ci_low": low, "ci_high": high})

    def hits(tokens: np.ndarray) -> np.ndarray:
        shares = [token in begins for token, begins in zip(tokens.tolist(), right, strict=True)]
        return np.where(tokens < 0, np.nan, np.array(shares, float))

    if right:
        common = Counter(cases.answers).most_common(1)[0][0]
        add("none", "accuracy", hits(top))
        add("prior", "accuracy", np.array([answer == common for answer in cases.answers], float))
    add("prior", "same", (top == np.bincount(top).argmax()).astype(float))
    mean = torch.logsumexp(base, 0, keepdim=True) - np.log(len(base))
    add("prior", "kl", divergence(base, mean.expand_as(base)))
    for ablation, result in zip(chosen, results, strict=True):
        blocks = "both" if len(ablation.blocks) == 2 else ablation.blocks[0]
        where = (ablation.method, ablation.span, ablation.role)
        if right:
            add(blocks, "accuracy", hits(result.top), *where)
        add(blocks, "same", np.where(result.top < 0, np.nan, (result.top == top).astype(float)), *where)
        add(blocks, "kl", result.kl, *where)
    return rows


def influence_rows(scope: Scope, cases: CaseSet, graphs: int, config: AttributionConfig) -> list[dict[str, Any]]:
    """Rows of the table: shares of the influence of features, tokens and errors by position role, mean over graphs."""
    chosen = [cases.inputs[number] for number in np.linspace(0, len(cases) - 1, min(graphs, len(cases))).astype(int)]
    shares: dict[tuple[str, str], list[float]] = {}
    for inputs in chosen:
        graph = attribute(build_replacement(scope, inputs), config, scope.vlm.tokenizer, scope.vlm.name)
        flow = influence(graph, logit_weights(graph)).nodes
        for kind, name in KINDS.items():
            nodes = graph.nodes.of(kind)
            total, roles = float(flow[nodes].sum()), graph.roles[graph.nodes.position[nodes]]
            for role in ROLES if total > 0 else ():
                shares.setdefault((name, role), []).append(float(flow[nodes][roles == role].sum()) / total)
    what = {"question": cases.name, "cases": len(chosen), "method": "", "layers": "all", "measure": "influence"}
    return [
        {**what, "blocks": name, "positions": role, "value": float(np.mean(values)), "ci_low": None, "ci_high": None}
        for (name, role), values in shares.items()
    ]


def anatomy(
    vlm: VLM,
    questions: Mapping[str, Sequence[Side]],
    parts: int = 2,
    scope: Scope | None = None,
    graphs: int = 0,
    config: AttributionConfig | None = None,
    seed: int = 0,
    methods: Sequence[str] = METHODS,
) -> pd.DataFrame:
    """The table of all questions; influence where there is a `scope` and `graphs` of each question are wanted."""
    rows: list[dict[str, Any]] = []
    for name, sides in tqdm(questions.items(), desc="anatomy", unit="question", delay=2.0):
        cases = case_set(vlm, name, sides)
        roles = {str(role) for batch in cases.batches for role in batch.roles}
        rows += measured(vlm, cases, ablations(vlm.adapter.n_layers, sorted(roles), parts, methods), seed)
        if scope is not None and graphs:
            rows += influence_rows(scope, cases, graphs, config or AttributionConfig())
    return pd.DataFrame(rows)


def metrics_of(table: pd.DataFrame) -> dict[str, float]:
    """`anatomy/<question>/<as_it_is, prior, without_mlp...>/<accuracy or kl>`, the mean need of MLPs, and influence."""
    metrics: dict[str, float] = {}
    for question in dict.fromkeys(table.question):
        measure, numbers = headline(table, question)
        metrics |= {f"anatomy/{question}/{name}/{measure}": value for name, value in numbers.items()}
    needs = [need(table, question) for question in dict.fromkeys(table.question)]
    known = [value for value in needs if value is not None]
    if known:
        metrics["anatomy/need_of_mlp_share"] = float(np.mean(known))
    graphs: Any = table[table.measure == "influence"]
    for (blocks, role), values in graphs.groupby(["blocks", "positions"]).value.mean().items():
        metrics[f"anatomy/influence/{blocks}/{role}_share"] = float(values)
    return metrics


DEFAULT = ("name", "text_sum")  # the question of Orrery's that stands for a model: of a picture, else of text alone


def in_short(vlm: VLM, count: int, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The headline numbers of the model's default question, as a line and as metrics."""
    asked = default_questions(vlm, count, seed)
    name = next(name for name in DEFAULT if name in asked)
    table = anatomy(vlm, {name: asked[name]}, parts=1, seed=seed, methods=["mean"])
    measure, numbers = headline(table, name)
    return f"{name} ({len(asked[name])} cases), {told(numbers, measure)}", metrics_of(table)


@dataclass
class Anatomy:
    """The analysis `anatomy` of an experiment: its own questions, asked of `cases` test pictures of every concept, or
    of both sides of its pairs; ranges of layers and graphs as in task=anatomy.
    """

    cases: int = 15
    parts: int = 2
    graphs: int = 0

    def analyse(self, bench: Bench) -> dict[str, float]:
        """anatomy.parquet, which the mark `anatomy` shows, and metrics."""
        table = anatomy(bench.vlm, self.questions(bench), self.parts, bench.scope, self.graphs, bench.cfg.attribution)
        bench.write_table("anatomy", table)
        return metrics_of(table)

    def questions(self, bench: Bench) -> dict[str, list[Side]]:
        """The cases by question."""
        if bench.cfg.circuit is None:
            pairs = bench.pairs("test")
            return {
                name: [s for pair in part for s in (pair.original, pair.counterfactual)] for name, part in pairs.items()
            }
        pictures = {concept: bench.concept_pictures(concept, "test", self.cases) for concept in bench.all_concepts}
        return {
            name: [
                Side(question.prompt, (image,), question.answers[concept])
                for concept, images in pictures.items()
                for image in images
                if concept in question.answers
            ]
            for name, question in bench.circuit_config.questions.items()
        }
