"""Where in a picture features look: attention rollout, attribution to patches, and their activation."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from scipy.stats import rankdata

from vlmscope.attention import MEASURES, Subject, WhereMaps, cell_values, map_curves, save_maps, where_maps
from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, user_pictures
from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError, check_least
from vlmscope.core.records import FeatureId
from vlmscope.data.images import for_figures
from vlmscope.features.readouts import image_features
from vlmscope.report.pictures import feature_maps
from vlmscope.tasks.settings import RunContext, WhereSettings

_DRAWN = 30  # features in the figure, a row a picture
_SIDE = 16  # rows and columns of the grid on which maps are compared


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Map features of `prompt=` over the patches of `image=`."""
    task: WhereSettings = cfg.task
    if cfg.prompt is None:
        raise UserError("no prompt: add 'prompt=what is this ?'")
    check_least("task", task, top=1)
    cfg.where.check()
    cfg.attribution.check()
    features = list(dict.fromkeys(FeatureId.parse(text) for text in task.features))
    pictures = user_pictures(cfg)
    if not pictures:
        raise UserError("task=where maps features over a picture; add image=path/to/picture.png")
    if task.curves and len(pictures) != 1:
        raise UserError(
            f"task.curves=true needs one picture, and {len(pictures)} were given; give one, or leave it out"
        )
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    scope = load_scope(cfg, vlm, context.overrides)
    features = features or [active.feature for active in image_features(scope, scope.batch([inputs]), task.top)]
    if not features:
        raise UserError("no feature is active on the soft tokens of this prompt; choose other transcoders")
    started = time.perf_counter()
    where = where_maps(scope, inputs, features, cfg.where, cfg.attribution)
    metrics = {"where/seconds": time.perf_counter() - started}
    listed = [(f, kind, picture_map) for f in features for kind, maps in where.maps[f].items() for picture_map in maps]
    tokens = [record for records in where.tokens.values() for record in records]
    size = save_maps(context.run_dir / "maps.safetensors", [picture_map for *_, picture_map in listed], tokens)
    metrics["where/maps_kb"] = size / 1000
    described = {}
    for feature in features:
        name = f"where/{str(feature).replace('/', '_')}"
        described[str(feature)] = record = _described(where, feature, inputs.is_image)
        metrics |= {f"{name}/{key}": value for key, value in record["metrics"].items()}
        if task.curves:
            subject = Subject(scope, cfg.prompt, np.asarray(pictures[0]), (feature,))
            maps = {kind: records[0] for kind, records in where.maps[feature].items()}
            for kind, curves in map_curves(subject, {feature: maps}, cfg.where, cfg.seed).items():
                metrics |= {f"{name}/{kind}/{measure}": curves.area(feature, measure) for measure in MEASURES}
    order = [
        {"feature": str(feature), "kind": kind, "picture": picture_map.picture} for feature, kind, picture_map in listed
    ]
    record = {"prompt": cfg.prompt, "maps": "maps.safetensors", "features": described, "order": order}
    write_json(context.run_dir / "where.json", record)
    if task.figure:
        if len(features) > _DRAWN:
            print(f"figures/where.png has the first {_DRAWN} of {len(features)} features; where.json has all")
        drawn = {str(feature): where.maps[feature] for feature in features[:_DRAWN]}
        feature_maps(drawn, for_figures(pictures), context.run_dir / "figures" / "where.png")
    return metrics


def _described(where: WhereMaps, feature: FeatureId, is_image: np.ndarray) -> dict[str, Any]:
    """The entry of a feature in where.json: peaks of its maps and how far they agree; prints a line."""
    values, maps = where.activations[feature], where.maps[feature]
    grids = {kind: np.concatenate([cell_values(m, _SIDE).ravel() for m in records]) for kind, records in maps.items()}
    metrics = {
        "activation": float(values[is_image].sum()),
        "soft_tokens": float((values[is_image] > 0).sum()),
        "path_residual": max(picture_map.residual for picture_map in maps["vision_path"]),
    }
    for kind in ("rollout", "similarity", "activation"):
        metrics[f"{kind}_vs_vision_path"] = _correlation(grids[kind], grids["vision_path"])
    peaks: dict[str, Any] = {}
    for kind, records in maps.items():
        tiles = [(picture_map.picture, tile) for picture_map in records for tile in picture_map.tiles]
        picture, tile = max(tiles, key=lambda pair: float(pair[1].values.max()))
        peaks[kind] = {"picture": picture, "box": list(tile.boxes[int(tile.values.argmax())])}
    active = {int(position): float(values[position]) for position in np.flatnonzero(values)}
    shown = ", ".join(f"{kind} ({p['box'][0]:.2f}, {p['box'][1]:.2f})" for kind, p in peaks.items())
    print(f"  {feature}: on {metrics['soft_tokens']:.0f} soft tokens; peaks at (left, top): {shown}")
    return {"metrics": metrics, "peaks": peaks, "activations": active}


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where a map is flat."""
    a, b = rankdata(first), rankdata(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float((a @ a) * (b @ b)) ** 0.5
    return float(a @ b) / scale if scale else 0.0
