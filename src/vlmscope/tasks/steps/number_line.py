"""Is there a number line? Features whose activation depends on how many shapes there are, on scenes not used to choose.

Training scenes say which features depend on the count (analysis of variance, Benjamini-Hochberg over all features,
layers and places) and what shape their tuning curve has: up, down, or one peak at a count between. Held-out scenes say
whether the shape holds, how the activation correlates with the count, and what of that is left when the painted area
is held fixed. A linear readout is fitted to scenes of one shape (or colour) and tested on the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve
from vlmscope.core.records import FeatureId, generator
from vlmscope.data.orrery.objects import painted_mask
from vlmscope.data.orrery.scenes import SHAPE_COLOURS, SHAPE_QUESTIONS, SHAPES
from vlmscope.data.orrery.shapes import shape_scene
from vlmscope.metrics.causal import benjamini_hochberg, bootstrap_mean, bootstrap_rate
from vlmscope.metrics.decoding import (
    DOWN,
    OTHER,
    PEAK,
    UP,
    curve_kinds,
    level_p,
    linear_accuracy,
    partial_correlation,
    rank_correlation,
    tuning_curves,
)
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics
from vlmscope.tasks.steps.scene_codes import PLACES, Codes, codes_of

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.steps.bench import Bench

COUNTS = (1, 2, 3, 4, 5, 6)
Q = 0.01  # false discoveries among the features said to depend on the count
COLUMNS = (UP, DOWN, *(f"peak {count}" for count in COUNTS[1:-1]))


@dataclass(frozen=True)
class Scenes:
    """Pictures of shapes with what they show: [n] count, shape and colour as codes, and painted area in pixels."""

    images: list[Image.Image]
    count: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    area: np.ndarray


@dataclass(frozen=True)
class Tuned:
    """The features of one place: layer -> [F] column of `COLUMNS` ("" where none), chosen on training scenes.

    `chance` counts those that would be chosen if the training scenes' counts were shuffled.
    """

    names: dict[int, np.ndarray]
    strength: dict[int, np.ndarray]
    chance: int


def check(cfg: AppConfig) -> None:
    """Scenes that show every number on every shape.

    Raises:
        UserError: there are too few.
    """
    least = len(COUNTS) * len(SHAPES)
    if min(cfg.interchange.scenes) < least:
        raise UserError(
            f"interchange.scenes={list(cfg.interchange.scenes)}: the step number_line needs at least {least} training "
            f"and {least} held-out scenes, one of each number and shape"
        )


def run(bench: Bench) -> None:
    """Leaves tuned features, tuning curves and readouts in `bench.records`; metrics under numbers/."""
    seed = 0 if bench.cfg.pairs is None else bench.cfg.pairs.seed
    sizes = bench.cfg.interchange.scenes
    train, test = (drawn_scenes(split, size, seed) for split, size in zip(("train", "test"), sizes, strict=True))
    prompt = SHAPE_QUESTIONS["count"][0]
    codes, held_out = codes_of(bench, train.images, prompt), codes_of(bench, test.images, prompt)
    record = {}
    for place in PLACES:
        tuned = tuned_features(codes[place], train.count, seed)
        bench.metrics |= held_out_metrics(f"numbers/{place}", tuned, held_out[place], test)
        record[place] = {
            "tuned": tuned,
            "counts": np.array([[int((names == c).sum()) for c in COLUMNS] for names in tuned.names.values()]),
            "curves": drawn_curves(tuned, held_out[place], test.count),
            "read": readouts(bench, place, codes[place], train, held_out[place], test, seed),
        }
    named = {
        place: {c: [f"L{i}/{f}" for i, n in of["tuned"].names.items() for f in np.flatnonzero(n == c)] for c in COLUMNS}
        for place, of in record.items()
    }
    write_json(bench.run_dir / "number_line.json", {"q": Q, "features": named})
    bench.records["number_line"] = record


def drawn_scenes(split: str, size: int, seed: int) -> Scenes:
    """`size` scenes of 1 to 6 shapes in turn, and the shapes in turn, in any colour."""
    colours = list(SHAPE_COLOURS)
    rows = [(COUNTS[i % 6], i // 6 % len(SHAPES)) for i in range(size)]
    tints = generator(seed, "number line", split).integers(0, len(colours), size)
    pixels = []
    for i, ((count, shape), colour) in enumerate(zip(rows, tints, strict=True)):
        image = shape_scene(generator(seed, "number line", split, i), SHAPES[shape], colours[colour], count).image
        assert image is not None
        pixels.append(image)
    counts, shapes = np.array(rows).T
    return Scenes(
        [Image.fromarray(p) for p in pixels], counts, shapes, tints, np.array([painted_mask(p).sum() for p in pixels])
    )


def tuned_features(codes: Codes, counts: np.ndarray, seed: int) -> Tuned:
    """Features of one place that depend on the count, and how, by training scenes alone."""
    names, strength = _columns(codes, counts)
    shuffled, _ = _columns(codes, generator(seed, "shuffled counts").permutation(counts))
    return Tuned(names, strength, sum(int((found != "").sum()) for found in shuffled.values()))


def _columns(codes: Codes, counts: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    p = np.concatenate([level_p(code, counts) for code in codes.values()])
    sure = np.split(benjamini_hochberg(p) <= Q, np.cumsum([code.shape[1] for code in codes.values()])[:-1])
    names, strength = {}, {}
    for (layer, code), passed in zip(codes.items(), sure, strict=True):
        curves = tuning_curves(code, counts)
        kinds = curve_kinds(curves)
        peaked = np.array([f"{PEAK} {COUNTS[top]}" for top in curves.argmax(0)], dtype=object)
        column = np.where(kinds == PEAK, peaked, kinds)
        column[~passed | (kinds == OTHER)] = ""
        names[layer] = column
        strength[layer] = curves.var(0) / np.maximum(code.var(0), 1e-12)  # share of variance that the count explains
    return names, strength


def held_out_metrics(key: str, tuned: Tuned, codes: Codes, scenes: Scenes) -> dict[str, float]:
    """How many features of each kind, on what share of them held-out scenes show the same, and correlations there."""
    metrics = {f"{key}/by_chance": float(tuned.chance)}
    monotone: list[np.ndarray] = []
    holds: dict[str, list[bool]] = {kind: [] for kind in (UP, DOWN, PEAK)}
    between = float(rank_correlation(scenes.count[:, None].astype(float), scenes.area)[0])
    for layer, names in tuned.names.items():
        chosen = np.flatnonzero(names != "")
        kinds = curve_kinds(tuning_curves(codes[layer][:, chosen], scenes.count))
        for name, kind in zip(names[chosen], kinds, strict=True):
            holds[name.split()[0]].append(bool(kind == name.split()[0]))
        lines = np.flatnonzero(np.isin(names, (UP, DOWN)))
        of_count, of_area = (rank_correlation(codes[layer][:, lines], x) for x in (scenes.count, scenes.area))
        sign = np.where(names[lines] == UP, 1.0, -1.0)
        monotone.append(np.stack([of_count * sign, partial_correlation(of_count, of_area, between) * sign]))
    for kind, found in holds.items():
        metrics[f"{key}/{kind}/features"] = float(len(found))
        if found:
            metrics |= rate_metrics(f"{key}/{kind}/holds", bootstrap_rate(found))
    rho = np.concatenate(monotone, 1)
    if rho.shape[1]:
        metrics |= rate_metrics(f"{key}/monotone/rho", bootstrap_mean(rho[0]))
        metrics |= rate_metrics(f"{key}/monotone/rho_at_equal_area", bootstrap_mean(rho[1]))
        metrics |= rate_metrics(f"{key}/monotone/same_sign_at_equal_area", bootstrap_rate(rho[1] > 0))
    return metrics


def drawn_curves(tuned: Tuned, codes: Codes, counts: np.ndarray) -> list[Curve]:
    """Held-out tuning curves, in shares of their highest mean, of the feature of each column that training scenes
    tie most to the count.
    """
    curves = []
    for column in COLUMNS:
        rows = [
            (tuned.strength[layer][f], layer, f)
            for layer, names in tuned.names.items()
            for f in np.flatnonzero(names == column).tolist()
        ]
        if not rows:
            continue
        _, layer, f = max(rows)
        values = codes[layer][:, f]
        top = max(values[counts == count].mean() for count in COUNTS) or 1.0
        rates = [bootstrap_mean(values[counts == count] / top) for count in COUNTS]
        curves.append(make_curve(f"{column}: {FeatureId(layer, f)}", [float(c) for c in COUNTS], rates))
    return curves


def readouts(
    bench: Bench, place: str, train: Codes, seen: Scenes, test: Codes, unseen: Scenes, seed: int
) -> list[Curve]:
    """Accuracy by layer of a readout of the count that was fitted to one shape, or to one colour, and tested on
    held-out scenes of the same and of the others; and with the counts of the training scenes shuffled.
    """
    named = (("shape", seen.shape, unseen.shape), ("colour", seen.colour, unseen.colour))
    shuffled = generator(seed, "shuffled counts", "read").permutation(len(seen.count))
    found: dict[str, list] = {}
    for layer in train:
        hits: dict[str, list[np.ndarray]] = {}
        for fact, own, other in named:
            for value in np.unique(own):
                rows = own == value
                x, y = train[layer][rows], seen.count[rows]
                right = linear_accuracy(x, y, test[layer], unseen.count)
                hits.setdefault(f"same {fact}", []).append(right[other == value])
                hits.setdefault(f"another {fact}", []).append(right[other != value])
        by_chance = linear_accuracy(train[layer], seen.count[shuffled], test[layer], unseen.count)
        for name, parts in (hits | {"shuffled counts": [by_chance]}).items():
            rate = bootstrap_rate(np.concatenate(parts))
            found.setdefault(name, []).append(rate)
            key = f"numbers/{place}/read/{name.replace(' ', '_')}/layer_{layer:02d}/accuracy"
            bench.metrics |= rate_metrics(key, rate)
    return [make_curve(name, [float(layer) for layer in train], rates) for name, rates in found.items()]
