"""Compare two attribution graphs, traced before or on the spot: what both use, what one alone uses, and how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.tasks.registry import RunContext

USES = ("attribution",)
MEMORY = "attribution.max_nodes, attribution.batch_size or attribution.memory_gb"


@dataclass
class Config:
    """Two graphs (docs/graphs.md): each the run folder or graph.safetensors of a trace, or traced on the spot.

    Without `first`, `prompt=` and `image=` are traced; without `second`, `second_prompt` and `second_image`, of which
    one may be left out when it is that of the first; `second_image=[]` is a prompt without a picture. `names` are what
    the two are called; `match` says when nodes are the same: auto, position, from_end, role or feature.
    """

    first: str | None = None
    second: str | None = None
    second_prompt: str | None = field(default=None, metadata={"verbatim": True})
    second_image: Any = field(default=None, metadata={"paths": True})
    names: list[str] = field(default_factory=list)
    match: str = "auto"
    figure: bool = True


@dataclass(frozen=True)
class _Side:
    """One of the two: a file, or what is to be traced."""

    file: Path | None = None
    prompt: str = ""
    images: tuple[str, ...] = ()


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write comparison.safetensors, graph.json, nodes.csv, edges.csv and the figures."""
    from vlmscope.attribution.compare import compare, write_tables
    from vlmscope.attribution.export import save_merged, write_merged_json
    from vlmscope.report.merged_figure import difference_graph, share_bars
    from vlmscope.tasks.label import feature_labels, look_for_labels

    look_for_labels(cfg)
    sides = _sides(cfg)
    names = _names(cfg, sides)
    first, second = _graphs(cfg, context, sides)
    found = compare(first, second, names, cfg.task.match)
    save_merged(context.run_dir / "comparison.safetensors", found)
    labels = feature_labels(cfg, found.model)
    size = write_merged_json(context.run_dir / "graph.json", found, context.run_dir.name, labels)
    write_tables(context.run_dir, found, labels)
    if cfg.task.figure and len(found.sources):
        difference_graph(found, context.run_dir / "figures" / "difference.png", labels=labels)
        share_bars(found, context.run_dir / "figures" / "shares.png", labels=labels)
    print(found)
    numbers = {f"compare/{name}": float(value) for name, value in vars(found.summary()).items()}
    return {**numbers, "graph/json_mb": size}


def _sides(cfg: AppConfig) -> tuple[_Side, _Side]:
    """What is compared.

    Raises:
        UserError: one of the two is missing, or is given twice.
    """
    from vlmscope.attribution.compare import graph_file
    from vlmscope.core.errors import UserError

    task: Config = cfg.task
    images = _paths(task.second_image)
    own = task.second_prompt is not None or images is not None
    if task.second is not None and own:
        raise UserError("task.second= and task.second_prompt= or task.second_image= were given; give one of them")
    if task.first is None and cfg.prompt is None:
        raise UserError("nothing to compare: give task.first=RUN, or prompt= (and image=) to trace")
    if task.second is None and not own:
        raise UserError("nothing to compare with: give task.second=RUN, or task.second_prompt= or task.second_image=")
    if task.second is None and task.second_prompt is None and cfg.prompt is None:
        raise UserError("no prompt for the second graph: give task.second_prompt=, or prompt= for both")
    if task.first is not None:
        first = _Side(graph_file(task.first))
    else:
        first = _Side(None, cfg.prompt or "", tuple(cfg.image or ()))
    if task.second is not None:
        return first, _Side(graph_file(task.second))
    prompt = task.second_prompt if task.second_prompt is not None else cfg.prompt
    return first, _Side(None, prompt or "", tuple((cfg.image or ()) if images is None else images))


def _paths(value: Any) -> list[str] | None:
    from vlmscope.core.errors import UserError

    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"task.second_image={value}: it must be a path or a list of paths")
    return value


def _names(cfg: AppConfig, sides: tuple[_Side, _Side]) -> list[str]:
    """What the user calls the two, else what tells them apart: folders, pictures, prompts."""
    from vlmscope.core.errors import UserError

    given = cfg.task.names
    if given:
        if len(given) != 2 or given[0] == given[1]:
            raise UserError(f"task.names={given}: give two different names, such as task.names=[mars,earth]")
        return list(given)
    files = [side.file.parent.name if side.file else side.prompt for side in sides]
    pictures = [", ".join(Path(image).stem for image in side.images) or "no picture" for side in sides]
    prompts = [side.prompt for side in sides]
    for found in (files if any(side.file for side in sides) else pictures, prompts):
        if found[0] != found[1]:
            return [name if len(name) <= 40 else f"{name[:37]}..." for name in found]
    return ["first", "second"]


def _graphs(cfg: AppConfig, context: RunContext, sides: tuple[_Side, _Side]) -> list[PrunedGraph]:
    """Read or trace both; what is traced goes into `first/` and `second/`."""
    from vlmscope.attribution.export import load_graph

    found = [load_graph(side.file) if side.file else None for side in sides]
    if None not in found:
        return [graph for graph in found if graph is not None]
    from vlmscope.attribution.export import save_graph, write_graph_json
    from vlmscope.attribution.trace import trace
    from vlmscope.data.images import open_images
    from vlmscope.tasks.wiring import load_model, load_scope

    vlm = load_model(cfg)
    # Both are prepared before either is traced, so that a mistake in the second costs nothing.
    inputs = [None if side.file else vlm.prepare(side.prompt, open_images(side.images)) for side in sides]
    scope = load_scope(cfg, vlm, context.overrides)
    graphs: list[PrunedGraph] = []
    for name, graph, one in zip(("first", "second"), found, inputs, strict=True):
        if one is not None:
            graph = trace(scope, one, cfg.attribution, context.run_dir).pruned
            save_graph(context.run_dir / name / "graph.safetensors", graph)
            write_graph_json(context.run_dir / name / "graph.json", graph, name, vlm.name)
        assert graph is not None
        graphs.append(graph)
    return graphs
