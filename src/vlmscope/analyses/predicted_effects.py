"""How well does an attribution graph predict what editing one of its features does to the answer?

A graph explains the logit of an answer minus that of another. Multiplying a feature's activation by s should move this
difference by (s - 1) times the feature's edge (direct effect), or by (s - 1) times its total effect where other active
features respond linearly; adding c to an activation a, by c / a times it. Whether it does is measured in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from vlmscope.attribution.adjoint import Adjoint, total_effects
from vlmscope.attribution.influence import prune
from vlmscope.attribution.targets import difference_target
from vlmscope.attribution.trace import attribute
from vlmscope.core.errors import UserError, check_least
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import generator
from vlmscope.core.results import MODES, Curve
from vlmscope.data.inputs import Side
from vlmscope.interventions.run import SingleEdits, base_run, single_effects
from vlmscope.metrics.prediction import Agreement, agreement
from vlmscope.models.checkpoint import DTYPES
from vlmscope.replacement import build_replacement
from vlmscope.report.figures import COLOURS, INK, MARKERS, dose_response, drawing, label, pick, tidy
from vlmscope.report.marks import write_rows

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench
    from vlmscope.models.base import ModelInputs

PREDICTED_BY = {"direct": "edge", "frozen_attention": "total", "free": "total"}  # headline of a mode
MEASURES = ("pearson", "spearman", "slope", "same_sign", "error")
LINEAR = 0.01  # logits: effects below are drawn on a linear scale


class Asked(NamedTuple):
    """One input: its name, the prompt, and the two tokens whose logits are compared."""

    name: str
    inputs: ModelInputs
    tokens: tuple[int, int]


@dataclass
class PredictedEffects:
    """Predicted against measured effects of single edits, on pictures of `circuit` or on `pairs`, in every mode.

    Writes predicted_effects.parquet (a row per edit), agreements.parquet and figures predicted, spearman and slope;
    metrics `predicted/<mode>/<edit>/<edge or total>/<measure>`.
    """

    inputs: int  # pictures per concept and question of `circuit`, or pairs per question of `pairs`
    shares: list[float]  # ascending; features are drawn alike from each band of influence on the answer
    features: int  # drawn from each band, at most
    factors: list[float]  # what a feature's activation is multiplied by; 0 ablates
    add: bool  # also add the mean activation of the layer's active features
    least: int  # fewer inputs than this give no interval, and an error

    def __post_init__(self) -> None:
        check_least("analyses.predicted_effects", self, inputs=1, features=1, least=2)
        shares = list(self.shares)
        if not shares or shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] > 1:
            raise UserError(f"shares={shares}: give ascending shares of influence above 0, at most 1")
        if not self.factors and not self.add:
            raise UserError("factors=[] and add=false leave nothing to do; choose a factor")
        if 1.0 in self.factors:
            raise UserError("factors has 1, which changes nothing; leave it out")

    def analyse(self, bench: Bench) -> dict[str, float]:
        """Measure, compare, draw."""
        inputs = list(questions(bench, self.inputs))
        if len(inputs) < self.least:
            raise UserError(
                f"{len(inputs)} inputs are answered as they should be, and an interval needs least={self.least}: raise "
                "analyses.predicted_effects.inputs"
            )
        table = pd.concat([part for prompt in inputs for part in self.measure(bench, prompt)], ignore_index=True)
        bench.write_table("predicted_effects", table, "zstd")
        results = agreements(table, bench.cfg.seed)
        metrics: dict[str, float] = {}
        rows = []
        for key, result in results.items():
            row: dict[str, Any] = dict(zip(("mode", "edit", "predicted by", "influence"), (*key, "all"), strict=False))
            for name in MEASURES:
                rate = getattr(result, name)
                metrics |= rate.metrics(f"predicted/{'/'.join(key)}/{name}")
                row[name] = f"{rate.value:.2f} ({rate.ci_low:.2f} to {rate.ci_high:.2f})"  # correlations are no shares
            rows.append({**row, "spearman shuffled": result.spearman.control, "features": result.pearson.cases})
        write_rows(bench.run_dir / "agreements.parquet", rows)
        self.draw(bench, table, results)
        first = (table["mode"] == table["mode"][0]) & (table.edit == table.edit[0])
        return metrics | {"predicted/inputs": float(len(inputs)), "predicted/features": float(first.sum())}

    def measure(self, bench: Bench, prompt: Asked) -> Iterator[pd.DataFrame]:
        """Trace one input, draw features, predict and measure every edit in every mode."""
        scope, config = bench.scope, bench.cfg.attribution
        replacement = build_replacement(scope, prompt.inputs, DTYPES.get(config.dtype))
        target = difference_target(replacement, *prompt.tokens, label=prompt.name)
        graph = attribute(replacement, config, bench.vlm.tokenizer, bench.vlm.name, target)
        adjoint, nodes = Adjoint(replacement), graph.nodes
        total = total_effects(adjoint, target)[0].double().cpu().numpy()
        rng = generator(bench.cfg.seed, "single edits", prompt.name)
        chosen, bands = self.drawn(nodes.of(NodeKind.FEATURE), prune(graph), rng)
        active = replacement.feature_activations
        places = zip(nodes.layer[chosen], nodes.position[chosen], nodes.index[chosen], strict=True)
        rows = np.array([active.row(*place) for place in places])
        edges = np.zeros(graph.n_nodes)
        sources, weights = graph.incoming(int(nodes.ends()[0]))
        edges[sources] = weights
        effects = {"edge": edges[chosen], "total": total[adjoint.columns.all_features()[rows]]}
        layer, position, index = active.layer[rows], active.position[rows], active.index[rows]
        activation = active.activation[rows].astype(np.float64)
        counts = np.array([len(features) for features in replacement.features])
        mean = (np.bincount(active.layer, active.activation, len(counts)) / np.maximum(counts, 1))[layer]
        # Name of the edit -> scale and added value [n], and the change of the activation as a share of it.
        edits: dict[str, tuple[float, Any, Any]] = {
            edit_name(s): (s, np.zeros(len(chosen)), s - 1.0) for s in self.factors
        }
        if self.add:
            edits["add_mean"] = (1.0, mean, mean / activation)
        batch = scope.batch([prompt.inputs])
        base = base_run(scope, batch, MODES)
        fixed = {"layer": layer, "position": position, "index": index, "activation": activation, "band": bands}
        for name, (scale, value, share) in edits.items():
            single = SingleEdits(layer, position, index, np.full(len(chosen), float(scale)), value)
            predicted = {by: share * effect for by, effect in effects.items()}
            for mode in MODES:
                measured = single_effects(scope, batch, base, single, mode, prompt.tokens)
                row = {"input": prompt.name, "edit": name, "mode": mode, **fixed, "measured": measured, **predicted}
                yield pd.DataFrame(row)

    def drawn(self, features: np.ndarray, pruned: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Nodes [n], equally many from each band of influence on what the graph explains, and their bands [n]."""
        chosen, bands, below = [], [], 0.0
        for band, share in enumerate(self.shares):
            inside = features[(pruned.cumulative[features] > below) & (pruned.cumulative[features] <= share)]
            inside = inside[pruned.influence[inside] > 0]
            chosen.append(np.sort(rng.choice(inside, min(self.features, len(inside)), replace=False)))
            bands.append(np.full(len(chosen[-1]), band))
            below = share
        return np.concatenate(chosen).astype(np.int64), np.concatenate(bands)

    def draw(self, bench: Bench, table: pd.DataFrame, results: dict[tuple[str, ...], Agreement]) -> None:
        """figures/predicted.png, measured against predicted effects of the first edit, a panel per mode;
        spearman.png and slope.png, agreement against what activations are multiplied by, a line per mode.
        """
        folder = bench.run_dir / "figures"
        rows: Any = table[table.edit == table.edit[0]]
        scatter(rows, [0.0, *self.shares], folder / "predicted.png")
        for name in ("spearman", "slope") if self.factors else ():
            curves = []
            for mode, by in PREDICTED_BY.items():
                factors = sorted(self.factors)
                rates = [getattr(results[mode, edit_name(s), by], name) for s in factors]
                curves.append(Curve.of(f"{label(mode)}, {by}", factors, rates))
            dose_response(curves, folder / f"{name}.png", "activation multiplied by", name, percent=False)


def edit_name(factor: float) -> str:
    """What multiplying by a factor is called."""
    return "ablate" if factor == 0 else f"times_{factor:g}"


def questions(bench: Bench, count: int) -> Iterator[Asked]:
    """Test inputs that the model answers rightly: each picture of the circuit's concepts under each of its questions,
    against the other concept's word; or the originals of pairs, against the counterfactual's word.
    """
    circuit = bench.cfg.circuit
    candidates: list[tuple[str, Side, str]] = []  # the other answer last
    if circuit is None and bench.cfg.pairs is None:
        raise UserError("predicted_effects needs inputs: choose a circuit or pairs, such as circuit=mars_earth")
    for concept, other in () if circuit is None else (circuit.concepts, circuit.concepts[::-1]):
        images = bench.concept_pictures(concept, "test", count, bench.cfg.seed)
        for name, question in bench.circuit_config.questions.items():
            sides = [Side(question.prompt, (image,), question.answers[concept]) for image in images]
            candidates += [(f"{concept} {i}, {name}", side, question.answers[other]) for i, side in enumerate(sides)]
    for name, pairs in bench.pairs("test").items() if circuit is None else ():
        moving = [pair for pair in pairs if pair.moves][:count]
        candidates += [(f"{pair.id}, {name}", pair.original, pair.counterfactual.answer) for pair in moving]
    for name, side, other in candidates:
        inputs, tokens = bench.scope.inputs(side.prompt, side.images), (bench.token(side.answer), bench.token(other))
        with torch.no_grad():
            answer = int(bench.vlm.adapter.next_logits(inputs.tensors)[0].argmax())
        if answer == tokens[0] != tokens[1]:  # where both answers are the same word there is nothing to tell apart
            yield Asked(name, inputs, tokens)


def agreements(table: Any, seed: int) -> dict[tuple[str, ...], Agreement]:
    """(mode, edit, predictor) -> agreement over features; for ablation also (mode, edit, predictor, band_<i>).

    In direct mode nothing responds, so that only edges are predictions of it.
    """

    def compared(rows: pd.DataFrame, predictor: str) -> Agreement:
        return agreement(rows[predictor].to_numpy(), rows.measured.to_numpy(), rows.input.to_numpy(str), seed)

    results: dict[tuple[str, ...], Agreement] = {}
    for key, rows in table.groupby(["mode", "edit"], sort=False):
        mode, edit = key
        for predictor in ("edge",) if mode == "direct" else ("edge", "total"):
            results[mode, edit, predictor] = compared(rows, predictor)
        for band, part in rows.groupby("band") if edit == "ablate" else ():
            if len(part) >= 10 and part.input.nunique() > 1:
                results[mode, edit, PREDICTED_BY[mode], f"band_{band}"] = compared(part, PREDICTED_BY[mode])
    return results


def scatter(rows: Any, lows: list[float], path: Any) -> None:
    """Measured against predicted effects, a panel per mode, coloured by band of influence."""
    most = 1.5 * float(np.abs(rows[["edge", "total", "measured"]].to_numpy()).max(initial=LINEAR))
    line = np.concatenate([-np.geomspace(most, LINEAR / 10, 60), np.geomspace(LINEAR / 10, most, 60)])
    ticks = [tick for tick in (-10, -1, -0.1, 0, 0.1, 1, 10) if abs(tick) <= most]
    with drawing(path, 3.7 * len(PREDICTED_BY), 4.3) as figure:
        grid = figure.subplots(1, len(PREDICTED_BY), squeeze=False, sharex=True, sharey=True)[0]
        for axes, (mode, by) in zip(grid, PREDICTED_BY.items(), strict=True):
            axes.plot(line, line, color=INK, lw=1, ls="--", zorder=1, label="as predicted")
            for band, points in rows[rows["mode"] == mode].groupby("band"):
                style = {"color": pick(COLOURS, band), "marker": pick(MARKERS, band), "s": 13, "alpha": 0.65}
                says = f"influence {100 * lows[band]:.0f} to {100 * lows[band + 1]:.0f} %"
                axes.scatter(points[by], points.measured, label=says, linewidths=0.4, edgecolors="white", **style)
            axes.set_xscale("symlog", linthresh=LINEAR)
            axes.set_yscale("symlog", linthresh=LINEAR)
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.minorticks_off()
            axes.set_title(f"{label(mode)}, {by}", loc="left")
            axes.set_xlabel("predicted effect (logits)")
            tidy(axes, "both")
        grid[0].set_ylabel("measured effect (logits)")
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
