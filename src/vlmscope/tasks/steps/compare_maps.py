"""Maps of features over Orrery's pictures against each other: deletion, insertion, and pointing at objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlmscope.attention.rollout import cell_values, save_maps
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.data.orrery import scenes as facts
from vlmscope.data.orrery.objects import covered_cells, object_mask
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import KINDS as SCENE_KINDS
from vlmscope.data.orrery.scenes import Scene
from vlmscope.features.readouts import image_features, top_and_bottom_logits
from vlmscope.metrics.causal import bootstrap_mean
from vlmscope.metrics.prediction import pointing_hit
from vlmscope.report.figures import dose_response
from vlmscope.report.study_figures import NAMES, feature_maps, pointing_bars
from vlmscope.tasks.maps.curves import CONTRAST, MEASURES, NO_FEATURE, RANDOM, MapCurves, Subject, contrast, map_curves
from vlmscope.tasks.maps.where_maps import KINDS, WhereMaps, where_maps
from vlmscope.tasks.steps.intervene import make_curve, rate_metrics

if TYPE_CHECKING:
    from vlmscope.core.records import FeatureId
    from vlmscope.tasks.steps.bench import Bench

ALL = (*KINDS, NO_FEATURE, CONTRAST)
DRAWN = (*KINDS, CONTRAST, RANDOM)  # in figures
BESIDE = ("rollout", NO_FEATURE, CONTRAST)  # what maps are held against, scene by scene
SHOWN = 2  # features of a kind of scene whose maps are drawn
WHATS = ("activation", "answer")


@dataclass
class SceneResult:
    """One scene: means over the chosen features that are active on it, so that a scene counts once.

    `areas[what][measure][map]`, `curves[measure][map]` and `hits[map]`; `chance` is that of a random cell.
    """

    kind: str
    areas: dict[str, dict[str, dict[str, float]]]
    curves: dict[str, dict[str, np.ndarray]]
    hits: dict[str, float]
    chance: float
    counts: tuple[int, ...]
    n_features: int


@dataclass
class Found:
    """All scenes, the chosen features, and what is drawn."""

    scenes: list[SceneResult] = field(default_factory=list)
    features: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    drawn: dict[str, tuple[dict[str, Any], np.ndarray]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)


def run(bench: Bench) -> None:
    """Leaves `maps.json`, maps and figures, and metrics under where/."""
    where = bench.cfg.where
    where.check()
    unknown = [kind for kind in where.questions if kind not in SCENE_KINDS or kind == "text"]
    if unknown:
        raise UserError(f"where.questions: Orrery has no pictures of kind {unknown[0]!r}; choose planets, digits, ...")
    found = Found()
    for kind, question in where.questions.items():
        _kind(bench, found, kind, question)
    if not found.scenes:
        raise UserError("no chosen feature fires on any test scene; lower where.least_share or raise where.scenes")
    bench.metrics |= summary(found.scenes, bench.cfg.seed)
    bench.metrics["where/maps_kb"] = float(np.mean(found.sizes)) / 1000
    scenes = [{"kind": s.kind, "features": s.n_features, "areas": s.areas, "hits": s.hits} for s in found.scenes]
    write_json(bench.run_dir / "maps.json", {"features": found.features, "scenes": scenes})
    _figures(bench, found)


def _kind(bench: Bench, found: Found, kind: str, question: str) -> None:
    """Choose features on training scenes, and compare their maps on test scenes."""
    where, seed = bench.cfg.where, bench.cfg.seed
    train = [make_scene("train", kind, i, seed) for i in range(where.chosen_on)]
    batch = bench.scope.batch(bench.inputs([_picture(scene) for scene in train], question))
    chosen = image_features(bench.scope, batch, where.features, where.least_share, where.most_tokens, per_layer=1)
    found.features[kind] = []
    for one in chosen:
        top, bottom = top_and_bottom_logits(bench.scope, one.feature, 4)
        numbers = {"strength": one.strength, "fires": one.fires, "tokens": one.tokens}
        words = {"top": [word for word, _ in top], "bottom": [word for word, _ in bottom]}
        found.features[kind].append({"feature": str(one.feature), **numbers, **words})
    features = {one.feature: where.least_active * one.strength for one in chosen}
    group = question_group(question) or ""
    for index in tqdm(range(where.scenes), desc=f"maps of {kind}", unit="scene"):
        scene = make_scene("test", kind, index, seed)
        result = _scene(bench, found, scene, question, group, features)
        if result is not None:
            found.scenes.append(result)


def question_group(question: str) -> str | None:
    """The fact that a question asks for, in the words of Orrery; None for another question."""
    tables = (facts.PLANET_QUESTIONS, facts.DIGIT_QUESTIONS, facts.SHAPE_QUESTIONS, facts.HAND_QUESTIONS)
    return next((group for table in tables for group, asked in table.items() if question in asked), None)


def _picture(scene: Scene) -> Image.Image:
    assert scene.image is not None
    return Image.fromarray(scene.image)


def _scene(
    bench: Bench, found: Found, scene: Scene, question: str, group: str, features: dict[FeatureId, float]
) -> SceneResult | None:
    """All maps of one scene; None where no chosen feature is as active on its soft tokens as `features` asks for."""
    vlm, where = bench.vlm, bench.cfg.where
    assert scene.image is not None
    inputs = vlm.prepare(question, [_picture(scene)])
    batch = bench.scope.batch([inputs])
    here = {one.feature: one.strength for one in image_features(bench.scope, batch, 10**6)}
    active = tuple(feature for feature, least in features.items() if here.get(feature, 0.0) >= max(least, 1e-6))
    if not active:
        return None
    made = where_maps(bench.scope, inputs, active, where, bench.cfg.attribution)
    if scene.kind not in found.drawn:
        first = {str(feature): made.maps[feature] for feature in active[:SHOWN]}
        found.drawn[scene.kind] = (first, scene.image)
    path = bench.run_dir / "maps" / f"{scene.key}.safetensors"
    found.sizes.append(save_maps(path, tokens=[record for records in made.tokens.values() for record in records]))
    whole = made.tokens["rollout"][0]
    uniform = whole.weighted(np.ones(len(whole.class_token)), NO_FEATURE)
    shared = {NO_FEATURE: cell_values(uniform, where.side), CONTRAST: contrast(scene.image, where.side)}
    answer = bench.token(str(scene.facts[group])) if group in scene.facts else None
    subject = Subject(bench.scope, question, scene.image, active, answer)
    maps = {feature: {kind: records[0] for kind, records in made.maps[feature].items()} for feature in active}
    curves = map_curves(subject, maps, where, bench.cfg.seed, shared)
    return _result(scene, active, made, shared, curves, where.side, answer is not None)


def _result(
    scene: Scene,
    active: tuple[FeatureId, ...],
    made: WhereMaps,
    shared: dict[str, np.ndarray],
    curves: dict[str, MapCurves],
    side: int,
    answered: bool,
) -> SceneResult:
    """Means over features."""
    cells = covered_cells(object_mask(scene), side)  # any object: a feature is of no question
    hits = {
        kind: float(np.mean([pointing_hit(cell_values(made.maps[f][kind][0], side), cells) for f in active]))
        for kind in KINDS
    }
    hits |= {kind: pointing_hit(values, cells) for kind, values in shared.items()}
    areas = {
        what: {
            measure: {
                kind: float(np.mean([one.area(f, measure, what == "answer") for f in active]))
                for kind, one in curves.items()
            }
            for measure in MEASURES
        }
        for what in WHATS[: 1 + answered]
    }
    drawn = {
        measure: {kind: np.mean([one.curve(f, measure) for f in active], axis=0) for kind, one in curves.items()}
        for measure in MEASURES
    }
    counts = next(iter(curves.values())).counts
    return SceneResult(scene.kind, areas, drawn, hits, float(cells.mean()), counts, len(active))


def summary(scenes: list[SceneResult], seed: int) -> dict[str, float]:
    """Metrics: areas, their advantage over random orders, pointing; over all scenes and by kind.

    `where/<map>/deletion` (lower is better) and `/insertion` (higher is better) with `_ci_low`, `_ci_high` and
    `_control`, the random order's; `_gain` of each is by how much it is better than the random order of the same
    scene, paired, positive when better, and `_over_<map>` by how much than another map. Intervals are bootstrapped
    over scenes.
    """
    metrics: dict[str, float] = {}
    kinds = dict.fromkeys(scene.kind for scene in scenes)
    for place, group in [("where", scenes), *((f"where/{k}", [s for s in scenes if s.kind == k]) for k in kinds)]:
        metrics[f"{place}/scenes"] = float(len(group))
        for kind in ALL:
            for what in WHATS:
                having = [s for s in group if what in s.areas]
                for measure in MEASURES if having else ():
                    mine = np.array([s.areas[what][measure][kind] for s in having])
                    chance = np.array([s.areas[what][measure][RANDOM] for s in having])
                    name = f"{place}/{kind}/{measure if what == 'activation' else f'answer_{measure}'}"
                    gain = chance - mine if measure == "deletion" else mine - chance
                    metrics |= rate_metrics(name, bootstrap_mean(mine, seed, float(chance.mean())))
                    metrics |= rate_metrics(f"{name}_gain", bootstrap_mean(gain, seed))
                    for other in BESIDE if what == "activation" else ():
                        theirs = np.array([s.areas[what][measure][other] for s in having])
                        gain = theirs - mine if measure == "deletion" else mine - theirs
                        if other != kind:
                            metrics |= rate_metrics(f"{name}_over_{other}", bootstrap_mean(gain, seed))
            hits = bootstrap_mean([s.hits[kind] for s in group], seed, float(np.mean([s.chance for s in group])))
            metrics |= rate_metrics(f"{place}/{kind}/pointing", hits)
    return metrics


def _figures(bench: Bench, found: Found) -> None:
    folder, seed = bench.run_dir / "figures", bench.cfg.seed
    side = bench.cfg.where.side**2
    for measure in MEASURES:
        drawn = []
        for kind in DRAWN:
            runs = np.array([scene.curves[measure][kind] for scene in found.scenes])
            rates = [bootstrap_mean(column, seed) for column in runs.T]
            drawn.append(make_curve(NAMES[kind], found.scenes[0].counts, rates))
        what = "deleted" if measure == "deletion" else "inserted"
        label = "feature's activation (1: untouched)"
        dose_response(drawn, folder / f"{measure}.png", f"cells {what} (of {side})", label, percent=False)
    kinds = list(dict.fromkeys(scene.kind for scene in found.scenes))
    bars = {
        NAMES[name]: [
            bootstrap_mean([s.hits[name] for s in group], seed, float(np.mean([s.chance for s in group])))
            for group in ([s for s in found.scenes if s.kind == kind] for kind in kinds)
        ]
        for name in ALL
    }
    pointing_bars(kinds, bars, folder / "pointing.png")
    for kind, (maps, image) in found.drawn.items():
        feature_maps(maps, [image], folder / f"maps_{kind}.png")
