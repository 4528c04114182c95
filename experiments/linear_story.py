"""Features of graphs edited one at a time: how far does the graph predict what the edit does to the answer?

A graph explains the logit of an answer minus that of another. Multiplying a feature's activation by s should move this
difference by (s - 1) times the feature's edge (direct effect), or by (s - 1) times its total effect where other active
features respond linearly; adding c to an activation a, by c / a times it. Whether it does is measured in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from vlmscope.attribution.adjoint import Adjoint, total_effects
from vlmscope.attribution.influence import prune
from vlmscope.attribution.targets import difference_target
from vlmscope.attribution.trace import attribute
from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.intervention import MODES, Curve
from vlmscope.core.records import generator
from vlmscope.interventions.effects import SingleEdits, single_effects
from vlmscope.interventions.run import base_run
from vlmscope.metrics.prediction import Agreement, agreement
from vlmscope.replacement.model import build_replacement
from vlmscope.report.figures import dose_response
from vlmscope.report.marks import write_rows
from vlmscope.report.style import COLOURS, INK, MARKERS, drawing, label, pick, tidy

if TYPE_CHECKING:
    from vlmscope.models.base import ModelInputs
    from vlmscope.tasks.bench import Bench

DTYPES = {"float32": torch.float32, "float64": torch.float64, "model": None}
PREDICTED_BY = {"direct": "edge", "frozen_attention": "total", "free": "total"}  # headline of a mode
MEASURES = ("pearson", "spearman", "slope", "same_sign", "error")
LINEAR = 0.01  # logits: effects below are drawn on a linear scale


@dataclass
class Settings:
    """Modes are those of `intervention`.

    Attributes:
        inputs: pictures a concept and question of `circuit`, or pairs a question of `pairs`.
        shares: features are drawn alike from those that together hold so much of the influence on the answer, and
            from each band between two shares; ascending.
        features: drawn from each band, at most.
        factors: what a feature's activation is multiplied by; 0 ablates.
        add: also add the mean activation of the layer's active features.
        least: fewer inputs than this give no interval, and an error.
    """

    inputs: int
    shares: list[float]
    features: int
    factors: list[float]
    add: bool
    least: int

    def __post_init__(self) -> None:
        for key, smallest in (("inputs", 1), ("features", 1), ("least", 2)):
            if getattr(self, key) < smallest:
                raise UserError(f"analysis.{key}={getattr(self, key)}: it must be at least {smallest}")
        shares = list(self.shares)
        if not shares or shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] > 1:
            raise UserError(f"analysis.shares={shares}: give ascending shares of influence above 0, at most 1")
        if not self.factors and not self.add:
            raise UserError("analysis.factors=[] and analysis.add=false leave nothing to do; choose a factor")
        if 1.0 in self.factors:
            raise UserError("analysis.factors has 1, which changes nothing; leave it out")


@dataclass(frozen=True)
class Asked:
    """One input: its name, the prompt, and the two tokens whose logits are compared."""

    name: str
    inputs: ModelInputs
    tokens: tuple[int, int]


def analyse(bench: Bench) -> dict[str, float]:
    """Write predicted_effects.parquet (a row an edit), agreements.parquet and figures; metrics `predicted/...`."""
    asked, least = list(questions(bench)), bench.analysis.least
    if len(asked) < least:
        raise UserError(
            f"{len(asked)} inputs are answered as they should be, and an interval needs analysis.least={least}: raise "
            "analysis.inputs"
        )
    table = pd.concat([part for one in asked for part in measure(bench, one)], ignore_index=True)
    with atomic_path(bench.run_dir / "predicted_effects.parquet") as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")
    found = agreements(bench, table)
    metrics: dict[str, float] = {}
    rows = []
    for key, one in found.items():
        row: dict[str, Any] = dict(zip(("mode", "edit", "predicted by", "influence"), (*key, "all")[:4], strict=True))
        for name in MEASURES:
            rate = getattr(one, name)
            metrics |= rate.metrics(f"predicted/{'/'.join(key)}/{name}")
            row[name] = f"{rate.value:.2f} ({rate.ci_low:.2f} to {rate.ci_high:.2f})"  # correlations are no shares
        rows.append({**row, "spearman shuffled": one.spearman.control, "features": one.pearson.cases})
    write_rows(bench.run_dir / "agreements.parquet", rows)
    scatter(bench, table)
    for name in ("spearman", "slope") if bench.analysis.factors else ():
        by_factor(bench, found, name)
    first = (table["mode"] == table["mode"][0]) & (table.edit == table.edit[0])
    return metrics | {"predicted/inputs": float(len(asked)), "predicted/features": float(first.sum())}


def questions(bench: Bench) -> Iterator[Asked]:
    """Unseen inputs that the model answers rightly: each picture of the circuit's concepts under each of its questions,
    against the other concept's word; or the originals of pairs, against the counterfactual's word.
    """
    count, circuit = bench.analysis.inputs, bench.cfg.circuit
    wanted: list[tuple[str, ModelInputs, str, str]] = []
    if circuit is None and bench.cfg.pairs is None:
        raise UserError("linear_story needs inputs: choose a circuit or pairs, such as circuit=mars_earth")
    asked = {} if circuit is None else circuit.questions
    for concept, other in () if circuit is None else (circuit.concepts, circuit.concepts[::-1]):
        images = bench.concept_pictures(concept, "test", count, bench.cfg.seed)
        for name, question in asked.items():
            words = question.answers[concept], question.answers[other]
            for i, inputs in enumerate(bench.inputs(images, question.prompt)):
                wanted.append((f"{concept} {i}, {name}", inputs, *words))
    for name, pairs in bench.pairs("test").items() if circuit is None else ():
        for pair in [p for p in pairs if p.moves][:count]:
            inputs = bench.vlm.prepare(pair.original.prompt, list(pair.original.images))
            wanted.append((f"{pair.id}, {name}", inputs, pair.original.answer, pair.counterfactual.answer))
    for name, inputs, right, other in wanted:
        tokens = bench.token(right), bench.token(other)
        if tokens[0] == tokens[1]:
            continue  # both answers are the same word: nothing to tell apart
        with torch.no_grad():
            answer = int(bench.vlm.adapter.next_logits(inputs.tensors)[0].argmax())
        if answer == tokens[0]:
            yield Asked(name, inputs, tokens)


def measure(bench: Bench, one: Asked) -> Iterator[pd.DataFrame]:
    """Trace one input, draw features, predict and measure every edit in every mode."""
    scope, config, settings = bench.scope, bench.cfg.attribution, bench.analysis
    replacement = build_replacement(scope, one.inputs, DTYPES[config.dtype])
    target = difference_target(replacement, *one.tokens, label=one.name)
    graph = attribute(replacement, config, bench.vlm.tokenizer, bench.vlm.name, target)
    total = total_effects(Adjoint(replacement), target)[0].double().cpu().numpy()
    nodes, pruned = graph.nodes, prune(graph)
    at, bands = drawn(settings, nodes.of(NodeKind.FEATURE), pruned, generator(bench.cfg.seed, "single edits", one.name))
    active = replacement.feature_activations
    rows = np.array([active.row(*k) for k in zip(nodes.layer[at], nodes.position[at], nodes.index[at], strict=True)])
    edges = np.zeros(graph.n_nodes)
    sources, weights = graph.incoming(int(nodes.ends()[0]))
    edges[sources] = weights
    effects = {"edge": edges[at], "total": total[Adjoint(replacement).columns.all_features()[rows]]}
    layer, position, index = active.layer[rows], active.position[rows], active.index[rows]
    activation = active.activation[rows].astype(np.float64)
    counts = np.array([len(of) for of in replacement.features])
    mean = (np.bincount(active.layer, active.activation, len(counts)) / np.maximum(counts, 1))[layer]
    # Name of the edit -> scale and added value [n], and the change of the activation as a share of it.
    edits = {"ablate" if s == 0 else f"times_{s:g}": (s, np.zeros(len(at)), s - 1.0) for s in settings.factors}
    if settings.add:
        edits["add_mean"] = (1.0, mean, mean / activation)
    batch = scope.batch([one.inputs])
    base = base_run(scope, batch, MODES)
    fixed = {"layer": layer, "position": position, "index": index, "activation": activation, "band": bands}
    for name, (scale, value, share) in edits.items():
        single = SingleEdits(layer, position, index, np.full(len(at), float(scale)), value)
        for mode in MODES:
            measured = single_effects(scope, batch, base, single, mode, one.tokens)
            predicted = {by: share * effect for by, effect in effects.items()}
            yield pd.DataFrame(
                {"input": one.name, "edit": name, "mode": mode, **fixed, "measured": measured, **predicted}
            )


def drawn(settings: Settings, features: np.ndarray, pruned: Any, rng: np.random.Generator) -> tuple:
    """Nodes [n], equally many from each band of influence on what the graph explains, and their bands [n]."""
    chosen, bands, below = [], [], 0.0
    for band, share in enumerate(settings.shares):
        inside = features[(pruned.cumulative[features] > below) & (pruned.cumulative[features] <= share)]
        inside = inside[pruned.influence[inside] > 0]
        chosen.append(np.sort(rng.choice(inside, min(settings.features, len(inside)), replace=False)))
        bands.append(np.full(len(chosen[-1]), band))
        below = share
    return np.concatenate(chosen).astype(np.int64), np.concatenate(bands)


def agreements(bench: Bench, table: pd.DataFrame) -> dict[tuple[str, ...], Agreement]:
    """(mode, edit, predictor) -> agreement over features; for ablation also (mode, edit, predictor, band_<i>).

    In direct mode nothing responds, so that only edges are predictions of it.
    """
    found: dict[tuple[str, ...], Agreement] = {}
    seed = bench.cfg.seed
    key: Any
    for key, rows in table.groupby(["mode", "edit"], sort=False):
        mode, edit = key
        for predictor in ("edge",) if mode == "direct" else ("edge", "total"):
            x, y = rows[predictor].to_numpy(), rows.measured.to_numpy()
            found[mode, edit, predictor] = agreement(x, y, rows.input.to_numpy(str), seed)
        for band, some in rows.groupby("band") if edit == "ablate" else ():
            if len(some) >= 10 and some.input.nunique() > 1:
                by = PREDICTED_BY[mode]
                x, y = some[by].to_numpy(), some.measured.to_numpy()
                found[mode, edit, by, f"band_{band}"] = agreement(x, y, some.input.to_numpy(str), seed)
    return found


def scatter(bench: Bench, table: pd.DataFrame) -> None:
    """figures/predicted.png: measured against predicted effects of the first edit, a panel a mode."""
    modes = MODES
    rows: Any = table[table.edit == table.edit[0]]
    band: Any
    most = 1.5 * float(np.abs(rows[["edge", "total", "measured"]].to_numpy()).max(initial=LINEAR))
    line = np.concatenate([-np.geomspace(most, LINEAR / 10, 60), np.geomspace(LINEAR / 10, most, 60)])
    lows = [0.0, *bench.analysis.shares]
    with drawing(bench.run_dir / "figures" / "predicted.png", 3.7 * len(modes), 4.3) as figure:
        grid = figure.subplots(1, len(modes), squeeze=False, sharex=True, sharey=True)[0]
        for axes, mode in zip(grid, modes, strict=True):
            by = PREDICTED_BY[mode]
            axes.plot(line, line, color=INK, lw=1, ls="--", zorder=1, label="as predicted")
            for band, of in rows[rows["mode"] == mode].groupby("band"):
                style = {"color": pick(COLOURS, band), "marker": pick(MARKERS, band), "s": 13, "alpha": 0.65}
                says = f"influence {100 * lows[band]:.0f} to {100 * lows[band + 1]:.0f} %"
                axes.scatter(of[by], of.measured, label=says, linewidths=0.4, edgecolors="white", **style)
            axes.set_xscale("symlog", linthresh=LINEAR)
            axes.set_yscale("symlog", linthresh=LINEAR)
            ticks = [tick for tick in (-10, -1, -0.1, 0, 0.1, 1, 10) if abs(tick) <= most]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(f"{label(mode)}, {by}", loc="left")
            axes.set_xlabel("predicted effect (logits)")
            tidy(axes, "both")
        grid[0].set_ylabel("measured effect (logits)")
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)


def by_factor(bench: Bench, found: dict[tuple[str, ...], Agreement], name: str) -> None:
    """figures/spearman.png or slope.png: agreement against what activations are multiplied by, a line a mode."""
    curves = []
    for mode in MODES:
        edits = {s: "ablate" if s == 0 else f"times_{s:g}" for s in sorted(bench.analysis.factors)}
        rates = [getattr(found[mode, edit, PREDICTED_BY[mode]], name) for edit in edits.values()]
        curves.append(Curve.of(f"{label(mode)}, {PREDICTED_BY[mode]}", list(edits), rates))
    path = bench.run_dir / "figures" / f"{name}.png"
    dose_response(curves, path, "activation multiplied by", name, percent=False)
