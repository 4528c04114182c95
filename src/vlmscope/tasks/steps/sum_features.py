"""Are there features for sums, carries, digits or pairs of digits? Told by held-out scenes, then by interchange.

Each feature's activation at the last position, under the question for the sum, is predicted from the digits by models
of growing size: carry (2 levels), first digit, second digit (10), the sum (19), a term for each digit (20) and a level
for each pair of digits (100). A feature is of the simplest kind that comes near the best on scenes it was not fitted
to. The same with digits shuffled among training scenes says how many features would be found by chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlmscope.circuits.interchange import interchange_plan
from vlmscope.core.artifacts import write_json
from vlmscope.core.intervention import Curve
from vlmscope.core.records import generator
from vlmscope.data.orrery.digits import digit_scene
from vlmscope.data.orrery.scenes import DIGIT_QUESTIONS
from vlmscope.metrics.causal import bootstrap_rate
from vlmscope.metrics.decoding import additive, class_means, held_out_r2, linear_accuracy, simplest
from vlmscope.tasks.steps.interchange import InterchangeRow, PairCase, interchange_metrics, one_row
from vlmscope.tasks.steps.intervene import make_curve
from vlmscope.tasks.steps.scene_codes import Codes, codes_of

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

KINDS = ("carry", "first", "second", "sum", "both digits", "pair")
LEAST = 0.3  # held-out R^2 from which a feature says something of the digits


def run(bench: Bench) -> None:
    """Leaves kinds by layer, accuracies by layer and interchange rows in `bench.records`; metrics under sums/."""
    seed = 0 if bench.cfg.pairs is None else bench.cfg.pairs.seed
    n_train, n_test = bench.cfg.interchange.scenes
    train, digits = digit_codes(bench, "train", n_train, seed)
    test, test_digits = digit_codes(bench, "test", n_test, seed)
    shuffled = generator(seed, "shuffled digits").permutation(digits)
    kinds: dict[int, np.ndarray] = {}
    chance = 0
    tables: list[Curve] = []
    read: dict[str, list] = {name: [] for name in ("first", "second", "sum", "carry")}
    for layer in bench.transcoders.layers:
        kinds[layer] = simplest(scores(train[layer], digits, test[layer], test_digits), LEAST)
        false = simplest(scores(train[layer], shuffled, test[layer], test_digits), LEAST)
        chance += int((false != "").sum())
        for name, found in read.items():
            hits = linear_accuracy(train[layer], facts(digits)[name], test[layer], facts(test_digits)[name])
            found.append(bootstrap_rate(hits))
            bench.metrics[f"sums/read/{name}/layer_{layer:02d}/accuracy"] = found[-1].value
    x = [float(layer) for layer in bench.transcoders.layers]
    tables = [make_curve(name, x, found) for name, found in read.items()]
    counts = np.array([[int((kinds[layer] == kind).sum()) for kind in KINDS] for layer in bench.transcoders.layers])
    for column, kind in enumerate(KINDS):
        bench.metrics[f"sums/features/{kind.replace(' ', '_')}"] = float(counts[:, column].sum())
    bench.metrics["sums/features/by_chance"] = float(chance)
    rows = kind_rows(bench, kinds)
    bench.metrics |= interchange_metrics(rows)
    named = {kind: [f"L{i}/{f}" for i, k in kinds.items() for f in np.flatnonzero(k == kind)] for kind in KINDS}
    write_json(bench.run_dir / "sum_features.json", {"least_r2": LEAST, "features": named})
    bench.records["sum_features"] = {"counts": counts, "curves": tables, "rows": rows, "chance": chance}


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


def kind_rows(bench: Bench, kinds: dict[int, np.ndarray]) -> list[InterchangeRow]:
    """Carry only the features of one kind over, on every question, where the pairs are of digits."""
    if "interchange" not in bench.records or "sum" not in bench.record("interchange")["cases"]:
        return []
    record = bench.record("interchange")
    cases: dict[str, PairCase] = record["cases"]
    groups = {
        "sum and carry kind": ("sum", "carry"),
        "pair kind": ("pair",),
        "digit kind": ("first", "second", "both digits"),
    }
    rows = []
    for label, names in groups.items():
        features = {layer: torch.from_numpy(np.flatnonzero(np.isin(kind, names))) for layer, kind in kinds.items()}
        features = {layer: found for layer, found in features.items() if len(found)}
        for case in cases.values() if features else ():
            plan = interchange_plan(bench.scope, case.subject, features)
            rows.append(one_row(bench, case.subject, label, plan, "all", "free", record["means"]))
    return rows
