"""Shape and colour of objects: does each fact's features move its own answer alone, and do they fire on the objects?

On pairs that differ in both facts each set of features can pull either answer; on pairs that differ in one, that the
other answer stays is the test. A map of a layer gives each soft token what features write there: the sum of a times the
norm of a decoder row, or of |a' - a| within a pair. Painted pixels say which soft tokens lie on an object.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.circuits.cases import pair_cases, pairs_by_question, subject_of_pairs
from vlmscope.circuits.config import TrialConfig
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.operations import Carry, all_features
from vlmscope.core.errors import UserError
from vlmscope.core.maps import PictureMap, TileMap
from vlmscope.core.records import PatchBox, control_draws
from vlmscope.core.results import Curve
from vlmscope.data.orrery.dataset import COVERED, painted_mask
from vlmscope.interventions.edits import AnyPlan, LayerEdit, donor_activations, matched_features
from vlmscope.interventions.trials import Cases, Features, Setting, Trial
from vlmscope.metrics.prediction import pointing_hit
from vlmscope.metrics.rates import bootstrap_mean
from vlmscope.report.figures import dose_response
from vlmscope.report.pictures import map_rows

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench
    from vlmscope.scope import Scope

NEEDS = "dissociation needs pairs that differ in two facts, such as pairs=object, and pairs.train > 0"
SHOWN = 4  # pictures drawn with their maps


@dataclass(frozen=True)
class CarryAt:
    """Carry every feature at chosen soft tokens [B, S] bool alone; the others stay live."""

    chosen: np.ndarray
    rereads: ClassVar[bool] = True

    def plan(self, scope: Scope, cases: Cases, strength: float, features: Features | None = None) -> AnyPlan:
        """As `Operation.plan`."""
        plan = Carry(all_features(scope.transcoders)).plan(scope, cases, strength, features)
        mask = torch.zeros(cases.batch.size, cases.batch.length, 1, dtype=torch.bool)
        mask[:, np.flatnonzero(cases.batch.is_image)] = torch.from_numpy(self.chosen).unsqueeze(-1)
        mask = mask.to(scope.adapter.device)
        edits = {layer: edit for layer, edit in plan.items() if isinstance(edit, LayerEdit)}
        return {n: replace(edit, value=mask * edit.value, scale=(~mask).to(edit.value)) for n, edit in edits.items()}


def check(cfg: Any) -> None:
    """Refuse the user's pairs if they do not ask different questions about the same scenes."""
    if cfg.pairs is None or cfg.pairs.path is None:
        return
    scenes = {q: {pair.id for pair in pairs if pair.moves} for q, pairs in pairs_by_question(cfg.pairs, "test").items()}
    scenes = {question: ids for question, ids in scenes.items() if ids}
    if len(scenes) < 2:
        raise UserError(f"{cfg.pairs.path}: {NEEDS}")
    if not set.intersection(*scenes.values()):
        raise UserError(
            f"{cfg.pairs.path}: no test pair of {', '.join(scenes)} has an id in common, and dissociation compares "
            'them on the same scenes; give lines about one scene the same "id"'
        )


def trials(bench: Bench, declared: Declared) -> Iterator[Trial]:
    """Each set on pairs that differ in one fact alone; and all features at the objects, the ground, or both."""
    config, pairs, draws = bench.cfg.interchange, bench.cfg.pairs, bench.cfg.settings["cross"].matched
    assert pairs is not None and callable(declared.means), "cases come from pairs"
    if len(declared.sets) < 2:
        raise UserError(NEEDS)
    bench.records["declared"] = declared
    for change in declared.sets if pairs.change is not None else ():  # the user's own pairs are of one kind
        alone = replace(pairs, change=change, original=None, counterfactual=None)
        for question, members in pairs_by_question(alone, "test").items():
            subject = subject_of_pairs(bench.scope, question, members, config.least, config.answerable)
            cases = pair_cases(bench.scope, subject, members, change)
            for fact in declared.sets:
                carry = TrialConfig("carry", features=fact)
                setting, means = Setting(f"alone_{change}", matched=draws), declared.means(carry, cases)
                yield Trial(f"each/{fact}", declared.operation(carry, cases, None), [cases], [setting], means)
    for cases in declared.cases["test"]:
        rows, on, _ = places = covers(bench, cases)
        if len(rows) < config.least:
            raise UserError(f"{len(rows)} pictures have both an object and a ground; give more pairs")
        bench.records[cases.question] = places
        for name, chosen in {"objects": on, "ground": ~on, "whole_picture": np.ones_like(on)}.items():
            yield Trial(
                "carry", CarryAt(chosen), [cases.select(rows.tolist())], [Setting(name, positions="image", matched=0)]
            )


def share_in_boxes(mask: np.ndarray, boxes: Sequence[PatchBox]) -> np.ndarray:
    """`[n]`, the share of each box's pixels that `mask [H, W]` covers."""
    corners = [box.pixels(mask.shape[1], mask.shape[0]) for box in boxes]
    return np.array([float(mask[top:bottom, left:right].mean()) for left, top, right, bottom in corners])


def covers(bench: Bench, cases: Cases) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """Rows [n] of pictures with an object and a ground, which soft tokens [n, S] lie on an object in either side of the
    pair, and the pictures of all rows with the boxes of soft tokens.
    """
    assert bench.cfg.pairs is not None, "cases come from pairs"
    known = {pair.id: pair for pair in pairs_by_question(bench.cfg.pairs, "test")[cases.question]}
    pictures = [[np.asarray(s.images[0]) for s in (known[i].original, known[i].counterfactual)] for i in cases.ids]
    boxes = tuple(box for box in cases.inputs[0].patch_boxes if box is not None)
    on = np.array([share_in_boxes(painted_mask(a) | painted_mask(b), boxes) for a, b in pictures]) >= COVERED
    rows = np.flatnonzero(on.any(1) & ~on.all(1))
    return rows, on[rows], [(sides[0], boxes) for sides in pictures]


def analyse(bench: Bench) -> dict[str, float]:
    """dissociation/<fact>/own_minus_other and active_under, places/ metrics, places.parquet, figures of the maps."""
    declared: Declared = bench.records["declared"]
    assert callable(declared.means), "cases come from pairs"
    table: Any = pd.read_parquet(bench.run_dir / "trials.parquet")
    table = table.query("setting == 'cross' and control == '' and baseline == ''")
    metrics: dict[str, float] = {}
    parts: list[pd.DataFrame] = []
    drawn: dict[str, Any] = {}
    key: Any
    cases = {each.question: each for name in ("test", "stays") for each in declared.cases[name]}
    for fact in declared.sets:
        less = contrast(table[table.operation == f"each/{fact}"], fact)
        if not len(less):
            raise UserError(f"dissociation: no pair is answered rightly under all of {', '.join(declared.sets)}")
        metrics |= bootstrap_mean(less).metrics(f"dissociation/{fact}/own_minus_other")
        carry = TrialConfig("carry", features=fact)
        operation: Any = declared.operation(carry, cases[fact], None)
        features = operation.features
        moved = {question: changed(bench, each, features) for question, each in cases.items()}
        whole = max(moved[fact], 1e-12)
        metrics |= {f"dissociation/{fact}/active_under/{question}": size / whole for question, size in moved.items()}
        control = matched(features, declared.means(carry, cases[fact]), bench.cfg.seed)
        rows, on, pictures = bench.records[fact]
        for label, chosen in (("own", features), ("matched", control)):
            for what, maps in maps_of(bench, cases[fact], chosen).items():
                layers = {layer: values[rows] for layer, values in maps.items()}
                # Layer -1 stands for the sum over all layers.
                layers[-1] = np.sum(list(maps.values()), axis=0)[rows]
                for layer, values in layers.items():
                    total, hit = values.sum(1), (values * on).sum(1)
                    share = np.divide(hit, total, out=np.full(len(total), np.nan, total.dtype), where=total > 0)
                    peak = [pointing_hit(*both) for both in zip(values, on, strict=True)]
                    columns = {"fact": fact, "features": label, "map": what, "layer": layer, "share": share}
                    parts.append(pd.DataFrame(columns | {"chance": on.mean(1), "peak": peak}))
                for row, values in zip(rows[:SHOWN], layers[-1], strict=False) if label == "own" else ():
                    shown = drawn.setdefault(cases[fact].ids[row], (*pictures[row], {}))
                    shown[2][f"{fact}, {what}"] = values
    places = pd.concat(parts, ignore_index=True)
    bench.write_table("places", places)
    sums = places[(places.layer < 0) & (places.features == "own")]
    for key, part in sums.groupby(["fact", "map"], sort=False):
        fact, what = key
        active = part.dropna()
        for name, rows, values in (("on_object", active, active.share), ("pointing", part, part.peak)):
            rate = bootstrap_mean(values.to_numpy(), control=float(rows.chance.mean()))
            metrics |= rate.metrics(f"places/{fact}/{what}/{name}")
    for what, table in places[places.layer >= 0].dropna().groupby("map", sort=False):
        lines = []
        for key, part in table.groupby(["fact", "features"], sort=False):
            rates = {layer: bootstrap_mean(rows.share.to_numpy()) for layer, rows in part.groupby("layer")}
            lines.append(Curve.of(", ".join(key), map(float, list[Any](rates)), list(rates.values())))
        path = bench.run_dir / "figures" / f"places_{what}.png"
        dose_response(lines, path, "layer", "share on the objects' soft tokens (%)")
    figure = []
    for shown, boxes, by_name in drawn.values():
        if len(by_name) == 2 * len(declared.sets):  # pictures that every fact has maps of
            maps = {key: PictureMap(key, 0, [TileMap(list(boxes), cells)], 0.0, {}) for key, cells in by_name.items()}
            figure.append(("picture", shown, maps))
    map_rows(figure, bench.run_dir / "figures" / "object_maps.png", "blue: more, relative to the map's range")
    return metrics


def contrast(table: pd.DataFrame, fact: str) -> np.ndarray:
    """Recovered share of the fact's own answer minus that of the other facts', pair by pair of those that all have."""
    pulled = table.pivot(index="case", columns="question", values="recovered").reindex(table.case.unique()).dropna()
    return (pulled[fact] - pulled.drop(columns=fact).mean(axis=1)).to_numpy()


def both_sides(bench: Bench, cases: Cases, features: Features) -> list[Any]:
    """Activations of features in the originals and in the counterfactuals."""
    assert cases.donors is not None, "cases come from pairs"
    return [donor_activations(bench.scope, side, features) for side in (cases.batch, cases.donors)]


def changed(bench: Bench, cases: Cases, features: Features) -> float:
    """Mean over pairs of what features write differently within a pair, summed over features and positions."""
    before, after = both_sides(bench, cases, features)
    total = 0.0
    for layer, (indices, values) in before.items():
        norms = bench.transcoders[layer].write_norms()[indices]
        total += float(((after[layer][1] - values).abs() @ norms).sum()) / cases.batch.size
    return total


def maps_of(bench: Bench, cases: Cases, features: Features) -> dict[str, dict[int, np.ndarray]]:
    """ "fires" and "changes" -> layer -> [B, S]: what features write on each soft token of the originals, and how that
    changes within pairs.
    """
    soft = torch.from_numpy(cases.batch.is_image)
    before, after = both_sides(bench, cases, features)
    maps: dict[str, dict[int, np.ndarray]] = {"fires": {}, "changes": {}}
    for layer, (indices, values) in sorted(before.items()):
        norms, a, b = bench.transcoders[layer].write_norms()[indices], values[:, soft], after[layer][1][:, soft]
        maps["fires"][layer] = (a @ norms).float().numpy(force=True)
        maps["changes"][layer] = ((b - a).abs() @ norms).float().numpy(force=True)
    return maps


def matched(features: Features, means: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """As many other features, alike in layer and mean activation."""
    nothing, position = torch.zeros(1), torch.ones(1, dtype=torch.bool)
    plan = {layer: LayerEdit(indices, nothing, nothing, position) for layer, indices in features.items()}
    return {n: edit.features for n, edit in matched_features(plan, means, control_draws(seed, 1)[0]).items()}
