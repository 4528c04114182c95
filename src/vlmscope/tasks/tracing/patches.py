"""What `attribution.patches=true` adds to a trace: maps of the answer's targets over the patches of each picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.attribution.trace import Trace
    from vlmscope.config import AppConfig
    from vlmscope.models.loading import VLM

_DRAWN = 3  # targets


@dataclass(frozen=True)
class Patches:
    """What goes into `graph.json`, and into `metrics.json`."""

    record: dict[str, Any]
    metrics: dict[str, float]


def follow_to_patches(
    cfg: AppConfig, vlm: VLM, traced: Trace, pictures: Sequence[Image.Image], run_dir: Path
) -> Patches:
    """Follow the targets of a trace to the patches; writes `patches.safetensors` and `figures/patches.png`."""
    from vlmscope.attribution.adjoint import target_readers
    from vlmscope.attribution.vision import save_maps, vision_path
    from vlmscope.data.images import for_figures
    from vlmscope.report.graph_figure import patch_maps

    settings, replacement, graph = cfg.attribution, traced.replacement, traced.graph
    readers = target_readers(replacement, traced.targets, total=settings.patch_effect == "total")
    path = vision_path(vlm, replacement.inputs, settings.patch_rule)
    maps = path.maps(readers, graph.logit_tokens, settings.patch_baseline)
    record = {
        "file": "patches.safetensors",
        "effect": settings.patch_effect,
        "baseline": settings.patch_baseline,
        "rule": settings.patch_rule,
        "maps": save_maps(run_dir / "patches.safetensors", maps),
    }
    if cfg.task.figure:
        file, first = run_dir / "figures" / "patches.png", maps[: _DRAWN * len(pictures)]
        patch_maps(first, for_figures(pictures), file, settings.patch_effect)
    answer = maps[: len(pictures)]
    return Patches(
        record,
        {
            "graph/patch_residual": max(found.residual for found in maps),
            "graph/patch_share": sum(found.from_patches for found in answer)
            / (sum(abs(found.from_patches) + sum(map(abs, found.remainder.values())) for found in answer) or 1.0),
        },
    )
