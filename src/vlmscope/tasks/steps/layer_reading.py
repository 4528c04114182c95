"""What features say of planets, layer by layer: appearance, planet, facts; read on pictures that were not fitted.

Appearance (`data/orrery/scenes.py`) is read within planets, as what differs between pictures of one planet, since
across planets a colour gives the planet away. Each feature is also sorted by what predicts its activation on held-out
pictures: a linear function of appearance, a level for each colour word, a level for each planet, or appearance and
planet together; it is of the simplest kind that comes near the best. With pictures shuffled in training, the same
counts what chance finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlmscope.core.records import generator
from vlmscope.data.orrery.dataset import concept_scenes
from vlmscope.data.orrery.scenes import APPEARANCE, PLANET_QUESTIONS, PLANETS, appearance
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.metrics.decoding import class_means, held_out_r2, linear_accuracy, linear_prediction, simplest

if TYPE_CHECKING:
    from vlmscope.core.intervention import Rate
    from vlmscope.tasks.steps.bench import Bench

PICTURE = "picture"
PLACES = (PICTURE, *(f"last_{name}" for name in PLANET_QUESTIONS))  # soft tokens; last position under each question
KINDS = ("appearance", "colour word", "planet", "appearance and planet")
LEAST = 0.3  # held-out R^2 from which a feature says something
CHUNK = 70  # scenes a forward


@dataclass(frozen=True)
class Seen:
    """n pictures: planet and colour word as numbers [n], appearance [n, 5]."""

    planet: np.ndarray
    colour: np.ndarray
    looks: np.ndarray


@dataclass(frozen=True)
class LayerReading:
    """Of L layers, at one place.

    Attributes:
        planet: L rates of pictures whose planet is read rightly; the control is with planets shuffled in training.
        looks: [L, 5], held-out R^2 of appearance within planets.
        looks_null: [L, 5], with pictures of a planet shuffled in training.
        kinds: [L, 4] int, features of each kind.
        chance: features of any kind with pictures shuffled in training.
    """

    planet: list[Rate]
    looks: np.ndarray
    looks_null: np.ndarray
    kinds: np.ndarray
    chance: int


def run(bench: Bench) -> None:
    """Leaves a reading for each place in `bench.records`; metrics under read/."""
    n_train, n_test = (max(count // len(PLANETS), 2) for count in bench.cfg.interchange.scenes)
    train, seen = codes_of(bench, "train", n_train)
    test, new = codes_of(bench, "test", n_test)
    found = {}
    for place in PLACES:
        found[place] = read_place(bench, train[place], seen, test[place], new)
        for row, layer in enumerate(bench.transcoders.layers):
            key, one = f"read/{place}/layer_{layer:02d}", found[place]
            bench.metrics[f"{key}/planet"] = one.planet[row].value
            for column, name in enumerate(APPEARANCE):
                bench.metrics[f"{key}/{name}"] = float(one.looks[row, column])
            for column, kind in enumerate(KINDS):
                bench.metrics[f"{key}/features/{kind.replace(' ', '_')}"] = float(one.kinds[row, column])
        bench.metrics[f"read/{place}/features_by_chance"] = float(found[place].chance)
    bench.records["layer_reading"] = found


def codes_of(bench: Bench, split: str, each: int) -> tuple[dict[str, dict[int, np.ndarray]], Seen]:
    """Place -> layer -> [n, F] activations (mean over soft tokens; at the last position), and what is seen."""
    scenes = [scene for planet in PLANETS for scene in concept_scenes(planet, split, each, bench.cfg.seed)]
    layers = bench.transcoders.layers
    found: dict[str, dict[int, list[np.ndarray]]] = {place: {layer: [] for layer in layers} for place in PLACES}
    for start in range(0, len(scenes), CHUNK):
        images = [Image.fromarray(s.image) for s in scenes[start : start + CHUNK] if s.image is not None]
        for name, wordings in PLANET_QUESTIONS.items():
            batch = bench.scope.batch(bench.inputs(images, wordings[0]))
            soft = torch.from_numpy(batch.is_image)
            for layer, x in bench.scope.capture(batch, layers).items():
                transcoder = bench.transcoders[layer]
                width = transcoder.config.n_features
                with torch.no_grad():
                    last = transcoder.encode(x[:, -1]).dense(width)
                    found[f"last_{name}"][layer].append(last.float().numpy(force=True))
                    if name == next(iter(PLANET_QUESTIONS)):  # soft tokens come before any question
                        mean = transcoder.encode(x[:, soft]).dense(width).mean(1)
                        found[PICTURE][layer].append(mean.float().numpy(force=True))
    colours = list(dict.fromkeys(planet.colour for planet in PLANETS.values()))
    planets = np.repeat(np.arange(len(PLANETS)), each)
    colour = np.array([colours.index(planet.colour) for planet in PLANETS.values()])[planets]
    joined = {place: {i: np.concatenate(parts) for i, parts in table.items()} for place, table in found.items()}
    return joined, Seen(planets, colour, np.stack([appearance(scene) for scene in scenes]))


def read_place(
    bench: Bench, train: dict[int, np.ndarray], seen: Seen, test: dict[int, np.ndarray], new: Seen
) -> LayerReading:
    """All layers at one place."""
    rng = generator(bench.cfg.seed, "layer reading")
    mixed = Seen(*(values[rng.permutation(len(seen.planet))] for values in (seen.planet, seen.colour, seen.looks)))
    within = np.concatenate([rng.permutation(np.flatnonzero(seen.planet == p)) for p in np.unique(seen.planet)])
    means = class_means(seen.looks, seen.planet, seen.planet)
    left, left_new = seen.looks - means, new.looks - class_means(seen.looks, seen.planet, new.planet)
    rates, looks, null, kinds, chance = [], [], [], [], 0
    for layer in bench.transcoders.layers:
        codes, held = train[layer], test[layer]
        control = linear_accuracy(codes, mixed.planet, held, new.planet).mean()
        right = linear_accuracy(codes, seen.planet, held, new.planet)
        rates.append(bootstrap_rate(right, control=float(control)))
        both = linear_prediction(codes, np.concatenate([left, left[within]], 1), held)
        looks.append(held_out_r2(left_new, both[:, : left.shape[1]]))
        null.append(held_out_r2(left_new, both[:, left.shape[1] :]))
        kind = simplest(kind_scores(codes, seen, held, new), LEAST)
        kinds.append([int((kind == name).sum()) for name in KINDS])
        chance += int((simplest(kind_scores(codes, mixed, held, new), LEAST) != "").sum())
    return LayerReading(rates, np.array(looks), np.array(null), np.array(kinds), chance)


def kind_scores(codes: np.ndarray, seen: Seen, held: np.ndarray, new: Seen) -> dict[str, np.ndarray]:
    """Held-out R^2 [F] of every kind of model, simplest first."""

    def fitted(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return second @ np.linalg.lstsq(first, codes, rcond=None)[0]

    def looks(of: Seen) -> np.ndarray:
        scaled = (of.looks - seen.looks.mean(0)) / seen.looks.std(0)
        return np.concatenate([np.ones((len(scaled), 1)), scaled], 1)

    def planets(of: Seen) -> np.ndarray:
        return np.eye(len(PLANETS))[of.planet]

    predicted = {
        "appearance": fitted(looks(seen), looks(new)),
        "colour word": class_means(codes, seen.colour, new.colour),
        "planet": class_means(codes, seen.planet, new.planet),
        "appearance and planet": fitted(
            np.concatenate([looks(seen)[:, 1:], planets(seen)], 1), np.concatenate([looks(new)[:, 1:], planets(new)], 1)
        ),
    }
    return {name: held_out_r2(held, found) for name, found in predicted.items()}
