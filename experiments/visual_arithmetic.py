"""Are there features for sums, carries, digits or pairs of digits? Asked of held-out scenes, then by interchange.

Each feature's activation at the last position, under the question for the sum, is predicted from the digits by models
of growing size: carry (2 levels), first digit, second digit (10), the sum (19), a term for each digit (20) and a level
for each pair of digits (100). A feature is of the simplest kind that comes near the best on scenes it was not fitted
to. The same with digits shuffled among training scenes says how many features would be found by chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlmscope.circuits.operations import Carry
from vlmscope.core.artifacts import write_json
from vlmscope.core.intervention import Curve
from vlmscope.core.records import generator
from vlmscope.data.orrery.digits import digit_scene
from vlmscope.data.orrery.scenes import DIGIT_QUESTIONS
from vlmscope.interventions.trials import Setting, Trial
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.metrics.decoding import additive, class_means, held_out_r2, linear_accuracy, simplest
from vlmscope.report import figures
from vlmscope.tasks.steps.scene_codes import Codes, codes_of

if TYPE_CHECKING:
    from vlmscope.circuits.experiment import Declared
    from vlmscope.tasks.bench import Bench

KINDS = ("carry", "first", "second", "sum", "both digits", "pair")
GROUPS = {"sum_and_carry": ("sum", "carry"), "pair": ("pair",), "digit": ("first", "second", "both digits")}
LEAST = 0.3  # held-out R^2 from which a feature says something of the digits


def trials(bench: Bench, declared: Declared) -> Iterator[Trial]:
    """Carry only the features of one kind over, on every question."""
    kinds = bench.records["kinds"] = kinds_of(bench)
    assert declared.pairs is not None, "cases come from pairs"
    main, matched = bench.cfg.settings["main"], declared.pairs.matched()
    here = Setting("kind", matched=main.matched, random_direction=main.random_direction)
    still = Setting("kind_stays", matched=main.matched)
    for label, names in GROUPS.items():
        found = {layer: torch.from_numpy(np.flatnonzero(np.isin(kind, names))) for layer, kind in kinds.items()}
        carry = Carry({layer: chosen for layer, chosen in found.items() if len(chosen)})
        for setting, cases in ((here, declared.cases["test"]), (still, declared.cases["stays"])):
            if carry.features and cases:
                yield Trial(f"kind/{label}", carry, cases, [setting], matched)


def analyse(bench: Bench) -> dict[str, float]:
    """How many features are of each kind: sums/ metrics, sum_features.json, figures/read.png and figures/kinds.png."""
    kinds, curves, chance = bench.records["kinds"], bench.records["read"], bench.records["chance"]
    counts = np.array([[int((kind == name).sum()) for name in KINDS] for kind in kinds.values()])
    named = {kind: [f"L{i}/{f}" for i, k in kinds.items() for f in np.flatnonzero(k == kind)] for kind in KINDS}
    read = {curve.name: curve.y for curve in curves}  # held-out accuracy by layer
    write_json(bench.run_dir / "sum_features.json", {"least_r2": LEAST, "features": named, "read": read})
    folder = bench.run_dir / "figures"
    figures.dose_response(curves, folder / "read.png", "layer", "held-out accuracy (%)")
    figures.layer_role_heatmap(counts, list(kinds), KINDS, folder / "kinds.png", "features", "kind of feature")
    found = {f"sums/features/{kind.replace(' ', '_')}": float(n) for kind, n in zip(KINDS, counts.sum(0), strict=True)}
    last = {f"sums/read/{name}/accuracy": by_layer[-1] for name, by_layer in read.items()}
    return found | last | {"sums/features/by_chance": float(chance)}


def kinds_of(bench: Bench) -> dict[int, np.ndarray]:
    """Layer -> [F] kind of each feature, "" of none; leaves readouts by layer and the number by chance in records."""
    assert bench.cfg.pairs is not None, "cases come from pairs"
    seed = bench.cfg.pairs.seed
    n_train, n_test = bench.cfg.interchange.scenes
    train, digits = digit_codes(bench, "train", n_train, seed)
    test, test_digits = digit_codes(bench, "test", n_test, seed)
    shuffled = generator(seed, "shuffled digits").permutation(digits)
    kinds: dict[int, np.ndarray] = {}
    read: dict[str, list] = {name: [] for name in ("first", "second", "sum", "carry")}
    chance = 0
    for layer in bench.transcoders.layers:
        kinds[layer] = simplest(scores(train[layer], digits, test[layer], test_digits), LEAST)
        chance += int((simplest(scores(train[layer], shuffled, test[layer], test_digits), LEAST) != "").sum())
        for name, found in read.items():
            hits = linear_accuracy(train[layer], facts(digits)[name], test[layer], facts(test_digits)[name])
            found.append(bootstrap_rate(hits))
    bench.records["chance"] = chance
    bench.records["read"] = [Curve.of(name, kinds, found) for name, found in read.items()]
    return kinds


def digit_codes(bench: Bench, split: str, count: int, seed: int) -> tuple[Codes, np.ndarray]:
    """Layer -> [count, F] activations at the last position under the question for the sum, and digits [count, 2]."""
    digits = generator(seed, "sum features", split).integers(0, 10, (count, 2))
    images = []
    for i, (first, second) in enumerate(digits.tolist()):
        image = digit_scene(generator(seed, "sum features", split, i), split, first, second).image
        assert image is not None
        images.append(Image.fromarray(image))
    return codes_of(bench, images, DIGIT_QUESTIONS["sum"][0], ("last",))["last"], digits


def facts(digits: np.ndarray) -> dict[str, np.ndarray]:
    """Classes [n] of each fact of digits [n, 2]."""
    first, second = digits.T
    total = first + second
    return {
        "carry": (total >= 10).astype(int),
        "first": first,
        "second": second,
        "sum": total,
        "pair": 10 * first + second,
    }


def scores(train: np.ndarray, digits: np.ndarray, test: np.ndarray, test_digits: np.ndarray) -> dict[str, np.ndarray]:
    """Held-out R^2 [F] of every kind, the simplest first."""
    own, other = facts(digits), facts(test_digits)
    both = additive(train, [own["first"], own["second"]], [other["first"], other["second"]])
    predicted = {kind: both if kind == "both digits" else class_means(train, own[kind], other[kind]) for kind in KINDS}
    return {kind: held_out_r2(test, found) for kind, found in predicted.items()}
