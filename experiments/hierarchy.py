"""From appearance to planet to facts: what is read at which layer, and how deep and by what an answer is carried.

Appearance is read within planets, since across planets a colour gives the planet away. Each feature is of the simplest
kind that predicts its activation on held-out pictures nearly as well as the best: appearance, a level for each colour
word, one for each planet, or appearance and planet; with pictures shuffled in training, the same counts what chance
finds. An answer's depth is the mean layer of what carrying layers 0 .. k recovers. Likeness is the cosine of absolute
effects on two questions, since an effect's sign depends on the answer that a pair starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlmscope.analyses.declared import from_pairs
from vlmscope.analyses.feature_codes import Codes, scene_codes
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.pairs import PairEffects
from vlmscope.core.records import generator
from vlmscope.core.results import Curve
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.data.orrery.scenes import PLANET_QUESTIONS, PLANETS, SIDE, Scene
from vlmscope.interventions.edits import mean_activations
from vlmscope.metrics.decoding import (
    bootstrap_depth,
    class_means,
    held_out_r2,
    linear_accuracy,
    linear_prediction,
    simplest,
)
from vlmscope.report.figures import dose_response

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

PICTURE = "picture"
PLACES = (PICTURE, *(f"last_{name}" for name in PLANET_QUESTIONS))  # soft tokens; last position under each question
KINDS = ("appearance", "colour word", "planet", "appearance and planet")
LEAST = 0.3  # held-out R^2 from which a feature says something


APPEARANCE = ("brightness", "red", "green", "texture", "size")
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def appearance(scene: Scene) -> np.ndarray:
    """What a planet's disc looks like whatever planet it is, [5] float64 in the order of `APPEARANCE`.

    Brightness is mean luminance in 0..1; red and green are the channels' mean share in the sum of all three; texture
    is the standard deviation of the luminance less its surroundings (Gaussian of 2 pixels); size is the radius as a
    share of the picture's side.
    """
    from scipy.ndimage import gaussian_filter

    assert scene.image is not None and "box" in scene.facts, "a scene of a planet has a picture and a box"
    left, top, right, bottom = np.asarray(scene.facts["box"], np.float64) * SIDE
    radius = max(right - left, bottom - top) / 2  # a box that the picture's edge cuts is narrower on that side
    grid = np.arange(SIDE) + 0.5
    x, y = np.meshgrid(grid - (left + right) / 2, grid - (top + bottom) / 2)
    disc = x**2 + y**2 < (radius - 1) ** 2
    pixels = scene.image.astype(np.float64) / 255.0
    luminance = pixels @ _LUMINANCE
    detail = luminance - gaussian_filter(luminance, 2.0)
    total = pixels[disc].sum(-1).mean()
    red, green = pixels[disc].mean(0)[:2] / max(total, 1e-6)
    return np.array([luminance[disc].mean(), red, green, detail[disc].std(), radius / SIDE])


@dataclass(frozen=True)
class Seen:
    """n pictures: planet and colour word as numbers [n], appearance [n, 5]."""

    planet: np.ndarray
    colour: np.ndarray
    looks: np.ndarray


def declare(bench: Bench) -> Declared:
    """Pairs, with controls that are matched on their originals alone."""
    declared = from_pairs(bench)
    bench.records["pairs"] = declared.pairs
    batches = [cases.batch for cases in declared.cases["test"]]
    return replace(declared, means=mean_activations(bench.scope, batches, bench.transcoders.layers))


def analyse(bench: Bench) -> dict[str, float]:
    """depth/<question>, depth/<a>_less_<b>, alike/<a>_<b>/image/layer_03 and read/<place>/features_by_chance.

    reading.parquet has what is read at each place and layer, alike.parquet the likenesses at every role.
    """
    seed, x = bench.cfg.seed, tuple(map(float, bench.transcoders.layers))
    metrics: dict[str, float] = {}
    table = pd.read_parquet(bench.run_dir / "trials.parquet").query(
        "setting == 'first' and control == '' and baseline == ''"
    )
    table["end"] = table.layers.str.rpartition("-")[2].astype(int)
    shares = {}
    for question, part in table.groupby("question", sort=False):
        shares[question] = part.pivot(index="case", columns="end", values="recovered").reindex(part.case.unique())
        metrics |= bootstrap_depth(shares[question].to_numpy(), seed=seed).metrics(f"depth/{question}")
    for a, b in combinations(shares, 2):
        common = [scene for scene in shares[a].index if scene in shares[b].index]
        if len(common) > 1:
            first, second = (shares[name].loc[common].to_numpy() for name in (a, b))
            metrics |= bootstrap_depth(first, second, seed).metrics(f"depth/{a}_less_{b}")
    source = bench.records["pairs"]
    alike = likenesses(bench, {name: source.effects(name) for name in source.questions if name in shares})
    image: Any = alike[alike.role == "image"]
    metrics |= {f"alike/{a}_{b}/image/layer_{n:02d}": v for a, b, n, v in
                image[["first", "second", "layer", "alike"]].itertuples(index=False)}  # fmt: skip
    curves = []
    compared: Any = alike[alike.role.isin(["image", "question", "last"])]
    for role, part in compared.groupby("role", sort=False):
        lines = part.pivot(index=["first", "second"], columns="layer", values="alike").to_numpy()
        curves.append(Curve(str(role), x, *(tuple(f(lines, axis=0)) for f in (np.mean, np.min, np.max))))
    flat = tuple(compared.groupby("layer").shuffled.mean())
    curves.append(Curve("features shuffled (mean)", x, flat, flat, flat))
    dose_response(curves, bench.run_dir / "figures" / "alike.png", "layer", "cosine of effects on two questions", False)
    n_train, n_test = (max(count // len(PLANETS), 2) for count in bench.cfg.interchange.scenes)
    train, seen = codes_of(bench, "train", n_train)
    test, new = codes_of(bench, "test", n_test)
    reading = pd.concat([read_place(bench, place, train[place], seen, test[place], new) for place in PLACES])
    lines = []
    for place, part in reading.groupby("place", sort=False):
        metrics[f"read/{place}/features_by_chance"] = float(part.by_chance.sum())
        lines.append((str(place), part.planet))
    lines.append(("planets shuffled (mean)", reading.groupby("layer", sort=False).planet_shuffled.mean()))
    planet = [Curve(name, x, *[tuple(map(float, values))] * 3) for name, values in lines]
    dose_response(planet, bench.run_dir / "figures" / "planet_by_layer.png", "layer", "planet read rightly (%)")
    bench.write_table("reading", reading)
    bench.write_table("alike", alike)
    return metrics


def likenesses(bench: Bench, effects: dict[str, PairEffects]) -> pd.DataFrame:
    """Cosine of absolute effects of each two questions, by role and layer; `shuffled`: with the second question's
    features shuffled among those that have an effect on either.
    """
    rng = generator(bench.cfg.seed, "alike")
    rows = []
    for a, b in combinations(effects, 2):
        for row, role in enumerate(effects[a].roles):
            for layer in bench.transcoders.layers:
                first, second = (effects[n].effect[layer][row].abs().double().numpy(force=True) for n in (a, b))
                live = (first > 0) | (second > 0)
                null = cosine(first[live], rng.permutation(second[live]))
                rows.append((a, b, role, layer, cosine(first, second), null))
    return pd.DataFrame(rows, columns=["first", "second", "role", "layer", "alike", "shuffled"])


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two vectors; nan where one is 0."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float("nan")


def codes_of(bench: Bench, split: str, each: int) -> tuple[dict[str, Codes], Seen]:
    """Place -> layer -> [n, F] activations (summed over soft tokens; at the last position), and what is seen."""
    scenes = [scene for planet in PLANETS for scene in concept_scenes(planet, split, each, bench.cfg.seed)]
    images, places = pictures(scenes), {}
    for name, wordings in PLANET_QUESTIONS.items():
        # Soft tokens come before any question.
        codes = scene_codes(bench, images, wordings[0], ("last",) if places else ("last", PICTURE))
        places |= {place if place == PICTURE else f"last_{name}": layers for place, layers in codes.items()}
    colours = list(dict.fromkeys(planet.colour for planet in PLANETS.values()))
    planets = np.repeat(np.arange(len(PLANETS)), each)
    colour = np.array([colours.index(planet.colour) for planet in PLANETS.values()])[planets]
    return places, Seen(planets, colour, np.stack([appearance(scene) for scene in scenes]))


def read_place(
    bench: Bench, place: str, train: dict[int, np.ndarray], seen: Seen, test: dict[int, np.ndarray], new: Seen
) -> pd.DataFrame:
    """A row for each layer: `planet`, the share of pictures whose planet is read rightly (`planet_shuffled`: planets
    shuffled in training), held-out R^2 of appearance within planets, features of each kind and of any by chance.
    """
    rng = generator(bench.cfg.seed, "layer reading")
    mixed = Seen(*(values[rng.permutation(len(seen.planet))] for values in (seen.planet, seen.colour, seen.looks)))
    within = np.concatenate([rng.permutation(np.flatnonzero(seen.planet == p)) for p in np.unique(seen.planet)])
    left = seen.looks - class_means(seen.looks, seen.planet, seen.planet)
    left_new = new.looks - class_means(seen.looks, seen.planet, new.planet)
    rows = []
    for layer in bench.transcoders.layers:
        codes, held = train[layer], test[layer]
        control = linear_accuracy(codes, mixed.planet, held, new.planet).mean()
        right = linear_accuracy(codes, seen.planet, held, new.planet).mean()
        both = linear_prediction(codes, np.concatenate([left, left[within]], 1), held)
        looks, null = (held_out_r2(left_new, part) for part in np.split(both, 2, axis=1))
        kind = simplest(kind_scores(codes, seen, held, new), LEAST)
        chance = int((simplest(kind_scores(codes, mixed, held, new), LEAST) != "").sum())
        row = {"place": place, "layer": layer, "planet": right, "planet_shuffled": control}
        row |= dict(zip(APPEARANCE, looks, strict=True)) | {"looks_shuffled": null.max()}
        rows.append(row | {f"{name} features": int((kind == name).sum()) for name in KINDS} | {"by_chance": chance})
    return pd.DataFrame(rows)


def kind_scores(codes: np.ndarray, seen: Seen, held: np.ndarray, new: Seen) -> dict[str, np.ndarray]:
    """Held-out R^2 [F] of every kind of model, simplest first."""

    def fitted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return second @ np.linalg.lstsq(first, codes, rcond=None)[0]

    def looks(scenes: Seen) -> np.ndarray:
        scaled = (scenes.looks - seen.looks.mean(0)) / seen.looks.std(0)
        return np.concatenate([np.ones((len(scaled), 1)), scaled], 1)

    def planets(scenes: Seen) -> np.ndarray:
        return np.eye(len(PLANETS))[scenes.planet]

    predicted = {
        "appearance": fitted(looks(seen), looks(new)),
        "colour word": class_means(codes, seen.colour, new.colour),
        "planet": class_means(codes, seen.planet, new.planet),
        "appearance and planet": fitted(
            np.concatenate([looks(seen)[:, 1:], planets(seen)], 1), np.concatenate([looks(new)[:, 1:], planets(new)], 1)
        ),
    }
    return {name: held_out_r2(held, values) for name, values in predicted.items()}
