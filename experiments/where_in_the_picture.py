"""Maps of features over Orrery's pictures against each other: deletion, insertion, pointing at objects; the logit lens.

Features are chosen on training scenes, and their maps compared on test scenes. A scene counts once: as the mean over
the chosen features that are active on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from vlmscope.attention import (
    CONTRAST,
    KINDS,
    MEASURES,
    NO_FEATURE,
    RANDOM,
    Subject,
    cell_values,
    contrast,
    map_curves,
    save_maps,
    where_maps,
)
from vlmscope.core.errors import UserError
from vlmscope.core.results import Curve
from vlmscope.data.orrery import scenes as facts
from vlmscope.data.orrery.dataset import covered_cells, object_mask
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import Scene
from vlmscope.features.readouts import image_features, token_lens, top_and_bottom_logits
from vlmscope.metrics.prediction import pointing_hit
from vlmscope.metrics.rates import bootstrap_mean, share_rate
from vlmscope.report.figures import dose_response, rate_bars
from vlmscope.report.marks import write_rows
from vlmscope.report.pictures import MAP_NAMES, feature_maps

if TYPE_CHECKING:
    from vlmscope.analyses.bench import Bench

ALL = (*KINDS, NO_FEATURE, CONTRAST)
COMPARED = ("rollout", NO_FEATURE, CONTRAST)  # maps that each map is compared with, scene by scene
WHATS = ("activation", "answer")


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
        if kind not in facts.KINDS or kind == "text":
            raise UserError(f"analysis.questions: Orrery has no pictures of kind {kind!r}; choose planets, digits, ...")


def analyse(bench: Bench) -> dict[str, float]:
    """Write scenes.parquet, features.parquet, maps/ and figures/; metrics `where/...` and `lens/...`."""
    scenes = [scene for kind, text in bench.analysis.questions.items() for scene in scenes_of(bench, kind, text)]
    if not scenes:
        raise UserError("no feature fires on any test scene; lower analysis.least_share or raise analysis.test_scenes")
    rows = [{"kind": s["kind"], "features": s["features"], "map": m, **s["values"][m]} for s in scenes for m in ALL]
    write_rows(bench.run_dir / "scenes.parquet", rows)
    write_rows(bench.run_dir / "features.parquet", bench.records["features"])
    means: Any = pd.DataFrame(rows).drop(columns=["kind", "features"]).groupby("map", sort=False).mean()
    write_rows(bench.run_dir / "maps.parquet", means.reset_index().to_dict("records"))
    draw(bench, scenes)
    size = float(np.mean([scene["bytes"] for scene in scenes])) / 1000
    return summary(scenes, bench.cfg.seed) | {"where/maps_kb": size} | lens(bench)


def picture(scene: Scene) -> Image.Image:
    """The picture of a scene."""
    assert scene.image is not None
    return Image.fromarray(scene.image)


def asked_fact(question: str) -> str | None:
    """The fact that a question of Orrery asks for; None for another question."""
    tables = (facts.PLANET_QUESTIONS, facts.DIGIT_QUESTIONS, facts.SHAPE_QUESTIONS, facts.HAND_QUESTIONS)
    return next((group for table in tables for group, wordings in table.items() if question in wordings), None)


def scenes_of(bench: Bench, kind: str, question: str) -> list[dict[str, Any]]:
    """Choose features on training scenes, and measure their maps on each test scene where one is active."""
    settings, seed = bench.analysis, bench.cfg.seed
    train = [picture(make_scene("train", kind, i, seed)) for i in range(settings.train_scenes)]
    batch = bench.scope.batch(bench.inputs(train, question))
    limits = settings.features_per_kind, settings.least_share, settings.most_tokens
    chosen = image_features(bench.scope, batch, *limits, per_layer=1)
    for choice in chosen:
        logits = top_and_bottom_logits(bench.scope, choice.feature, 4)
        top, bottom = (", ".join(word for word, _ in words) for words in logits)
        row = {"kind": kind, "feature": str(choice.feature), "strength": choice.strength, "fires": choice.fires}
        row |= {"tokens": choice.tokens, "top words": top, "bottom words": bottom}
        bench.records.setdefault("features", []).append(row)
    least = {choice.feature: max(settings.least_active * choice.strength, 1e-6) for choice in chosen}
    measured = []
    for index in tqdm(range(settings.test_scenes), desc=f"maps of {kind}", unit="scene"):
        scene = make_scene("test", kind, index, seed)
        inputs = bench.vlm.prepare(question, [picture(scene)])
        every = image_features(bench.scope, bench.scope.batch([inputs]), 10**6)
        strength = {choice.feature: choice.strength for choice in every}
        active = tuple(feature for feature, needed in least.items() if strength.get(feature, 0.0) >= needed)
        if active:
            measured.append(compared(bench, scene, question, inputs, active, drawn=not measured))
    return measured


def compared(bench: Bench, scene: Scene, question: str, inputs: Any, active: tuple, drawn: bool) -> dict[str, Any]:
    """All maps of one scene: `values[map]["activation_deletion", ..., "pointing"]`, `curves[measure][map]`."""
    where, side, fact = bench.cfg.where, bench.cfg.where.side, asked_fact(question)
    assert scene.image is not None
    made = where_maps(bench.scope, inputs, active, where, bench.cfg.attribution)
    if drawn:
        first = {str(feature): made.maps[feature] for feature in active[:2]}
        feature_maps(first, [scene.image], bench.run_dir / "figures" / f"maps_{scene.kind}.png")
    path = bench.run_dir / "maps" / f"{scene.key}.safetensors"
    size = save_maps(path, tokens=[record for records in made.tokens.values() for record in records])
    whole = made.tokens["rollout"][0]
    uniform = whole.weighted(np.ones(len(whole.class_token)), NO_FEATURE)
    shared = {NO_FEATURE: cell_values(uniform, side), CONTRAST: contrast(scene.image, side)}
    answer = bench.token(str(scene.facts[fact])) if fact in scene.facts else None
    maps = {feature: {kind: records[0] for kind, records in made.maps[feature].items()} for feature in active}
    subject = Subject(bench.scope, question, scene.image, active, answer)
    curves = map_curves(subject, maps, where, bench.cfg.seed, shared)
    cells = covered_cells(object_mask(scene), side)  # any object: a feature is of no question
    values: dict[str, dict[str, float]] = {
        kind: {
            f"{what}_{measure}": float(np.mean([curve.area(f, measure, what) for f in active]))
            for what in WHATS[: 1 + (answer is not None)]
            for measure in MEASURES
        }
        for kind, curve in curves.items()
    }
    for kind in ALL:
        places = [shared[kind]] if kind in shared else [cell_values(maps[f][kind], side) for f in active]
        values[kind]["pointing"] = float(np.mean([pointing_hit(place, cells) for place in places]))
    values[RANDOM]["pointing"] = float(cells.mean())
    means = {m: {kind: np.mean([c.curve(f, m) for f in active], 0) for kind, c in curves.items()} for m in MEASURES}
    counts = next(iter(curves.values())).counts
    return {
        "kind": scene.kind,
        "features": len(active),
        "values": values,
        "curves": means,
        "counts": counts,
        "bytes": size,
    }


def column(scenes: list[dict[str, Any]], kind: str, measure: str) -> np.ndarray:
    """[scenes], a measure of one map."""
    return np.array([scene["values"][kind][measure] for scene in scenes])


def summary(scenes: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """Areas, their advantage over random orders and other maps, and pointing; over all scenes and by kind.

    `where/<map>/deletion` (lower is better) and `/insertion` (higher is better), `_control` being the random order's;
    `_gain` of each is by how much it is better than the random order of the same scene, positive when better, and
    `_over_<map>` by how much than another map. Intervals are bootstrapped over scenes.
    """
    metrics: dict[str, float] = {}
    kinds = dict.fromkeys(scene["kind"] for scene in scenes)
    for place, group in [("where", scenes), *((f"where/{k}", [s for s in scenes if s["kind"] == k]) for k in kinds)]:
        metrics[f"{place}/scenes"] = float(len(group))
        for kind in ALL:
            for what, measure in ((what, measure) for what in WHATS for measure in MEASURES):
                having, key = [s for s in group if f"{what}_{measure}" in s["values"][kind]], f"{what}_{measure}"
                if not having:
                    continue
                mine, sign = column(having, kind, key), -1 if measure == "deletion" else 1
                name = f"{place}/{kind}/{measure if what == 'activation' else key}"
                chance = column(having, RANDOM, key)
                metrics |= bootstrap_mean(mine, seed, float(chance.mean())).metrics(name)
                metrics |= bootstrap_mean(sign * (mine - chance), seed).metrics(f"{name}_gain")
                for other in COMPARED if what == "activation" else ():
                    if other != kind:
                        gain = sign * (mine - column(having, other, key))
                        metrics |= bootstrap_mean(gain, seed).metrics(f"{name}_over_{other}")
            metrics |= pointing(group, kind, seed).metrics(f"{place}/{kind}/pointing")
    return metrics


def pointing(scenes: list[dict[str, Any]], kind: str, seed: int) -> Any:
    """How often the peak of a map lies on an object; `control` is the chance of a random cell."""
    chance = float(np.mean(column(scenes, RANDOM, "pointing")))
    return bootstrap_mean(column(scenes, kind, "pointing"), seed, chance)


def draw(bench: Bench, scenes: list[dict[str, Any]]) -> None:
    """figures/deletion.png, insertion.png and pointing.png."""
    folder, seed, side = bench.run_dir / "figures", bench.cfg.seed, bench.cfg.where.side
    for measure in MEASURES:
        curves = []
        for kind in (*KINDS, CONTRAST, RANDOM):
            runs = np.array([scene["curves"][measure][kind] for scene in scenes])
            curves.append(
                Curve.of(MAP_NAMES[kind], scenes[0]["counts"], [bootstrap_mean(cells, seed) for cells in runs.T])
            )
        x = f"cells {'deleted' if measure == 'deletion' else 'inserted'} (of {side**2})"
        dose_response(curves, folder / f"{measure}.png", x, "feature's activation (1: untouched)", percent=False)
    groups = {kind: [s for s in scenes if s["kind"] == kind] for kind in dict.fromkeys(s["kind"] for s in scenes)}
    bars = {MAP_NAMES[name]: [pointing(group, name, seed) for group in groups.values()] for name in ALL}
    ylabel = "peak on the object (% of features and scenes)"
    rate_bars(list(groups), bars, folder / "pointing.png", "Where the peak of a map lies", ylabel, "a random cell")


def lens(bench: Bench) -> dict[str, float]:
    """figures/lens.png: how early the right word appears on the soft tokens and at the last position.

    `lens/<kind>/state_<n>/any_soft`: share of scenes in which the right word is the most probable one at some soft
    token of state n (0: before the first layer), `/last` at the last position; control: another scene's word.
    """
    metrics, curves, seed = {}, [], bench.cfg.seed
    for kind, question in bench.analysis.questions.items():
        fact, count = asked_fact(question), bench.analysis.train_scenes
        scenes = [make_scene("test", kind, index, seed) for index in range(count)]
        if fact is None or fact not in scenes[0].facts:
            continue
        answers = [bench.token(str(scene.facts[fact])) for scene in scenes]
        batch = bench.scope.batch(bench.inputs([picture(scene) for scene in scenes], question))
        positions = np.append(np.flatnonzero(batch.is_image), batch.length - 1)
        # The word of the next scene that has another one, so that a word given to every picture does not count.
        others = [next((b for b in answers[i:] + answers[:i] if b != a), a) for i, a in enumerate(answers)]
        ranks = [token_lens(bench.vlm.adapter, batch, positions, words).rank for words in (answers, others)]
        soft, control = ((rank[..., :-1] == 0).any(2) for rank in ranks)
        for state in range(soft.shape[1]):
            rate = share_rate(soft[:, state], seed, float(control[:, state].mean()))
            metrics |= rate.metrics(f"lens/{kind}/state_{state:02d}/any_soft")
            metrics[f"lens/{kind}/state_{state:02d}/last"] = float((ranks[0][:, state, -1] == 0).mean())
        rates = [share_rate(column, seed) for column in soft.T]
        curves.append(Curve.of(f"{kind}, some soft token", range(len(rates)), rates))
    if curves:
        path = bench.run_dir / "figures" / "lens.png"
        dose_response(curves, path, "state (0: before layer 0)", "right word on top (% of scenes)")
    return metrics
