"""Maps of features over Orrery's pictures against each other: deletion, insertion, pointing at objects.

Features are chosen on training scenes, and their maps compared on test scenes. A scene counts once: as the mean over
the chosen features that are active on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from vlmscope import attention
from vlmscope.attention import CONTRAST, KINDS, MEASURES, NO_FEATURE, RANDOM, cell_values
from vlmscope.core.errors import UserError, check_choice
from vlmscope.data.orrery.dataset import covered, object_mask, pictures
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import PICTURED, Scene
from vlmscope.features.readouts import image_features, top_and_bottom_logits
from vlmscope.metrics.prediction import pointing_hit
from vlmscope.metrics.rates import bootstrap_mean
from vlmscope.models.boxes import grid_boxes
from vlmscope.report.pictures import MAP_NAMES, feature_maps

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

COMPARED = ("rollout", NO_FEATURE, CONTRAST)  # maps that each map is compared with, scene by scene
ALL = (*KINDS, NO_FEATURE, CONTRAST)


@dataclass
class Settings:
    """`questions`: kind of scene -> what is asked; scenes, and features (at most one per layer), are of each kind.

    A feature is chosen that fires in `least_share` of the training scenes or more, on `most_tokens` of the soft tokens
    or fewer. It counts on a test scene where its activations on the soft tokens sum to `least_active` of their mean
    over the training scenes or more, since curves are relative to that sum.
    """

    questions: dict[str, str]
    train_scenes: int
    test_scenes: int
    features_per_kind: int
    least_share: float
    most_tokens: float
    least_active: float


def check(cfg: Any) -> None:
    """Refuse settings of maps that make no sense, and kinds of scene without pictures."""
    cfg.where.check()
    for kind in cfg.analysis["questions"]:
        check_choice("analysis.questions", kind, PICTURED)


def analyse(bench: Bench) -> dict[str, float]:
    """Write scenes, curves, maps and features.parquet, maps/ and figures/; metrics `where/...`."""
    parts = [part for kind, question in bench.analysis.questions.items() for part in scenes_of(bench, kind, question)]
    if not parts:
        raise UserError("no feature fires on any test scene; lower analysis.least_share or raise analysis.test_scenes")
    scenes, curves = (pd.concat(tables, keys=range(len(parts)), names=["scene"]).reset_index("scene")
                      for tables in zip(*parts, strict=True))  # fmt: skip
    by_map: Any = scenes.drop(columns=["scene", "kind", "features"]).groupby("map", sort=False)
    for name, table in (("scenes", scenes), ("curves", curves), ("maps", by_map.mean().reset_index())):
        bench.write_table(name, table.replace({"map": MAP_NAMES}))
    bench.write_table("features", pd.DataFrame(bench.records["features"]))
    return summary(scenes, bench.cfg.seed) | {"where/maps_kb": float(scenes.bytes.mean()) / 1000}


def scenes_of(bench: Bench, kind: str, question: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Choose features on training scenes, and measure their maps on each test scene where one is active."""
    own, seed = bench.analysis, bench.cfg.seed
    train = pictures([make_scene("train", kind, i, seed) for i in range(own.train_scenes)])
    batch = bench.scope.batch(bench.inputs(bench.recorded("train", f"{kind} train", train), question))
    chosen = image_features(bench.scope, batch, own.features_per_kind, own.least_share, own.most_tokens, 1)
    for choice in chosen:
        top, bottom = (", ".join(dict(words)) for words in top_and_bottom_logits(bench.scope, choice.feature, 4))
        row = {"kind": kind, **vars(choice), "feature": str(choice.feature), "top words": top, "bottom words": bottom}
        bench.records.setdefault("features", []).append(row)
    least = {choice.feature: max(own.least_active * choice.strength, 1e-6) for choice in chosen}
    measured = []
    for index in tqdm(range(own.test_scenes), desc=f"maps of {kind}", unit="scene"):
        scene = make_scene("test", kind, index, seed)
        (inputs,) = bench.inputs(bench.recorded("test", scene.key, pictures([scene]), "maps"), question)
        batch = bench.scope.batch([inputs])
        strength = {choice.feature: choice.strength for choice in image_features(bench.scope, batch, 10**6)}
        active = tuple(feature for feature, needed in least.items() if strength.get(feature, 0.0) >= needed)
        if active:
            measured.append(compared(bench, scene, question, inputs, active, drawn=not measured))
    return measured


def compared(bench: Bench, scene: Scene, question: str, inputs: Any, active: tuple, drawn: bool) -> Any:
    """All maps of one scene, means over its features: a row for each, and one for each and number of cells."""
    where, side = bench.cfg.where, bench.cfg.where.side
    assert scene.image is not None
    made = attention.where_maps(bench.scope, inputs, active, where, bench.cfg.attribution)
    if drawn:
        first = {str(feature): made.maps[feature] for feature in active[:2]}
        feature_maps(first, [scene.image], bench.run_dir / "figures" / f"maps_{scene.kind}.png")
    tokens = [*made.tokens["rollout"], *made.tokens["similarity"]]
    size = attention.save_maps(bench.run_dir / "maps" / f"{scene.key}.safetensors", tokens=tokens)
    uniform = tokens[0].weighted(np.ones(len(tokens[0].class_token)), NO_FEATURE)
    shared = {NO_FEATURE: cell_values(uniform, side), CONTRAST: attention.contrast(scene.image, side)}
    answer = bench.token(word) if (word := scene.answer_to(question)) else None
    maps = {feature: {kind: records[0] for kind, records in made.maps[feature].items()} for feature in active}
    subject = attention.Subject(bench.scope, question, scene.image, active, answer)
    # Any object counts: a feature is of no question.
    on_object = covered(object_mask(scene), grid_boxes(side, side)).reshape(side, side)
    rows, curves = [], []
    for kind, curve in attention.map_curves(subject, maps, where, bench.cfg.seed, shared).items():
        areas = {what + measure: np.mean([curve.area(f, measure, name) for f in active])
                 for what, name in (("", "activation"), ("answer_", "answer"))
                 for measure in MEASURES if not what or answer is not None}  # fmt: skip
        places = [shared[kind]] if kind in shared else [cell_values(maps[f][kind], side) for f in active if kind in ALL]
        hits = [pointing_hit(place, on_object) for place in places] if places else on_object
        same = {"kind": scene.kind, "map": kind}
        rows.append(same | {"features": len(active), "pointing": np.mean(hits), "bytes": size} | areas)
        heights = {measure: np.mean([curve.curve(f, measure) for f in active], 0) for measure in MEASURES}
        curves += [pd.DataFrame(same | {"cells": curve.counts} | heights)] if kind != NO_FEATURE else []
    return pd.DataFrame(rows), pd.concat(curves)


def summary(scenes: pd.DataFrame, seed: int) -> dict[str, float]:
    """Areas, their advantage over random orders and other maps, and pointing; over all scenes and by kind.

    `where/<map>/deletion` (lower is better) and `/insertion` (higher is better), `_control` being the random order's;
    `_gain` of each is by how much it is better than the random order of the same scene, positive when better, and
    `_over_<map>` by how much than another map. Intervals are bootstrapped over scenes.
    """
    metrics: dict[str, float] = {}
    groups = [("where", scenes), *((f"where/{kind}", group) for kind, group in scenes.groupby("kind", sort=False))]
    measures = [measure for measure in scenes if measure.endswith((*MEASURES, "pointing"))]
    for (place, group), measure in product(groups, measures):
        metrics[f"{place}/scenes"] = float(group.scene.nunique())
        by_map: Any = group.pivot(index="scene", columns="map", values=measure).dropna()
        values = {kind: by_map[kind].to_numpy() for kind in by_map if len(by_map)}
        for kind in ALL if values else ():
            name, sign = f"{place}/{kind}/{measure}", -1 if measure.endswith("deletion") else 1
            metrics |= bootstrap_mean(values[kind], seed, float(values[RANDOM].mean())).metrics(name)
            others = {} if measure == "pointing" else {"gain": RANDOM}
            others |= {f"over_{other}": other for other in COMPARED if other != kind} if measure in MEASURES else {}
            for suffix, other in others.items():
                metrics |= bootstrap_mean(sign * (values[kind] - values[other]), seed).metrics(f"{name}_{suffix}")
    return metrics
