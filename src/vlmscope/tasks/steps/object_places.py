"""Where in the picture do a fact's features fire, and where do they change within pairs: on the objects?

A map of a layer gives each soft token what a set of features writes there: the sum of a times the norm of a feature's
decoder row, or of |a' - a| within a pair. Painted pixels say which soft tokens lie on an object. Pairs are test ones.
What is written on the objects and on the ground is also carried over by itself: which of both moves the answer?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.interchange import interchange_plan, recovered
from vlmscope.circuits.pair_subject import part_of
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve, Rate
from vlmscope.core.records import control_draws
from vlmscope.data.orrery.objects import COVERED, painted_mask, share_in_boxes
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.named import donor_activations, matched_features
from vlmscope.interventions.run import run_edited
from vlmscope.metrics.causal import bootstrap_mean
from vlmscope.metrics.prediction import pointing_hit
from vlmscope.tasks.steps.interchange import ALL, PairCase
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics

if TYPE_CHECKING:
    from vlmscope.core.records import PatchBox
    from vlmscope.tasks.steps.bench import Bench

WHATS = ("fires", "changes")
GROUNDS = ("objects", "ground", "whole picture")
SHOWN = 4  # pictures drawn with their maps


@dataclass(frozen=True)
class Drawn:
    """A picture [H, W, 3] with the boxes of its soft tokens and the maps [S] over them by name."""

    image: np.ndarray
    boxes: tuple[PatchBox, ...]
    maps: dict[str, np.ndarray]


def run(bench: Bench) -> None:
    """Leaves curves by layer and drawn maps in `bench.records`; metrics under places/."""
    record = bench.record("interchange")
    cases: dict[str, PairCase] = {n: c for n, c in record["cases"].items() if c.subject.moves and c.pairs}
    curves: dict[str, list[Curve]] = {what: [] for what in WHATS}
    drawn: list[Drawn] = []
    rates: dict[tuple[str, str, int], Rate] = {}
    hits: dict[tuple[str, str], Rate] = {}
    carried: dict[tuple[str, str], Rate] = {}
    for fact, case in cases.items():
        features = record["sets"].get(f"features of {fact}")
        if not features:
            continue
        cover, boxes = covers(bench, case)
        rows = np.flatnonzero((cover >= COVERED).any(1) & (cover < COVERED).any(1))
        if len(rows) < bench.cfg.interchange.least:
            raise UserError(f"object_places: {len(rows)} pictures have both an object and a ground; give more pairs")
        on = cover[rows] >= COVERED
        found = maps_of(bench, case, features)
        control = maps_of(bench, case, matched(features, record["means"], control_draws(bench.cfg.seed, 1)[0]))
        for what in WHATS:
            for label, maps in ((fact, found[what]), (f"{fact}, matched", control[what])):
                line = [on_share(maps[layer][rows], on, label, layer, what, rates) for layer in maps]
                x = [float(layer) for layer in maps]
                curves[what].append(make_curve(label, x, line))
            total = over_layers(found[what])[rows]
            by_chance = float(on.mean())
            hits[fact, what] = bootstrap_mean(
                [pointing_hit(one, there) for one, there in zip(total, on, strict=True)], control=by_chance
            )
            bench.metrics |= rate_metrics(f"places/{fact}/{what}/pointing", hits[fact, what])
            bench.metrics |= rate_metrics(f"places/{fact}/{what}/on_object", share_of(total, on))
        bench.metrics[f"places/{fact}/chance"] = float(on.mean())
        for where, rate in carried_at(bench, case, rows, on, record["sets"][ALL]).items():
            bench.metrics |= rate_metrics(f"places/{fact}/carried/{where.replace(' ', '_')}/recovered", rate)
            carried[fact, where] = rate
        for i, row in enumerate(rows[:SHOWN].tolist()):
            maps = {f"{fact}, {what}": over_layers(found[what])[row] for what in WHATS}
            if len(drawn) <= i:
                drawn.append(Drawn(np.asarray(case.pairs[row].original.images[0]), boxes, maps))
            elif np.array_equal(drawn[i].image, np.asarray(case.pairs[row].original.images[0])):
                drawn[i].maps.update(maps)
    for (label, what, layer), rate in rates.items():
        bench.metrics |= rate_metrics(f"places/{label.replace(', ', '_')}/{what}/layer_{layer:02d}/on_object", rate)
    bench.records["object_places"] = {"curves": curves, "drawn": drawn, "hits": hits, "carried": carried}


def carried_at(
    bench: Bench, case: PairCase, rows: np.ndarray, on: np.ndarray, features: Mapping[int, Tensor]
) -> dict[str, Rate]:
    """Recovered share when features are carried over at the soft tokens of the objects, of the ground, or at both.
    Elsewhere they stay live: what is carried may change them.

    Args:
        bench: the model and its transcoders.
        case: pairs of one question.
        rows: [n] which of them.
        on: [n, S] bool, which soft tokens lie on an object.
        features: by layer.
    """
    scope, subject = bench.scope, part_of(case.subject, rows.tolist())
    whole = interchange_plan(scope, subject, features, torch.from_numpy(subject.batch.is_image))
    soft = np.flatnonzero(subject.batch.is_image)
    found = {}
    for name, chosen in zip(GROUNDS, (on, ~on, np.ones_like(on)), strict=True):
        mask = torch.zeros(subject.size, subject.batch.length, 1, dtype=torch.bool)
        mask[:, soft] = torch.from_numpy(chosen).unsqueeze(-1)
        mask = mask.to(scope.adapter.device)
        plan = {
            layer: replace(edit, value=mask * edit.value, scale=(~mask).to(edit.value)) for layer, edit in whole.items()
        }
        found[name] = bootstrap_mean(recovered(subject, run_edited(scope, subject.batch, plan)))
    return found


def covers(bench: Bench, case: PairCase) -> tuple[np.ndarray, tuple[PatchBox, ...]]:
    """[B, S], the share of each soft token's part of the picture that is painted in either side of a pair."""
    boxes = tuple(
        box for box in bench.vlm.prepare(case.pairs[0].original.prompt, list(case.pairs[0].original.images)).patch_boxes
        if box is not None
    )  # fmt: skip
    found = []
    for pair in case.pairs:
        masks = [painted_mask(np.asarray(side.images[0])) for side in (pair.original, pair.counterfactual)]
        found.append(share_in_boxes(masks[0] | masks[1], boxes))
    return np.array(found), boxes


def matched(features: Mapping[int, Tensor], means: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """As many other features, alike in layer and mean activation."""
    nothing = torch.zeros(1)
    plan = {layer: LayerEdit(f, nothing, nothing, torch.ones(1, dtype=torch.bool)) for layer, f in features.items()}
    return {layer: edit.features for layer, edit in matched_features(plan, means, seed).items()}


def maps_of(bench: Bench, case: PairCase, features: Mapping[int, Tensor]) -> dict[str, dict[int, np.ndarray]]:
    """What -> layer -> [B, S]: what the features write on each soft token of the originals, and how that changes."""
    subject = case.subject
    soft = torch.from_numpy(subject.batch.is_image)
    sides = [donor_activations(bench.scope, b, features) for b in (subject.batch, subject.other)]
    found: dict[str, dict[int, np.ndarray]] = {what: {} for what in WHATS}
    for layer, (chosen, before) in sides[0].items():
        norms = bench.transcoders[layer].write_norms()[chosen]
        a, b = before[:, soft], sides[1][layer][1][:, soft]
        found["fires"][layer] = (a @ norms).float().numpy(force=True)
        found["changes"][layer] = ((b - a).abs() @ norms).float().numpy(force=True)
    return {what: dict(sorted(of.items())) for what, of in found.items()}


def over_layers(maps: Mapping[int, np.ndarray]) -> np.ndarray:
    """The sum of maps by layer."""
    return np.sum(list(maps.values()), axis=0)


def share_of(maps: np.ndarray, on: np.ndarray) -> Rate:
    """The mean share of maps [n, S] that lies on objects [n, S] bool, over pictures where there is anything; its
    control is the share of soft tokens that lie on objects.
    """
    total = maps.sum(1)
    some = total > 0
    if not some.any():
        return Rate(float("nan"), float("nan"), float("nan"), 0, float(on.mean()))
    shares = (maps * on).sum(1)[some] / total[some]
    return bootstrap_mean(shares, control=float(on[some].mean()))


def on_share(
    maps: np.ndarray, on: np.ndarray, label: str, layer: int, what: str, rates: dict[tuple[str, str, int], Rate]
) -> Rate:
    """`share_of` one layer, kept in `rates` where the layer's features fire on pictures at all."""
    rate = share_of(maps, on)
    if rate.cases:
        rates[label, what, layer] = rate
    return replace(rate, control=None)
