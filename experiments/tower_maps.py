"""Maps over patches of what an answer rests on: through the tower's features, frozen gates, the gradient, rollout.

Each gives the total effect of a patch on the right answer's logit, against grey, on a grid of 8 x 8 cells. Pointing:
the largest cell lies on what is asked for. Deletion: the answer's mean probability while cells are painted in the
picture's mean colour, the largest first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlmscope.attention import CONTRAST, RANDOM, contrast, ranking, token_maps
from vlmscope.attribution.adjoint import Adjoint, target_readers, total_effects
from vlmscope.attribution.targets import choose_logits
from vlmscope.attribution.vision import vision_path
from vlmscope.core.records import generator
from vlmscope.data.orrery.dataset import covered, object_mask, pictures
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.metrics.rates import bootstrap_mean
from vlmscope.models.boxes import grid_boxes
from vlmscope.replacement import build_replacement

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

TOWER, FROZEN, GRADIENT, ROLLOUT = "tower features", "frozen gates", "gradient", "rollout"


@dataclass
class Settings:
    """`questions`: name -> kind of scene, fact, prompt; `deleted`: numbers of painted cells."""

    questions: dict[str, list[str]]
    test_scenes: int
    deleted: list[int]


def analyse(bench: Bench) -> dict[str, float]:
    """Write maps.parquet and maps_by_question.parquet; metrics `tower/<measure>/<map>`."""
    own, rows, scope = bench.analysis, [], bench.scope
    for question, (kind, group, prompt) in own.questions.items():
        scenes = [make_scene("test", kind, number, bench.cfg.seed + 5) for number in range(own.test_scenes)]
        images = bench.recorded("test", f"{question} test", pictures(scenes))
        for number, (scene, image, inputs) in enumerate(zip(scenes, images, bench.inputs(images, prompt), strict=True)):
            replacement = build_replacement(scope, inputs)
            targets = choose_logits(replacement, 0.01, 1)
            token = int(targets.token_ids[0])
            if scope.vlm.tokenizer.decode([token]).strip() != str(scene.facts[group]):
                continue
            assert replacement.tower is not None
            readers = target_readers(replacement, targets, total=True)
            maps = {FROZEN: vision_path(scope.vlm, inputs), GRADIENT: vision_path(scope.vlm, inputs, "gradient")}
            maps = {name: path.maps(readers, [""])[0].tiles[0].values for name, path in maps.items()}
            effects = total_effects(Adjoint(replacement), targets)[0]
            maps[TOWER] = effects[1 : 1 + len(replacement.tower)].numpy().reshape(maps[FROZEN].shape)
            tokens = token_maps(scope.vlm, inputs, bench.cfg.where)[ROLLOUT][0]
            maps[ROLLOUT] = tokens.weighted(np.ones(int(inputs.is_image.sum())), "").tiles[0].values
            maps[CONTRAST] = contrast(image, len(maps[FROZEN]))
            maps[RANDOM] = generator(bench.cfg.seed, "random map", question, number).random(maps[FROZEN].shape)
            hits = covered(object_mask(scene, group), grid_boxes(*maps[FROZEN].shape))
            for name, grid in maps.items():
                painted = [_painted(image, ranking(grid.ravel(), number)[:count], len(grid)) for count in own.deleted]
                logits = scope.forward(scope.batch(bench.inputs(painted, prompt)))
                left = float(logits.double().softmax(-1)[:, token].mean())
                point = float(hits[int(grid.argmax())])
                rows.append({"question": question, "case": number, "map": name, "pointing": point, "deletion": left})
    table, found, metrics = pd.DataFrame(rows), [], {}
    for measure in ("pointing", "deletion"):
        wide = table.pivot(index=["question", "case"], columns="map", values=measure)
        for name in wide:
            values, towers = wide[name].to_numpy(), wide[TOWER].to_numpy()
            rate, less = bootstrap_mean(values), bootstrap_mean(towers - values)
            metrics |= rate.metrics(f"tower/{measure}/{str(name).replace(' ', '_')}")
            row = {
                "measure": measure,
                "map": name,
                "n": rate.cases,
                "mean": rate.value,
                "low": rate.ci_low,
                "high": rate.ci_high,
            }
            found.append(row | {"tower_less": less.value, "less_low": less.ci_low, "less_high": less.ci_high})
    by_question = table.groupby(["question", "map"], as_index=False)[["pointing", "deletion"]].mean()
    bench.write_table("maps", pd.DataFrame(found))
    bench.write_table("maps_by_question", pd.DataFrame(by_question))
    return metrics


def _painted(image: np.ndarray, cells: np.ndarray, side: int) -> np.ndarray:
    out, size = image.copy(), len(image) // side
    for row, column in zip(*divmod(cells, side), strict=True):
        out[size * row : size * (row + 1), size * column : size * (column + 1)] = image.mean((0, 1)).round()
    return out
