"""What single features stand for: their activations on many scenes whose facts are known, and trials by kind.

Each feature's activation is explained on training scenes, and the explanation is tested on held-out ones; facts
shuffled among training scenes give the number of explanations that arise by chance. Legend: n scenes, F features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from vlmscope.circuits.operations import Carry
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, generator
from vlmscope.core.results import Curve, Rate
from vlmscope.data.orrery.dataset import counted_scenes, painted_mask
from vlmscope.data.orrery.rendering import digit_scene
from vlmscope.interventions.trials import Setting, Trial
from vlmscope.metrics import decoding
from vlmscope.metrics.decoding import DOWN, PEAK, UP
from vlmscope.metrics.rates import bootstrap_mean, share_rate
from vlmscope.report.figures import dose_response, layer_role_heatmap

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench
    from vlmscope.circuits.experiment import Declared

CHUNK = 100  # pictures a forward
FEWEST = 30  # scenes for a number line
PLACES = ("last", "picture")
Codes = dict[int, np.ndarray]  # layer -> [n, F] float32
Scenes = tuple[list[np.ndarray], pd.DataFrame]  # pictures, and a row of facts for each


def digit_table(split: str, count: int, seed: int) -> Scenes:
    """Two handwritten digits at random: their sum, whether it carries, and the pair as a number."""
    digits = generator(seed, "sum features", split).integers(0, 10, (count, 2))
    images = []
    for i, (first, second) in enumerate(digits.tolist()):
        image = digit_scene(generator(seed, "sum features", split, i), split, first, second).image
        assert image is not None, "scenes of digits have pictures"
        images.append(image)
    facts = pd.DataFrame(digits, columns=["first", "second"])
    facts["sum"], facts["pair"] = facts["first"] + facts["second"], 10 * facts["first"] + facts["second"]
    return images, facts.assign(carry=(facts["sum"] >= 10).astype(int))


def shape_table(split: str, count: int, seed: int) -> Scenes:
    """1 to 6 shapes of one kind and colour: how many, which, and the painted area in pixels."""
    images, facts = counted_scenes(split, count, seed)
    table = pd.DataFrame(facts, columns=["count", "shape", "colour"])
    return images, table.assign(area=[painted_mask(image).sum() for image in images])


SCENE_TABLES = {"digits": digit_table, "shapes": shape_table}


@torch.no_grad()
def scene_codes(
    bench: Bench, images: Sequence[np.ndarray], prompt: str, places: Sequence[str] = PLACES
) -> dict[str, Codes]:
    """Place -> layer -> [n, F]: activations at the last position, and summed over the soft tokens of the picture."""
    codes: dict[str, dict[int, list[np.ndarray]]] = {place: {} for place in places}
    for start in range(0, len(images), CHUNK):
        batch = bench.scope.batch(bench.inputs(images[start : start + CHUNK], prompt))
        soft = torch.from_numpy(batch.is_image)
        for layer, x in bench.scope.capture(batch).items():
            transcoder = bench.transcoders[layer]
            width = transcoder.config.n_features
            for place in places:
                if place == "last":
                    code = transcoder.encode(x[:, -1]).dense(width)
                else:
                    sparse = transcoder.encode(x[:, soft])
                    flat = sparse.indices.flatten(1)
                    code = sparse.values.new_zeros(len(flat), width).scatter_add_(1, flat, sparse.values.flatten(1))
                codes[place].setdefault(layer, []).append(code.float().cpu().numpy())
    return {place: {layer: np.concatenate(parts) for layer, parts in layers.items()} for place, layers in codes.items()}


def both_splits(
    bench: Bench, scenes: str, prompt: str, places: Sequence[str] = PLACES
) -> tuple[list[dict[str, Codes]], list[pd.DataFrame]]:
    """Codes by place and layer, and facts, of training and of held-out scenes, as many as `interchange.scenes`."""
    codes, tables = [], []
    for split, size in zip(("train", "test"), bench.cfg.interchange.scenes, strict=True):
        images, facts = SCENE_TABLES[scenes](split, size, pair_seed(bench))
        bench.recorded(split, f"{scenes} {split}", images, "feature codes")
        codes.append(scene_codes(bench, images, prompt, places))
        tables.append(facts)
    return codes, tables


def pair_seed(bench: Bench) -> int:
    """The seed of the pairs, which scenes share."""
    assert bench.cfg.pairs is not None, "cases come from pairs"
    return bench.cfg.pairs.seed


def kind_trials(bench: Bench, declared: Declared, sets: Mapping[str, Mapping[int, np.ndarray]]) -> Iterator[Trial]:
    """Carry each set of features alone (layer -> indices), on questions that should follow and on those that should
    stay; controls as many as in the setting `main`.
    """
    assert declared.pairs is not None, "cases come from pairs"
    main = bench.cfg.settings["main"]
    draws = {"matched": main.matched, "draws_on": main.draws_on}
    follows = Setting("kind", random_direction=main.random_direction, **draws)
    for label, features in sets.items():
        carry = Carry({layer: torch.from_numpy(chosen) for layer, chosen in features.items() if len(chosen)})
        for setting, name in ((follows, "test"), (Setting("kind_stays", **draws), "stays")):
            if carry.features and declared.cases[name]:
                yield Trial(f"kind/{label}", carry, declared.cases[name], [setting])


def listed(names: Mapping[int, np.ndarray], kinds: Sequence[str]) -> dict[str, list[str]]:
    """The features of each kind, from layer -> [F] kinds."""
    return {kind: [str(FeatureId(i, int(f))) for i, kind_of in names.items() for f in np.flatnonzero(kind_of == kind)]
            for kind in kinds}  # fmt: skip


@dataclass
class FeatureKinds:
    """Which facts of a scene a feature's activation at the last position stands for.

    It is predicted from facts by models of growing size: `kinds` names them, simplest first, each by one fact (a level
    for each value) or several (a term for each). A feature is of the simplest kind that comes near the best on held-out
    scenes, where that explains `least` of the variance. `read` are facts that a linear readout looks for, layer by
    layer; `carry` groups kinds whose features are carried alone on every question. `scenes` is a table of
    `SCENE_TABLES`, of sizes `interchange.scenes`.

    Writes `<name>_features.json`, figures/read.png and kinds.png; metrics `<name>s/features/<kind>` and
    `<name>s/read/<fact>/accuracy`.
    """

    name: str
    scenes: str
    prompt: str
    kinds: dict[str, list[str]]
    read: list[str]
    carry: dict[str, list[str]]
    least: float = 0.3
    # What `trials` leaves for `analyse`: layer -> [F] kinds, readouts by layer, features of any kind by chance.
    found: Any = field(default=None, init=False)

    def trials(self, bench: Bench, declared: Declared) -> Iterator[Trial]:
        """Carry only the features of one group of kinds."""
        kinds, _, _ = self.found = self.explained(bench)
        sets = {label: {layer: np.flatnonzero(np.isin(kind, names)) for layer, kind in kinds.items()}
                for label, names in self.carry.items()}  # fmt: skip
        yield from kind_trials(bench, declared, sets)

    def explained(self, bench: Bench) -> tuple[dict[int, np.ndarray], dict[str, list[Rate]], int]:
        """Layer -> [F] kinds ("" of none); fact -> held-out accuracy by layer; how many have a kind by chance."""
        codes, (seen, new) = both_splits(bench, self.scenes, self.prompt, ("last",))
        mixed = seen.iloc[generator(pair_seed(bench), f"shuffled {self.scenes}").permutation(len(seen))]
        kinds: dict[int, np.ndarray] = {}
        read: dict[str, list[Rate]] = {fact: [] for fact in self.read}
        chance = 0
        for layer, train in codes[0]["last"].items():
            test = codes[1]["last"][layer]
            kinds[layer], by_chance = (
                decoding.simplest(decoding.explained_by(self.kinds, train, facts, test, new), self.least)
                for facts in (seen, mixed)
            )
            chance += int((by_chance != "").sum())
            for fact, rates in read.items():
                hits = decoding.linear_accuracy(train, seen[fact].to_numpy(), test, new[fact].to_numpy())
                rates.append(share_rate(hits))
        return kinds, read, chance

    def analyse(self, bench: Bench) -> dict[str, float]:
        """How many features are of each kind, and what is read."""
        kinds, read, chance = self.found
        counts = np.array([[int((kind == name).sum()) for name in self.kinds] for kind in kinds.values()])
        accuracy = {fact: [rate.value for rate in rates] for fact, rates in read.items()}
        body = {"least_r2": self.least, "features": listed(kinds, list(self.kinds)), "read": accuracy}
        write_json(bench.run_dir / f"{self.name}_features.json", body)
        folder = bench.run_dir / "figures"
        curves = [Curve.of(fact, kinds, rates) for fact, rates in read.items()]
        dose_response(curves, folder / "read.png", "layer", "held-out accuracy (%)")
        layer_role_heatmap(counts, list(kinds), list(self.kinds), folder / "kinds.png", "features", "kind of feature")
        root = f"{self.name}s"
        metrics = {f"{root}/features/{kind.replace(' ', '_')}": float(n)
                   for kind, n in zip(self.kinds, counts.sum(0), strict=True)}  # fmt: skip
        metrics |= {f"{root}/read/{fact}/accuracy": by_layer[-1] for fact, by_layer in accuracy.items()}
        return metrics | {f"{root}/features/by_chance": float(chance)}


@dataclass
class NumberLine:
    """Which features depend on a number, and whether that is a number line: the shape of their tuning curves.

    On training scenes, curves go up, down or have a peak; held-out scenes say whether the shape holds, how activation
    correlates with the number, and what of that is left when the fact `held` is fixed. A linear readout is fitted to
    scenes of one value of each fact of `across`, and tested on the same and on the others. The features of one shape
    are carried alone. `scenes` as for `FeatureKinds`.

    Writes number_line.json and, for the last position and the picture, figures/tuning_<place>.png, kinds_<place>.png
    and read_<place>.png; metrics `numbers/<place>/...`.
    """

    scenes: str
    prompt: str
    number: str
    across: list[str]
    held: str

    def check(self, cfg: Any) -> None:
        """Refuse too few scenes to show every number with every value of a fact."""
        if min(cfg.interchange.scenes) < FEWEST:
            many = f"at least {FEWEST} training and {FEWEST} held-out scenes"
            raise UserError(f"interchange.scenes={list(cfg.interchange.scenes)}: a number line needs {many}")

    def trials(self, bench: Bench, declared: Declared) -> Iterator[Trial]:
        """Carry features of one shape of tuning curve."""
        names = self.tuned(bench)["last"]
        shapes = {layer: np.array([name.partition(" ")[0] for name in row]) for layer, row in names.items()}
        sets = {
            kind: {layer: np.flatnonzero(row == kind) for layer, row in shapes.items()} for kind in (UP, DOWN, PEAK)
        }
        yield from kind_trials(bench, declared, sets)

    def tuned(self, bench: Bench) -> dict[str, dict[int, np.ndarray]]:
        """Place -> layer -> [F] shapes of tuning curves; writes number_line.json and the figures."""
        seed, folder = pair_seed(bench), bench.run_dir / "figures"
        codes, (seen, new) = both_splits(bench, self.scenes, self.prompt)
        y, held_out = seen[self.number].to_numpy(), new[self.number].to_numpy()
        levels = np.unique(y)
        columns = (UP, DOWN, *(f"{PEAK} {level}" for level in levels[1:-1]))
        record, named = {}, {}
        for place in PLACES:
            train, test = (split[place] for split in codes)
            named[place], strength = names, strength = decoding.tuned(train, y)
            chance, _ = decoding.tuned(train, generator(seed, "shuffled counts").permutation(y))
            kinds = np.array([[int((row == column).sum()) for column in columns] for row in names.values()])
            up, down, *peaks = kinds.sum(0).tolist()
            numbers = {"up/features": up, "down/features": down, "peak/features": sum(peaks)}
            numbers["by_chance"] = sum(int((row != "").sum()) for row in chance.values())
            holds = decoding.held_out_tuning(names, test, held_out, new[self.held].to_numpy())
            numbers |= {name: rate.value for name, rate in holds.items()}
            bench.metrics |= {f"numbers/{place}/{name}": float(value) for name, value in numbers.items()}
            read = self.readouts(train, seen, test, new, seed)
            body = json.loads(json.dumps({"holds": holds, **read}, default=vars))
            record[place] = {"features": listed(names, columns), **body}
            words = ("features", "shape of the tuning curve")
            layer_role_heatmap(kinds, list(names), columns, folder / f"kinds_{place}.png", *words)
            lines = tuning_lines(names, strength, test, held_out, levels, columns)
            words = (f"{self.number} in the picture (number)", "activation (share of its highest mean)")
            dose_response(lines, folder / f"tuning_{place}.png", *words, percent=False)
            lines = [Curve.of(name, names, rates) for name, rates in read.items()]
            dose_response(lines, folder / f"read_{place}.png", "layer", f"held-out accuracy of the {self.number} (%)")
        write_json(bench.run_dir / "number_line.json", record)
        return named

    def readouts(
        self, train: Codes, seen: pd.DataFrame, test: Codes, new: pd.DataFrame, seed: int
    ) -> dict[str, list[Rate]]:
        """Held-out accuracy of the number by layer, fitted to one value of a fact, on the same and on the others."""
        y, number = seen[self.number].to_numpy(), new[self.number].to_numpy()
        shuffled = y[generator(seed, "shuffled counts", "read").permutation(len(y))]
        rates: dict[str, list[Rate]] = {}
        for layer, x in train.items():
            hits = {f"shuffled {self.number}": decoding.linear_accuracy(x, shuffled, test[layer], number)}
            for fact in self.across:
                groups, new_groups = seen[fact].to_numpy(), new[fact].to_numpy()
                both = decoding.accuracy_across(x, y, groups, test[layer], number, new_groups)
                hits |= dict(zip((f"same {fact}", f"another {fact}"), both, strict=True))
            for name, right in hits.items():
                rates.setdefault(name, []).append(share_rate(right))
        return rates


def tuning_lines(
    names: Mapping[int, np.ndarray],
    strength: Mapping[int, np.ndarray],
    codes: Codes,
    numbers: np.ndarray,
    levels: np.ndarray,
    columns: Sequence[str],
) -> list[Curve]:
    """Held-out tuning curves, in shares of their highest mean, of each shape's feature most tied to the number."""
    lines = []
    for column in columns:
        rows = [(strength[i][f], i, f) for i, row in names.items() for f in np.flatnonzero(row == column).tolist()]
        if rows:
            _, layer, f = max(rows)
            values = [codes[layer][numbers == level, f] for level in levels]
            top = max(part.mean() for part in values) or 1.0  # a feature that is silent here stays at 0
            rates = [bootstrap_mean(part / top) for part in values]
            lines.append(Curve.of(f"{column}: {FeatureId(layer, f)}", levels, rates))
    return lines
