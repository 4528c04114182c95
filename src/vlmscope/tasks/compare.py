"""Compare two attribution graphs: what both use, what only one uses; or average many (task.runs=[...])."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.core.records import FeatureId
    from vlmscope.tasks.registry import RunContext

USES = ("attribution",)
MEMORY = "attribution.max_nodes, attribution.batch_size or attribution.memory_gb"
_FOLDERS = ("first", "second")


@dataclass
class Config:
    """Two graphs (docs/graphs.md): each the run folder or graph.safetensors of a trace, or traced now.

    Without `first`, `prompt=` and `image=` are traced; without `second`, `second_prompt` and `second_image`, each of
    which defaults to that of the first; `second_image=[]` is a prompt without a picture. `names` are the two graphs'
    names; `match` says when nodes are the same: auto, position, from_end, role or feature.

    With `runs`, folders of traces (of one prompt or of many rows) or graph files, all their graphs are averaged
    instead, nodes matched by role unless `match` is given; what pruning kept in a smaller share of them than
    `min_present` is left out.
    """

    first: str | None = None
    second: str | None = None
    second_prompt: str | None = field(default=None, metadata={"verbatim": True})
    second_image: Any = field(default=None, metadata={"paths": True})
    names: list[str] = field(default_factory=list)
    match: str | None = None
    figure: bool = True
    runs: list[str] = field(default_factory=list)
    min_present: float = 0.0


class _Side(NamedTuple):
    """One of the two graphs: its file, or the prompt and pictures to trace."""

    file: Path | None
    prompt: str = ""
    images: tuple[str, ...] = ()


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write nodes.csv, edges.csv and the figures."""
    from vlmscope.attribution.compare import compare, write_tables
    from vlmscope.config.wiring import look_for_labels
    from vlmscope.report.graph_figure import difference_graph, share_bars

    look_for_labels(cfg)
    if cfg.task.runs:
        return _average(cfg, context)
    sides = _sides(cfg)
    names = _names(cfg.task.names, *sides)
    (first, second), labels = _graphs(cfg, context, sides)
    comparison = compare(first, second, names, cfg.task.match or "auto")
    write_tables(context.run_dir, comparison, labels)
    if cfg.task.figure and len(comparison.sources):
        difference_graph(comparison, context.run_dir / "figures" / "difference.png", labels=labels)
        share_bars(comparison, context.run_dir / "figures" / "shares.png", labels=labels)
    print(comparison)
    return {f"compare/{name}": float(value) for name, value in vars(comparison.summary()).items()}


def _average(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write nodes.csv, edges.csv and the figure of the mean of many graphs."""
    from tqdm import tqdm

    from vlmscope.attribution.compare import aggregate, write_tables
    from vlmscope.attribution.trace import graph_files
    from vlmscope.config.wiring import feature_labels
    from vlmscope.report.graph_figure import aggregate_graph

    task, files = cfg.task, graph_files(cfg.task.runs)
    passes = iter(("matching", "summing"))  # the files are read twice

    def bar(graphs: Iterable[PrunedGraph]) -> Iterator[PrunedGraph]:
        return iter(tqdm(graphs, desc=next(passes), total=len(files), unit="graph"))

    merged = aggregate(files, [file.parent.name for file in files], task.match or "role", task.min_present, bar)
    labels = feature_labels(cfg, merged.model, graphs=files)
    write_tables(context.run_dir, merged, labels)
    if task.figure and len(merged.sources):
        aggregate_graph(merged, context.run_dir / "figures" / "aggregate.png", labels=labels)
    print(merged)
    return {
        "aggregate/graphs": float(merged.n_graphs),
        "aggregate/nodes": float(len(merged.nodes)),
        "aggregate/edges": float(len(merged.sources)),
        "aggregate/nodes_in_all": float((merged.count == merged.n_graphs).sum()),
        "aggregate/edges_in_all": float((merged.edge_count == merged.n_graphs).sum()),
    }


def _sides(cfg: AppConfig) -> tuple[_Side, _Side]:
    """Both sides as the settings name them, or a `UserError` for settings that contradict each other."""
    from vlmscope.attribution.compare import graph_file

    task, images = cfg.task, cfg.task.second_image
    images = [images] if isinstance(images, str) else images
    if images is not None and not (isinstance(images, list) and all(isinstance(item, str) for item in images)):
        raise UserError(f"task.second_image={images}: it must be a path or a list of paths")
    traces_second = task.second_prompt is not None or images is not None
    if task.second is not None and traces_second:
        raise UserError("task.second= and task.second_prompt= or task.second_image= were given; give one of them")
    if task.first is None and cfg.prompt is None:
        raise UserError("nothing to compare: give task.first=RUN or prompt=, or task.runs=[RUN,...] to average")
    if task.second is None and not traces_second:
        raise UserError("nothing to compare with: give task.second=RUN, or task.second_prompt= or task.second_image=")
    if task.second is None and task.second_prompt is None and cfg.prompt is None:
        raise UserError("no prompt for the second graph: give task.second_prompt=, or prompt= for both")
    first = _Side(None, cfg.prompt or "", tuple(cfg.image or ()))
    prompt = first.prompt if task.second_prompt is None else task.second_prompt
    second = _Side(None, prompt, first.images if images is None else tuple(images))
    return (
        first if task.first is None else _Side(graph_file(task.first)),
        second if task.second is None else _Side(graph_file(task.second)),
    )


def _names(given: list[str], first: _Side, second: _Side) -> list[str]:
    """The user's names of the two graphs, else the first that differ of folders, pictures and prompts."""
    if given:
        if len(given) != 2 or given[0] == given[1]:
            raise UserError(f"task.names={given}: give two different names, such as task.names=[mars,earth]")
        return list(given)
    sides = (first, second)
    candidates = [", ".join(Path(image).stem for image in side.images) or "no picture" for side in sides]
    if first.file or second.file:
        candidates = [side.file.parent.name if side.file else side.prompt for side in sides]
    for names in (candidates, [side.prompt for side in sides]):
        if names[0] != names[1]:
            return [name if len(name) <= 40 else f"{name[:37]}..." for name in names]
    return ["first", "second"]


def _graphs(
    cfg: AppConfig, context: RunContext, sides: tuple[_Side, _Side]
) -> tuple[list[PrunedGraph], dict[FeatureId, str]]:
    """Read or trace both graphs, traced ones are saved in `first/` and `second/`; and the labels of their features."""
    from vlmscope.attribution.export import load_graph, save_graph, write_graph_json
    from vlmscope.config.wiring import feature_labels

    files = [side.file for side in sides if side.file]
    graphs = {name: load_graph(side.file) for name, side in zip(_FOLDERS, sides, strict=True) if side.file}
    if len(files) == 2:
        labels = feature_labels(cfg, str(graphs[_FOLDERS[0]].graph.meta.get("model")), graphs=files)
    else:
        from vlmscope.attribution.trace import trace, with_heads
        from vlmscope.config.wiring import load_model, load_scope
        from vlmscope.data.images import open_images

        vlm = load_model(cfg)
        # Both are prepared before either is traced, so that a mistake in the second costs nothing.
        by_name = {name: side for name, side in zip(_FOLDERS, sides, strict=True) if not side.file}
        inputs = {name: vlm.prepare(side.prompt, open_images(side.images)) for name, side in by_name.items()}
        scope = load_scope(cfg, vlm, context.overrides)
        labels = feature_labels(cfg, vlm.name, scope, files)
        for name, prepared in inputs.items():
            traced = trace(scope, prepared, cfg.attribution, context.run_dir)
            graphs[name] = with_heads(scope, traced, cfg.attribution).pruned
            save_graph(context.run_dir / name / "graph.safetensors", graphs[name])
            path, pictures = context.run_dir / name / "graph.json", open_images(by_name[name].images)
            write_graph_json(path, graphs[name], name, vlm.name, labels, pictures=pictures)
    return [graphs[name] for name in _FOLDERS], labels
