"""Attribution graph of one prompt and its pictures: graph.json, graph.safetensors and a picture of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext


@dataclass
class Config:
    """Settings of the graph are in `attribution=`. `figure` draws the pruned graph too."""

    figure: bool = True


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Trace `prompt=` on `image=` (none for text alone)."""
    import numpy as np

    from vlmscope.attribution.export import write_graph_json
    from vlmscope.attribution.graph_io import save_graph
    from vlmscope.attribution.pruning import reaches_image
    from vlmscope.attribution.trace import trace
    from vlmscope.core.errors import UserError
    from vlmscope.core.graph import NodeKind
    from vlmscope.report.graph_figure import attribution_graph
    from vlmscope.tasks.graph_metrics import graph_metrics
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
    for token, probability in zip(graph.logit_tokens, graph.logit_probabilities, strict=True):
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)  # a newline stays on its line
        print(f"  {shown:<16} p = {probability:.3f}")
    metrics = graph_metrics(traced, float(graph.meta["seconds"]))
    if patches is not None:
        metrics |= patches.metrics
    if pictures:
        metrics["graph/answer_sees_image"] = float(reaches_image(traced.pruned, int(graph.nodes.of(NodeKind.LOGIT)[0])))
    return metrics
