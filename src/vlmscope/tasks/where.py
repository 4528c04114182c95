"""Where in a picture features look: attention rollout, attribution to patches and own activation, side by side."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from vlmscope.config import AppConfig
    from vlmscope.core.records import FeatureId
    from vlmscope.scope import Scope
    from vlmscope.tasks.maps.where_maps import WhereMaps
    from vlmscope.tasks.registry import RunContext

DRAWN = 30  # features in the figure, a row a picture

USES = ("attribution", "where")


@dataclass
class Config:
    """`features` are ids such as [L5/123,L6/7]; when none is named, the `top` strongest ones on the soft tokens.

    `figure` draws the maps over the picture. With `curves` each map is tested by deletion and insertion on this picture
    (docs/where.md).
    """

    features: list[str] = field(default_factory=list)
    top: int = 3
    figure: bool = True
    curves: bool = False


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Map features of `prompt=` over the patches of `image=`."""
    import time

    from vlmscope.attention.rollout import save_maps
    from vlmscope.core.artifacts import write_json
    from vlmscope.core.errors import UserError
    from vlmscope.core.records import FeatureId
    from vlmscope.data.images import for_figures
    from vlmscope.report.study_figures import feature_maps
    from vlmscope.tasks.maps.where_maps import where_maps
    from vlmscope.tasks.wiring import load_model, load_scope, user_pictures

    if cfg.prompt is None:
        raise UserError("no prompt: add 'prompt=what is this ?'")
    if cfg.task.top < 1:
        raise UserError(f"task.top={cfg.task.top}: it must be at least 1")
    cfg.where.check()
    cfg.attribution.check()
    named = list(dict.fromkeys(FeatureId.parse(text) for text in cfg.task.features))
    pictures = user_pictures(cfg)
    if not pictures:
        raise UserError("task=where maps features over a picture; add image=path/to/picture.png")
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    scope = load_scope(cfg, vlm, context.overrides)
    features = named or _strongest(scope, inputs, cfg.task.top)
    started = time.perf_counter()
    found = where_maps(scope, inputs, features, cfg.where, cfg.attribution)
    metrics = {"where/seconds": time.perf_counter() - started}
    named_maps = [
        (feature, kind, one) for feature in features for kind, maps in found.maps[feature].items() for one in maps
    ]
    size = save_maps(
        context.run_dir / "maps.safetensors",
        [one for _, _, one in named_maps],
        [record for records in found.tokens.values() for record in records],
    )
    metrics["where/maps_kb"] = size / 1000
    record: dict[str, Any] = {"prompt": cfg.prompt, "maps": "maps.safetensors", "features": {}}
    record["order"] = [
        {"feature": str(feature), "kind": kind, "picture": one.picture} for feature, kind, one in named_maps
    ]
    for feature in features:
        described = _described(found, feature, inputs.is_image)
        record["features"][str(feature)] = described
        name = str(feature).replace("/", "_")
        metrics |= {f"where/{name}/{key}": value for key, value in described["metrics"].items()}
        if cfg.task.curves:
            metrics |= _curves(cfg, scope, found, feature, pictures)
    write_json(context.run_dir / "where.json", record)
    if cfg.task.figure:
        if len(features) > DRAWN:
            print(f"figures/where.png has the first {DRAWN} of {len(features)} features; where.json has all")
        drawn = {str(feature): found.maps[feature] for feature in features[:DRAWN]}
        feature_maps(drawn, for_figures(pictures), context.run_dir / "figures" / "where.png")
    return metrics


def _strongest(scope: "Scope", inputs: Any, top: int) -> "list[FeatureId]":
    from vlmscope.core.errors import UserError
    from vlmscope.features.readouts import image_features

    found = image_features(scope, scope.batch([inputs]), top)
    if not found:
        raise UserError("no feature is active on the soft tokens of this prompt; choose other transcoders")
    return [one.feature for one in found]


def _described(found: "WhereMaps", feature: "FeatureId", is_image: "np.ndarray") -> dict[str, Any]:
    """Where each map has its peak, and how far the maps agree; printed too."""
    import numpy as np

    from vlmscope.attention.rollout import cell_values

    values = found.activations[feature]
    maps = found.maps[feature]
    grids = {kind: np.concatenate([cell_values(one, 16).ravel() for one in records]) for kind, records in maps.items()}
    metrics = {
        "activation": float(values[is_image].sum()),
        "soft_tokens": float((values[is_image] > 0).sum()),
        "path_residual": max(one.residual for one in maps["vision_path"]),
    }
    for kind in ("rollout", "similarity", "activation"):
        metrics[f"{kind}_vs_vision_path"] = _correlation(grids[kind], grids["vision_path"])
    peaks: dict[str, Any] = {}
    for kind, records in maps.items():
        best = max(records, key=lambda one: max(float(tile.values.max()) for tile in one.tiles))
        tile = max(best.tiles, key=lambda one: float(one.values.max()))
        peaks[kind] = {"picture": best.picture, "box": list(tile.boxes[int(tile.values.argmax())])}
    active = {int(at): float(values[at]) for at in np.flatnonzero(values)}
    shown = ", ".join(f"{kind} ({p['box'][0]:.2f}, {p['box'][1]:.2f})" for kind, p in peaks.items())
    print(f"  {feature}: on {metrics['soft_tokens']:.0f} soft tokens; peaks at (left, top): {shown}")
    return {"metrics": metrics, "peaks": peaks, "activations": active}


def _correlation(first: "np.ndarray", second: "np.ndarray") -> float:
    """Spearman's rank correlation; 0 where a map is flat."""
    from scipy.stats import rankdata

    a, b = rankdata(first), rankdata(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float((a @ a) * (b @ b)) ** 0.5
    return float(a @ b) / scale if scale else 0.0


def _curves(
    cfg: "AppConfig", scope: "Scope", found: "WhereMaps", feature: "FeatureId", pictures: list[Any]
) -> dict[str, float]:
    """Deletion and insertion on the one picture of the prompt, with as many random orders as `where.draws` says."""
    import numpy as np

    from vlmscope.core.errors import UserError
    from vlmscope.tasks.maps.curves import MEASURES, Subject, map_curves

    if len(pictures) != 1:
        raise UserError(
            f"task.curves=true needs one picture, and {len(pictures)} were given; give one, or leave it out"
        )
    subject = Subject(scope, str(cfg.prompt), np.asarray(pictures[0]), (feature,))
    maps = {kind: records[0] for kind, records in found.maps[feature].items()}
    measured = map_curves(subject, {feature: maps}, cfg.where, cfg.seed)
    name = str(feature).replace("/", "_")
    return {
        f"where/{name}/{kind}/{measure}": curves.area(feature, measure)
        for kind, curves in measured.items()
        for measure in MEASURES
    }
