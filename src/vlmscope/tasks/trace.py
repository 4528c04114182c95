"""Attribution graph of one prompt and its pictures: graph.json, graph.safetensors and a picture of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext


@dataclass
class Config:
    """Settings of the graph, and what it explains, are in `attribution=` (docs/attribution.md). `figure` draws the pruned
    graph too; `head_edges` of its strongest edges are split by attention heads.
    """

    figure: bool = True
    head_edges: int = 0


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Trace `prompt=` on `image=` (none for text alone)."""
    import numpy as np

    from vlmscope.attribution.export import write_graph_json
    from vlmscope.attribution.graph_io import save_graph
    from vlmscope.attribution.pruning import reaches_image
    from vlmscope.attribution.trace import trace
    from vlmscope.core.errors import UserError
    from vlmscope.report.graph_figure import attribution_graph
    from vlmscope.tasks.graph_metrics import graph_metrics
    from vlmscope.tasks.steps.trace_details import print_ends, write_heads, write_scores
    from vlmscope.tasks.trace_patches import follow_to_patches
    from vlmscope.tasks.wiring import load_model, load_transcoders, user_pictures

    if cfg.prompt is None:
        choice = f"prompt_name= one of {', '.join(cfg.prompts.prompts)}" if cfg.prompts else "'prompt=what is this ?'"
        raise UserError(f"no prompt: add {choice} (and image=path/to/picture.png)")
    pictures = user_pictures(cfg)
    if cfg.attribution.patches and not pictures:
        raise UserError("attribution.patches=true needs a picture; add image=path/to/picture.png")
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    transcoders = load_transcoders(cfg, vlm, context.overrides)
    traced = trace(vlm, transcoders, inputs, cfg.attribution)
    save_graph(context.run_dir / "graph.safetensors", traced.pruned)
    patches = follow_to_patches(cfg, vlm, traced, pictures, context.run_dir) if cfg.attribution.patches else None
    extra = None if patches is None else {"patches": patches.record}
    write_graph_json(context.run_dir / "graph.json", traced.pruned, context.run_dir.name, vlm.name, extra=extra)
    if cfg.task.figure:
        arrays = [np.asarray(p) for p in pictures]
        attribution_graph(traced.pruned, context.run_dir / "figures" / "graph.png", arrays)
    graph = traced.graph
    print_ends(graph)
    metrics = graph_metrics(traced, float(graph.meta["seconds"]))
    if patches is not None:
        metrics |= patches.metrics
    metrics |= write_scores(context.run_dir / "attention.json", traced, cfg.attribution.n_pairs)
    if cfg.task.head_edges:
        write_heads(context.run_dir / "heads.json", traced, cfg.task.head_edges)
    if pictures:
        metrics["graph/answer_sees_image"] = float(reaches_image(traced.pruned, int(graph.nodes.ends()[0])))
    return metrics
