"""Features of graphs edited one at a time: how far does the graph predict what the edit does to the answer?

A graph explains the logit of an answer minus that of another. Multiplying a feature's activation by s should move this
difference by (s - 1) times the feature's edge (direct effect), or by (s - 1) times its total effect where other active
features respond linearly; adding c to an activation a, by c / a times it. Whether it does is measured in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from vlmscope.attribution.adjoint import Adjoint, total_effects
from vlmscope.attribution.influence import prune
from vlmscope.attribution.targets import difference_target
from vlmscope.attribution.trace import attribute
from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import generator
from vlmscope.interventions.effects import SingleEdits, single_effects
from vlmscope.interventions.run import base_run
from vlmscope.metrics.prediction import Agreement, agreement
from vlmscope.replacement.model import ReplacementModel, build_replacement
from vlmscope.tasks.steps.intervene import rate_metrics
from vlmscope.tasks.steps.pair_subjects import pairs_of

if TYPE_CHECKING:
    from vlmscope.models.base import ModelInputs
    from vlmscope.tasks.steps.bench import Bench

PREDICTORS = ("edge", "total")  # direct effect; total effect with a linear response of the other active features
DTYPES = {"float32": torch.float32, "float64": torch.float64, "model": None}
NAMES = {"direct": "edge", "frozen_attention": "total", "free": "total"}  # what a mode's headline is predicted by


@dataclass(frozen=True)
class Asked:
    """One input: its name, the prompt, and the two tokens whose logits are compared."""

    name: str
    inputs: ModelInputs
    tokens: tuple[int, int]


@dataclass(frozen=True)
class Sampled:
    """Features drawn from one graph, [n] each.

    Attributes:
        layer, position, index: where they are.
        activation: > 0.
        band: of influence, 0 for the most influential.
        effects: predictor -> effect of the whole feature, in logits.
        mean: mean activation of its layer's active features at this input.
    """

    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    activation: np.ndarray
    band: np.ndarray
    effects: dict[str, np.ndarray]
    mean: np.ndarray


@dataclass(frozen=True)
class Measured:
    """All edits of all inputs, [n] each: what was predicted and what came out, in logits of difference."""

    input: np.ndarray
    edit: np.ndarray
    mode: np.ndarray
    band: np.ndarray
    layer: np.ndarray
    measured: np.ndarray
    predicted: dict[str, np.ndarray]

    def where(self, **chosen: object) -> np.ndarray:
        """[n] bool, the rows of these values: `where(mode="free", edit="ablate")`."""
        found = np.ones(len(self.mode), bool)
        for name, value in chosen.items():
            found &= getattr(self, name) == value
        return found


def run(bench: Bench) -> None:
    """Leaves `Measured` and the agreements in `bench.records`; writes predicted_effects.parquet; metrics predicted/."""
    settings = bench.cfg.single_edits
    asked = list(questions(bench))
    if len(asked) < settings.least:
        raise UserError(
            f"{len(asked)} inputs are answered as they should be, and an interval needs single_edits.least="
            f"{settings.least}: raise single_edits.inputs"
        )
    parts = [part for one in asked for part in measure(bench, one)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    table = Measured(
        *(columns[name] for name in ("input", "edit", "mode", "band", "layer", "measured")),
        predicted={name: columns[name] for name in PREDICTORS},
    )
    with atomic_path(bench.run_dir / "predicted_effects.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")
    found = agreements(bench, table)
    for key, one in found.items():
        bench.metrics |= agreement_metrics("predicted/" + "/".join(key), one)
    bench.metrics["predicted/inputs"] = float(len(asked))
    bench.metrics["predicted/features"] = float(table.where(mode=table.mode[0], edit=table.edit[0]).sum())
    bench.records["predicted_effects"] = {"table": table, "agreements": found, "asked": asked}


def questions(bench: Bench) -> Iterator[Asked]:
    """Unseen inputs that the model answers rightly: each picture of the circuit's concepts under each of its questions,
    against the other concept's word; or the originals of pairs, against the counterfactual's word.

    Raises:
        UserError: the experiment has neither.
    """
    count = bench.cfg.single_edits.inputs
    wanted: list[tuple[str, ModelInputs, str, str]] = []
    if bench.cfg.circuit is not None:
        concepts = bench.cfg.circuit.concepts
        for concept, other in (concepts, concepts[::-1]):
            images = bench.concept_pictures(concept, "test", count, bench.cfg.single_edits.seed)
            for name, question in bench.cfg.circuit.questions.items():
                words = question.answers[concept], question.answers[other]
                for i, inputs in enumerate(bench.inputs(images, question.prompt)):
                    wanted.append((f"{concept} {i}, {name}", inputs, *words))
    elif bench.cfg.pairs is not None:
        for name, pairs in pairs_of(bench, "test").items():
            for pair in [p for p in pairs if p.moves][:count]:
                inputs = bench.vlm.prepare(pair.original.prompt, list(pair.original.images))
                wanted.append((f"{pair.id}, {name}", inputs, pair.original.answer, pair.counterfactual.answer))
    else:
        raise UserError("predicted_effects needs inputs: choose a circuit or pairs, such as circuit=mars_earth")
    adapter = bench.vlm.adapter
    for name, inputs, right, other in wanted:
        tokens = bench.token(right), bench.token(other)
        if tokens[0] == tokens[1]:
            continue  # both answers are the same word: nothing to tell apart
        with torch.no_grad():
            said = int(adapter.next_logits(inputs.tensors)[0].argmax())
        if said == tokens[0]:
            yield Asked(name, inputs, tokens)


def measure(bench: Bench, one: Asked) -> Iterator[dict[str, np.ndarray]]:
    """Trace one input, draw features, predict and measure every edit in every mode: columns of equal length."""
    scope, config = bench.scope, bench.cfg.attribution
    replacement = build_replacement(scope, one.inputs, DTYPES[config.dtype])
    target = difference_target(replacement, *one.tokens, label=one.name)
    graph = attribute(replacement, config, bench.vlm.tokenizer, bench.vlm.name, target)
    total = total_effects(Adjoint(replacement), target)[0].double().cpu().numpy()
    sampled = draw(bench, graph, replacement, total, one.name)
    batch = scope.batch([one.inputs])
    base = base_run(scope, batch, bench.intervention.modes)
    n = len(sampled.layer)
    for name, scale, value, share in edits_of(bench, sampled):
        edits = SingleEdits(sampled.layer, sampled.position, sampled.index, scale, value)
        for mode in bench.intervention.modes:
            yield {
                "input": np.repeat(one.name, n),
                "edit": np.repeat(name, n),
                "mode": np.repeat(mode, n),
                "layer": sampled.layer,
                "position": sampled.position,
                "index": sampled.index,
                "activation": sampled.activation,
                "band": sampled.band,
                "measured": single_effects(scope, batch, base, edits, mode, one.tokens),
                **{predictor: share * effect for predictor, effect in sampled.effects.items()},
            }


def edits_of(bench: Bench, sampled: Sampled) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Each kind of edit: its name, `scale` and `value` [n], and the change of activation as a share of it [n]."""
    n = len(sampled.layer)
    for factor in bench.cfg.single_edits.factors:
        name = "ablate" if factor == 0 else f"times_{factor:g}"
        yield name, np.full(n, float(factor)), np.zeros(n), np.full(n, factor - 1.0)
    if bench.cfg.single_edits.add:
        yield "add_mean", np.ones(n), sampled.mean, sampled.mean / sampled.activation


def draw(bench: Bench, graph: AttributionGraph, replacement: ReplacementModel, total: np.ndarray, name: str) -> Sampled:
    """Features of a graph, equally many from each band of influence on what the graph explains."""
    settings = bench.cfg.single_edits
    nodes, pruned = graph.nodes, prune(graph)
    features = nodes.of(NodeKind.FEATURE)
    rng = generator(settings.seed, "single edits", name)
    chosen, bands, below = [], [], 0.0
    for band, share in enumerate(settings.shares):
        inside = features[(pruned.cumulative[features] > below) & (pruned.cumulative[features] <= share)]
        inside = inside[pruned.influence[inside] > 0]
        some = np.sort(rng.choice(inside, min(settings.features, len(inside)), replace=False))
        chosen.append(some)
        bands.append(np.full(len(some), band))
        below = share
    at = np.concatenate(chosen).astype(np.int64)
    table = replacement.feature_activations
    rows = np.array([table.row(*k) for k in zip(nodes.layer[at], nodes.position[at], nodes.index[at], strict=True)])
    edges = np.zeros(graph.n_nodes)
    sources, weights = graph.incoming(int(nodes.ends()[0]))
    edges[sources] = weights
    counts = np.array([len(layer) for layer in replacement.features])
    means = np.bincount(table.layer, table.activation, len(counts)) / np.maximum(counts, 1)
    columns = Adjoint(replacement).columns.all_features()
    return Sampled(
        table.layer[rows],
        table.position[rows],
        table.index[rows],
        table.activation[rows].astype(np.float64),
        np.concatenate(bands),
        {"edge": edges[at], "total": total[columns[rows]]},
        means[table.layer[rows]],
    )


def agreements(bench: Bench, table: Measured) -> dict[tuple[str, ...], Agreement]:
    """(mode, edit, predictor) -> agreement over features; for ablation also (mode, edit, predictor, band_<i>).

    In direct mode nothing responds, so that only edges are predictions of it.
    """
    found: dict[tuple[str, ...], Agreement] = {}
    seed = bench.cfg.single_edits.seed
    for mode in dict.fromkeys(table.mode.tolist()):
        for edit in dict.fromkeys(table.edit.tolist()):
            rows = table.where(mode=mode, edit=edit)
            for predictor in ("edge",) if mode == "direct" else PREDICTORS:
                x, y = table.predicted[predictor], table.measured
                found[mode, edit, predictor] = agreement(x[rows], y[rows], table.input[rows], seed)
            if edit != "ablate":
                continue
            for band in range(len(bench.cfg.single_edits.shares)):
                some = rows & (table.band == band)
                if some.sum() >= 10 and len(np.unique(table.input[some])) > 1:
                    x = table.predicted[NAMES[mode]]
                    found[mode, edit, NAMES[mode], f"band_{band}"] = agreement(
                        x[some], table.measured[some], table.input[some], seed
                    )
    return found


def agreement_metrics(key: str, found: Agreement) -> dict[str, float]:
    """`predicted/free/ablate/total/pearson` and so on, with intervals; `_control` is the shuffled one."""
    metrics: dict[str, float] = {}
    for name in ("pearson", "spearman", "slope", "same_sign", "error"):
        metrics |= rate_metrics(f"{key}/{name}", getattr(found, name))
    return metrics
