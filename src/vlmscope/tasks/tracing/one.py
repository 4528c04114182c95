"""One traced prompt as files in a folder; `task=trace` does it once or, of a file of rows, often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.config import AppConfig
    from vlmscope.models.base import ModelInputs
    from vlmscope.scope import Scope


def trace_into(
    folder: Path,
    cfg: AppConfig,
    scope: Scope,
    inputs: ModelInputs,
    pictures: Sequence[Image.Image],
    name: str | None = None,
) -> dict[str, float]:
    """Trace, and write what `task=trace` writes into a folder.

    Args:
        folder: where to.
        cfg: the run's configuration: `attribution` and `task` count.
        scope: the model and its transcoders.
        inputs: the prompt with its pictures.
        pictures: for the figures.
        name: of the graph in `graph.json`; the folder's by default.

    Returns:
        Metrics.
    """
    from vlmscope.attribution.export import save_graph, write_graph_json
    from vlmscope.attribution.influence import reaches_image
    from vlmscope.attribution.trace import trace
    from vlmscope.data.images import for_figures
    from vlmscope.report.graph_figure import attribution_graph
    from vlmscope.tasks.label import feature_labels
    from vlmscope.tasks.tracing.details import print_ends, write_heads, write_scores
    from vlmscope.tasks.tracing.graph_metrics import graph_metrics
    from vlmscope.tasks.tracing.patches import follow_to_patches

    labels = feature_labels(cfg, scope.vlm.name, scope.transcoders)
    traced = trace(scope, inputs, cfg.attribution, folder)
    save_graph(folder / "graph.safetensors", traced.pruned)
    patches = (
        follow_to_patches(cfg, scope.vlm, traced, pictures, folder) if cfg.attribution.patches and pictures else None
    )
    extra = None if patches is None else {"patches": patches.record}
    size = write_graph_json(folder / "graph.json", traced.pruned, name or folder.name, scope.vlm.name, labels, extra)
    if cfg.task.figure:
        attribution_graph(traced.pruned, folder / "figures" / "graph.png", for_figures(pictures), labels=labels)
    graph = traced.graph
    if cfg.task.rows is None:
        print_ends(graph)
    metrics = graph_metrics(traced, float(graph.meta["seconds"])) | {"graph/json_mb": size}
    if patches is not None:
        metrics |= patches.metrics
    metrics |= write_scores(folder / "attention.json", traced, cfg.attribution.n_pairs)
    if cfg.task.head_edges:
        write_heads(folder / "heads.json", traced, cfg.task.head_edges)
    if pictures:
        metrics["graph/answer_sees_image"] = float(reaches_image(traced.pruned, int(graph.nodes.ends()[0])))
    return metrics
