"""Is there a number line? Features whose activation depends on how many shapes there are, on scenes not used to choose.

Training scenes say which features depend on the count and what shape their tuning curve has. Held-out scenes say
whether the shape holds, how the activation correlates with the count, and what of that is left when the painted area is
held fixed. A linear readout is fitted to scenes of one shape (or colour) and tested on the others. The features of one
kind of curve are carried alone, and features chosen on pairs of one shape (or colour) on pairs of each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from vlmscope.circuits.operations import Carry
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Curve, Rate
from vlmscope.core.records import FeatureId, generator
from vlmscope.data.orrery.objects import painted_mask
from vlmscope.data.orrery.scenes import NUMBERS, SHAPE_QUESTIONS, SHAPES
from vlmscope.data.orrery.shapes import counted_scenes
from vlmscope.interventions.trials import Setting, Trial
from vlmscope.metrics import decoding
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.metrics.decoding import DOWN, PEAK, UP
from vlmscope.report import figures
from vlmscope.tasks.steps.scene_codes import PLACES, Codes, codes_of

COUNTS = (1, 2, 3, 4, 5, 6)
COLUMNS = (UP, DOWN, *(f"{PEAK} {count}" for count in COUNTS[1:-1]))
ROOM = 3  # the dose is judged on originals of at most so many shapes, of the six that training showed


def check(cfg: Any) -> None:
    """Refuse other pairs, and too few scenes to show every number on every shape."""
    if cfg.pairs is None or cfg.pairs.change != "count":
        raise UserError("counting needs pairs=count; experiment=interchange takes any pairs")
    if min(cfg.interchange.scenes) < len(COUNTS) * len(SHAPES):
        raise UserError(
            f"interchange.scenes={cfg.interchange.scenes}: give at least 30 training and 30 held-out scenes"
        )


def trials(bench: Any, declared: Any) -> Iterator[Trial]:
    """Carry features of one kind of tuning curve, and those chosen on pairs of one shape or colour on pairs of each."""
    main, matched, stays = bench.cfg.settings["main"], declared.pairs.matched(), declared.cases["stays"]
    here = Setting("kind", matched=main.matched, random_direction=main.random_direction)
    names = number_line(bench)
    for kind in (UP, DOWN, PEAK):
        found = {i: np.flatnonzero([name.split(" ")[0] == kind for name in of]) for i, of in names.items()}
        carry = Carry({layer: torch.from_numpy(features) for layer, features in found.items() if len(features)})
        for setting, cases in ((here, declared.cases["test"]), (Setting("kind_stays", matched=main.matched), stays)):
            if carry.features:
                yield Trial(f"kind/{kind}", carry, cases, [setting], matched)
    for cases in stays:
        yield from declared.pairs.transfer("count", cases.question, bench.cfg.interchange.transfer)


def analyse(bench: Any) -> dict[str, float]:
    """What a dose adds to the number said, and what features generalise over: dose/ and transfer/ metrics, figures."""
    table: Any = pd.read_parquet(bench.run_dir / "trials.parquet")
    found, lines, folder = {}, {}, bench.run_dir / "figures"
    number = {bench.token(word): value for value, word in enumerate(NUMBERS)}
    dose = table[(table.setting == "dose") & (table.answer.map(number) <= ROOM)]
    dose = dose.assign(shift=dose.said.map(number) - dose.answer.map(number))  # NaN where no number is said
    for (strength, control), part in dose.groupby(["strength", "control"]):
        lines.setdefault(control or "the count", []).append(bootstrap_mean(part["shift"].dropna().to_numpy()))
        key = f"dose/count/strength_{strength:g}"
        found[f"{key}/shift{'_control' * bool(control)}"] = float(part["shift"].mean())
        if not control:
            found |= {f"{key}/plus_{by}": float((part["shift"] == by).mean()) for by in range(4)}
    drawn = [Curve.of(name, sorted(dose.strength.unique()), rates) for name, rates in lines.items()]
    words = ("dose (1 = the counterfactual's activations)", "number said minus number before")
    figures.dose_response(drawn, folder / "dose.png", *words, percent=False)
    moved = table[table.operation.str.startswith("over_")]
    for fact, part in moved.groupby(moved.operation.str.partition("/")[0]):
        for (which, control), rows in part.groupby(["setting", "control"]):
            # A pair that several other values' features were carried to is one case.
            means = rows.groupby(["cases", "case"], sort=False)[["recovered", "hit"]].mean().mean()
            key, tail = f"transfer/count/{fact}/{which}", "_control" * bool(control)
            found |= {f"{key}/recovered{tail}": means["recovered"], f"{key}/follow_rate{tail}": means["hit"]}
        cells = part[part.control == ""].pivot_table("recovered", "operation", "cases")
        words = ("recovered share", "tested on pairs of", "chosen on pairs of")
        figures.layer_role_heatmap(cells.to_numpy(), list(cells.index), list(cells), folder / f"{fact}.png", *words)
    return found


def number_line(bench: Any) -> dict[int, np.ndarray]:
    """Layer -> [F] kinds of tuning curve at the last position; numbers/ metrics, number_line.json and figures."""
    seed, prompt, folder = bench.cfg.pairs.seed, SHAPE_QUESTIONS["count"][0], bench.run_dir / "figures"
    sizes = zip(("train", "test"), bench.cfg.interchange.scenes, strict=True)
    drawn = [counted_scenes(split, size, seed) for split, size in sizes]
    codes, held_out = (codes_of(bench, [Image.fromarray(one) for one in pixels], prompt) for pixels, _ in drawn)
    seen, unseen = (pd.DataFrame(facts, columns=["count", "shape", "colour"]) for _, facts in drawn)
    area = np.array([painted_mask(one).sum() for one in drawn[1][0]])
    record, named, y = {}, {}, seen["count"].to_numpy()
    for place in PLACES:
        names, strength = decoding.tuned(codes[place], y)
        chance, _ = decoding.tuned(codes[place], generator(seed, "shuffled counts").permutation(y))
        kinds = np.array([[int((of == column).sum()) for column in COLUMNS] for of in names.values()])
        total = kinds.sum(0).tolist()
        found = {"up/features": total[0], "down/features": total[1], "peak/features": sum(total[2:])}
        found["by_chance"] = sum(int((of != "").sum()) for of in chance.values())
        holds = decoding.held_out_tuning(names, held_out[place], unseen["count"].to_numpy(), area)
        found |= {name: rate.value for name, rate in holds.items()}
        bench.metrics |= {f"numbers/{place}/{name}": float(value) for name, value in found.items()}
        read = readouts(codes[place], seen, held_out[place], unseen, seed)
        features = {c: [f"L{i}/{f}" for i, of in names.items() for f in np.flatnonzero(of == c)] for c in COLUMNS}
        record[place] = {"features": features, **json.loads(json.dumps({"holds": holds, **read}, default=vars))}
        words = ("features", "shape of the tuning curve")
        figures.layer_role_heatmap(kinds, list(names), COLUMNS, folder / f"kinds_{place}.png", *words)
        lines = tuning_lines(names, strength, held_out[place], unseen["count"].to_numpy())
        words = ("shapes in the picture (number)", "activation (share of its highest mean)")
        figures.dose_response(lines, folder / f"tuning_{place}.png", *words, percent=False)
        lines = [Curve.of(name, names, rates) for name, rates in read.items()]
        figures.dose_response(lines, folder / f"read_{place}.png", "layer", "held-out accuracy of the count (%)")
        named[place] = names
    write_json(bench.run_dir / "number_line.json", record)
    return named["last"]


def tuning_lines(names: dict, strength: dict, codes: Codes, counts: np.ndarray) -> list[Curve]:
    """Held-out tuning curves, in shares of their highest mean, of each kind's feature most tied to the count."""
    lines = []
    for column in COLUMNS:
        rows = [(strength[i][f], i, f) for i, of in names.items() for f in np.flatnonzero(of == column).tolist()]
        if rows:
            _, layer, f = max(rows)
            values = [codes[layer][counts == count, f] for count in COUNTS]
            top = max(of.mean() for of in values) or 1.0
            rates = [bootstrap_mean(of / top) for of in values]
            lines.append(Curve.of(f"{column}: {FeatureId(layer, f)}", COUNTS, rates))
    return lines


def readouts(train: Codes, seen: Any, test: Codes, unseen: Any, seed: int) -> dict[str, list[Rate]]:
    """Held-out accuracy of the count by layer, fitted to one shape or colour, tested on the same and on the others."""
    y, count = seen["count"].to_numpy(), unseen["count"].to_numpy()
    shuffled = y[generator(seed, "shuffled counts", "read").permutation(len(y))]
    found: dict[str, list[Rate]] = {}
    for layer, x in train.items():
        hits = {"shuffled counts": decoding.linear_accuracy(x, shuffled, test[layer], count)}
        for fact in ("shape", "colour"):
            of, other = seen[fact].to_numpy(), unseen[fact].to_numpy()
            both = decoding.accuracy_across(x, y, of, test[layer], count, other)
            hits |= dict(zip((f"same {fact}", f"another {fact}"), both, strict=True))
        for name, one in hits.items():
            found.setdefault(name, []).append(bootstrap_rate(one))
    return found
