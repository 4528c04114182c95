"""From appearance to planet to facts: what is read at which layer, and how deep and by what an answer is carried.

Appearance is read within planets, since across planets a colour gives the planet away. Each feature is of the simplest
kind that predicts its activation on held-out pictures nearly as well as the best: appearance, a level for each colour
word, one for each planet, or appearance and planet; with pictures shuffled in training, the same counts what chance
finds. An answer's depth is the mean layer of what carrying layers 0 .. k recovers. Likeness is the cosine of absolute
effects on two questions, since an effect's sign depends on the answer that a pair starts from.
"""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter

from vlmscope.analyses.bench import Bench
from vlmscope.analyses.declared import from_pairs
from vlmscope.analyses.feature_codes import PLACES, Codes, scene_codes
from vlmscope.circuits.experiment import Declared
from vlmscope.circuits.pairs import PairEffects
from vlmscope.core.records import generator
from vlmscope.data.orrery.dataset import concept_scenes, pictures
from vlmscope.data.orrery.scenes import PLANET_QUESTIONS, PLANETS, SIDE, Scene
from vlmscope.metrics import decoding

APPEARANCE = ["brightness", "red", "green", "texture", "size"]
KINDS = {"appearance": APPEARANCE, "colour word": ["colour"], "planet": ["planet"],
         "appearance and planet": [*APPEARANCE, "planet"]}  # fmt: skip
LEAST = 0.3  # held-out R^2 from which a feature says something


def appearance(scene: Scene) -> np.ndarray:
    """What a planet's disc looks like whatever planet it is, [5] float64 in the order of `APPEARANCE`.

    Brightness is mean luminance in 0..1; red and green are the channels' mean share in the sum of all three; texture
    is the standard deviation of the luminance less its surroundings (Gaussian of 2 pixels); size is the radius as a
    share of the picture's side.
    """
    assert scene.image is not None and "box" in scene.facts, "a scene of a planet has a picture and a box"
    left, top, right, bottom = np.asarray(scene.facts["box"], np.float64) * SIDE
    radius = max(right - left, bottom - top) / 2  # a box that the picture's edge cuts is narrower on that side
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    disc = (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2 < (radius - 1) ** 2
    pixels = scene.image.astype(np.float64) / 255.0
    luminance = pixels @ np.array([0.2126, 0.7152, 0.0722])
    detail = luminance - gaussian_filter(luminance, 2.0)
    red, green = pixels[disc].mean(0)[:2] / max(pixels[disc].sum(-1).mean(), 1e-6)
    return np.array([luminance[disc].mean(), red, green, detail[disc].std(), radius / SIDE])


def declare(bench: Bench) -> Declared:
    """Pairs, whose source the analysis reads too."""
    declared = from_pairs(bench)
    bench.records["pairs"] = declared.pairs
    return declared


def analyse(bench: Bench) -> dict[str, float]:
    """depth/<question>, depth/<a>_less_<b>, alike/<a>_<b>/image/layer_03 and read/<place>/features_by_chance.

    reading.parquet has what is read at each place and layer, alike.parquet the likenesses at every role.
    """
    seed, metrics, shares = bench.cfg.seed, {}, {}
    table = bench.rows("first").assign(end=lambda rows: rows.layers.str.rpartition("-")[2].astype(int))
    for question, part in table.groupby("question", sort=False):
        shares[question] = part.pivot(index="case", columns="end", values="recovered").reindex(part.case.unique())
        metrics |= decoding.bootstrap_depth(shares[question].to_numpy(), seed=seed).metrics(f"depth/{question}")
    for a, b in combinations(shares, 2):
        common = [scene for scene in shares[a].index if scene in shares[b].index]
        if len(common) > 1:
            first, second = (shares[name].loc[common].to_numpy() for name in (a, b))
            metrics |= decoding.bootstrap_depth(first, second, seed).metrics(f"depth/{a}_less_{b}")
    source = bench.records["pairs"]
    alike = likenesses(bench, {name: source.effects(name) for name in source.questions if name in shares})
    metrics |= {f"alike/{row.first}_{row.second}/image/layer_{row.layer:02d}": row.alike
                for row in alike[alike.role == "image"].itertuples()}  # fmt: skip
    n_train, n_test = (max(count // len(PLANETS), 2) for count in bench.cfg.interchange.scenes)
    (train, seen), (test, new) = (codes_of(bench, *of) for of in (("train", n_train), ("test", n_test)))
    reading = pd.concat([read_place(bench, place, train[place], seen, test[place], new) for place in train])
    metrics |= {f"read/{place}/features_by_chance": float(part.by_chance.sum())
                for place, part in reading.groupby("place", sort=False)}  # fmt: skip
    bench.write_table("reading", reading)
    bench.write_table("alike", alike)
    return metrics


def likenesses(bench: Bench, effects: dict[str, PairEffects]) -> Any:
    """Cosine of absolute effects of each two questions, by role and layer; `alike_control`: with the second question's
    features shuffled among those that have an effect on either.
    """
    rng = generator(bench.cfg.seed, "alike")
    rows = []
    for a, b in combinations(effects, 2):
        for (row, role), layer in product(enumerate(effects[a].roles), bench.transcoders.layers):
            first, second = (effects[n].effect[layer][row].abs().double().numpy(force=True) for n in (a, b))
            live = (first > 0) | (second > 0)
            null = cosine(first[live], rng.permutation(second[live]))
            rows.append((a, b, role, layer, cosine(first, second), null))
    return pd.DataFrame(rows, columns=["first", "second", "role", "layer", "alike", "alike_control"])


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Of two vectors; nan where one is 0."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float("nan")


def codes_of(bench: Bench, split: str, each: int) -> tuple[dict[str, Codes], pd.DataFrame]:
    """Place -> layer -> [n, F] activations (summed over soft tokens; at the last position), and facts of the scenes."""
    scenes = [scene for planet in PLANETS for scene in concept_scenes(planet, split, each, bench.cfg.seed)]
    images, places = bench.recorded(split, f"planets {split}", pictures(scenes), "reading"), {}
    for name, wordings in PLANET_QUESTIONS.items():
        # Soft tokens come before any question.
        codes = scene_codes(bench, images, wordings[0], ("last",) if places else PLACES)
        places |= {f"last_{name}" if place == "last" else place: layers for place, layers in codes.items()}
    facts = pd.DataFrame([appearance(scene) for scene in scenes], columns=APPEARANCE)
    codes = {fact: pd.Categorical([scene.facts[fact] for scene in scenes]).codes for fact in ("planet", "colour")}
    return places, facts.assign(**codes)


def read_place(bench: Bench, place: str, train: Codes, seen: Any, test: Codes, new: Any) -> pd.DataFrame:
    """A row for each layer: `planet`, the share of pictures whose planet is read rightly (`planet_control`: planets
    shuffled in training), held-out R^2 of appearance within planets, features of each kind and of any by chance.
    """
    rng, mixed = generator(bench.cfg.seed, "layer reading"), seen.copy()
    for facts in (["planet"], ["colour"], APPEARANCE):
        mixed[facts] = seen[facts].to_numpy()[rng.permutation(len(seen))]
    planet, looks = seen.planet.to_numpy(), seen[APPEARANCE].to_numpy()
    within = np.concatenate([rng.permutation(np.flatnonzero(planet == p)) for p in np.unique(planet)])
    left = looks - decoding.class_means(looks, planet, planet)
    left_new = new[APPEARANCE].to_numpy() - decoding.class_means(looks, planet, new.planet.to_numpy())
    rows = []
    for layer in bench.transcoders.layers:
        codes, held = train[layer], test[layer]
        right, control = (decoding.linear_accuracy(codes, of.planet.to_numpy(), held, new.planet.to_numpy()).mean()
                          for of in (seen, mixed))  # fmt: skip
        both = decoding.linear_prediction(codes, np.concatenate([left, left[within]], 1), held)
        explained, null = (decoding.held_out_r2(left_new, part) for part in np.split(both, 2, axis=1))
        kind, chance = (decoding.simplest(decoding.explained_by(KINDS, codes, of, held, new), LEAST)
                        for of in (seen, mixed))  # fmt: skip
        row = {"place": place, "layer": layer, "planet": right, "planet_control": control, "looks_shuffled": null.max()}
        row |= dict(zip(APPEARANCE, explained, strict=True)) | {"by_chance": int((chance != "").sum())}
        rows.append(row | {f"{name} features": int((kind == name).sum()) for name in KINDS})
    return pd.DataFrame(rows)
