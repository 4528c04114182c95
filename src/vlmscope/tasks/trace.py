"""Attribution graph of one prompt and its pictures, or of many: graph.json, graph.safetensors and a picture of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = ("attribution",)
MEMORY = "attribution.max_nodes, attribution.batch_size or attribution.memory_gb"


@dataclass
class Config:
    """Settings of the graph, and what it explains, are in `attribution=` (docs/attribution.md).

    `figure` draws the pruned graph too; `head_edges` of its strongest edges are split by attention heads. `rows` is a
    CSV or JSONL file of many prompts with their pictures (docs/graphs.md); with `skip_bad` rows that cannot be traced
    are left out and counted.
    """

    figure: bool = True
    head_edges: int = 0
    rows: str | None = None
    skip_bad: bool = False


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Trace `prompt=` on `image=` (none for text alone), or every row of `task.rows=`."""
    from vlmscope.core.errors import UserError
    from vlmscope.tasks.label import look_for_labels

    look_for_labels(cfg)

    from vlmscope.tasks.tracing.one import trace_into
    from vlmscope.tasks.tracing.rows import trace_rows
    from vlmscope.tasks.wiring import load_model, load_scope, user_pictures

    if cfg.task.rows is not None:
        return trace_rows(cfg, context)
    if cfg.prompt is None:
        choice = f"prompt_name= one of {', '.join(cfg.prompts.prompts)}" if cfg.prompts else "'prompt=what is this ?'"
        raise UserError(f"no prompt: add {choice} (and image=path/to/picture.png)")
    pictures = user_pictures(cfg)
    if cfg.attribution.patches and not pictures:
        raise UserError("attribution.patches=true needs a picture; add image=path/to/picture.png")
    vlm = load_model(cfg)
    inputs = vlm.prepare(cfg.prompt, pictures)
    scope = load_scope(cfg, vlm, context.overrides)
    return trace_into(context.run_dir, cfg, scope, inputs, pictures)
