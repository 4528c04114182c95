"""Shape and colour of objects: does each fact's features move its own answer alone, and do they fire on the objects?

On pairs that differ in both facts each set of features can pull either answer; on pairs that differ in one, that the
other answer stays is the test. A map of a layer gives each soft token what features write there: the sum of a times the
norm of a decoder row, or of |a' - a| within a pair. Painted pixels say which soft tokens lie on an object.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from vlmscope.circuits.cases import pair_cases, pairs_by_question, subject_of_pairs
from vlmscope.circuits.config import TrialConfig
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.operations import Carry, all_features
from vlmscope.core.errors import UserError
from vlmscope.core.graph import PictureMap, TileMap
from vlmscope.core.records import control_draws
from vlmscope.data.orrery.dataset import covered, painted_mask
from vlmscope.interventions.controls import matched_plan, matched_pools
from vlmscope.interventions.edits import LayerEdit, donor_activations
from vlmscope.interventions.trials import Cases, Features, Operation, Setting, Trial
from vlmscope.metrics.prediction import pointing_hit, share_on
from vlmscope.metrics.rates import bootstrap_mean
from vlmscope.report.pictures import map_rows

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

NEEDS = "dissociation needs pairs that differ in two facts, such as pairs=object, and pairs.train > 0"
SHOWN = 4  # pictures drawn with their maps
WHATS = ("fires", "changes")


def check(cfg: Any) -> None:
    """Refuse the user's pairs if they do not ask different questions about the same scenes."""
    if cfg.pairs is None or cfg.pairs.path is None:
        return
    scenes = {q: {pair.id for pair in pairs if pair.moves} for q, pairs in pairs_by_question(cfg.pairs, "test").items()}
    scenes = {question: ids for question, ids in scenes.items() if ids}
    if len(scenes) < 2:
        raise UserError(f"{cfg.pairs.path}: {NEEDS}")
    if not set.intersection(*scenes.values()):
        same = 'dissociation compares them on the same scenes; give lines about one scene the same "id"'
        raise UserError(f"{cfg.pairs.path}: no test pair of {', '.join(scenes)} has an id in common, and {same}")


def trials(bench: Bench, declared: Declared) -> Iterator[Trial]:
    """Each set on pairs that differ in one fact alone; and all features at the objects, the ground, or both."""
    config, pairs, cross = bench.cfg.interchange, bench.cfg.pairs, bench.cfg.settings["cross"]
    assert pairs is not None, "cases come from pairs"
    if len(declared.sets) < 2:
        raise UserError(NEEDS)
    bench.records["declared"] = declared
    for change in declared.sets if pairs.change is not None else ():  # the user's own pairs are of one kind
        alone = replace(pairs, change=change, original=None, counterfactual=None)
        for question, members in bench.pairs("test", alone).items():
            subject = subject_of_pairs(bench.scope, question, members, config.least, config.answerable)
            cases = pair_cases(bench.scope, subject, members, change)
            for fact in declared.sets:
                carry = TrialConfig("carry", features=fact)
                setting = Setting(f"alone_{change}", matched=cross.matched, draws_on=cross.draws_on)
                yield Trial(f"each/{fact}", declared.operation(carry, cases, None), [cases], [setting])
    for cases in declared.cases["test"]:
        known = {pair.id: pair for pair in pairs_by_question(pairs, "test")[cases.question]}
        sides = [[np.asarray(s.images[0]) for s in (known[i].original, known[i].counterfactual)] for i in cases.ids]
        boxes = [box for box in cases.inputs[0].patch_boxes if box is not None]
        on = np.array([covered(painted_mask(a) | painted_mask(b), boxes) for a, b in sides])  # [B, S], in either side
        rows = np.flatnonzero(on.any(1) & ~on.all(1))  # with both an object and a ground
        if len(rows) < config.least:
            raise UserError(f"{len(rows)} pictures have both an object and a ground; give more pairs")
        bench.records[cases.question] = rows, on[rows], [sides[row][0] for row in rows], boxes
        for name, chosen in {"objects": on[rows], "ground": ~on[rows], "whole_picture": np.ones_like(on[rows])}.items():
            at = torch.zeros(len(rows), cases.batch.length, dtype=torch.bool)
            at[:, cases.batch.is_image] = torch.from_numpy(chosen)
            settings = [Setting(name, positions="image", matched=0)]
            carry_all = Carry(all_features(bench.transcoders), at=at)
            yield Trial("carry", carry_all, [cases.select(rows.tolist())], settings)


def analyse(bench: Bench) -> dict[str, float]:
    """dissociation/<fact>/own_minus_other and active_under, places/ metrics; places.parquet and object_maps.png."""
    declared: Declared = bench.records["declared"]
    table = bench.rows("cross")
    metrics: dict[str, float] = {}
    places: list[pd.DataFrame] = []
    drawn: dict[str, tuple[str, np.ndarray, dict[str, PictureMap]]] = {}
    cases = {each.question: each for name in ("test", "stays") for each in declared.cases[name]}
    for fact in declared.sets:
        less = contrast(table[table.operation == f"each/{fact}"], fact)
        if not len(less):
            raise UserError(f"dissociation: no pair is answered rightly under all of {', '.join(declared.sets)}")
        metrics |= bootstrap_mean(less).metrics(f"dissociation/{fact}/own_minus_other")
        carry = TrialConfig("carry", features=fact)
        operation: Any = declared.operation(carry, cases[fact], None)
        writes = {question: written(bench, each, operation.features) for question, each in cases.items()}
        moved = {q: sum(float(sides[1].sum()) / cases[q].batch.size for sides in w.values()) for q, w in writes.items()}
        whole = max(moved[fact], 1e-12)
        metrics |= {f"dissociation/{fact}/active_under/{question}": size / whole for question, size in moved.items()}
        control = matched(bench, operation, cases[fact])
        rows, on, pictures, boxes = bench.records[fact]
        soft, summed = torch.from_numpy(cases[fact].batch.is_image), np.empty(0)
        for label, layers in (("matched", written(bench, cases[fact], control)), ("own", writes[fact])):
            maps = {n: sides[:, rows][..., soft].float().numpy(force=True) for n, sides in layers.items()}
            for n, sides in maps.items():
                shares = {what: share_on(values, on) for what, values in zip(WHATS, sides, strict=True)}
                places.append(pd.DataFrame({"features": f"{fact}, {label}", "layer": n, **shares}))
            summed = np.sum([*maps.values()], axis=0)
        for what, values in zip(WHATS, summed, strict=True):  # the fact's own features, all layers
            share, peak = share_on(values, on), [pointing_hit(*both) for both in zip(values, on, strict=True)]
            there = ~np.isnan(share)
            rate = bootstrap_mean(share[there], control=float(on[there].mean(1).mean()))
            metrics |= rate.metrics(f"places/{fact}/{what}/on_object")
            metrics |= bootstrap_mean(peak, control=float(on.mean(1).mean())).metrics(f"places/{fact}/{what}/pointing")
            for row, picture, cells in zip(rows[:SHOWN], pictures, values, strict=False):
                own = PictureMap(f"{fact}, {what}", 0, [TileMap(boxes, cells)], 0.0, {})
                drawn.setdefault(cases[fact].ids[row], ("picture", picture, {}))[2][own.target] = own
    bench.write_table("places", pd.concat(places, ignore_index=True))
    figure = [shown for shown in drawn.values() if len(shown[2]) == len(WHATS) * len(declared.sets)]  # in maps of all
    map_rows(figure, bench.run_dir / "figures" / "object_maps.png", "blue: more, relative to the map's range")
    return metrics


def contrast(table: pd.DataFrame, fact: str) -> np.ndarray:
    """Recovered share of the fact's own answer minus that of the other facts', pair by pair of those that all have."""
    pulled = table.pivot(index="case", columns="question", values="recovered").reindex(table.case.unique()).dropna()
    return (pulled[fact] - pulled.drop(columns=fact).mean(axis=1)).to_numpy()


def written(bench: Bench, cases: Cases, features: Features) -> dict[int, Tensor]:
    """Layer -> [2, B, T]: what features write at each position of the originals, and how that changes within pairs."""
    assert cases.donors is not None, "cases come from pairs"
    before, after = (donor_activations(bench.scope, side, features) for side in (cases.batch, cases.donors))
    norms = {layer: bench.transcoders[layer].write_norms()[indices] for layer, (indices, _) in before.items()}
    return {n: torch.stack([a @ norms[n], (after[n][1] - a).abs() @ norms[n]]) for n, (_, a) in before.items()}


def matched(bench: Bench, operation: Operation, cases: Cases) -> dict[int, Tensor]:
    """As many other features that change as much: the first control draw of an operation on the cases."""
    plan = {n: edit for n, edit in operation.plan(bench.scope, cases, 1.0).items() if isinstance(edit, LayerEdit)}
    subject = bench.scope, operation, cases, 1.0, plan
    drawn = matched_plan(*subject, matched_pools(*subject), control_draws(bench.cfg.seed, 1)[0])
    return {layer: edit.features for layer, edit in drawn.items()}
