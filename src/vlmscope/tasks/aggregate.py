"""Aggregate many attribution graphs: mean edges, and how often each feature and edge occurs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = ("attribution",)


@dataclass
class Config:
    """The graphs (docs/graphs.md): `runs` are folders of traces, of one prompt or of many rows, or graph files.

    `match` says when nodes are the same (position, from_end, role, feature, auto). Nodes and edges that pruning kept in
    a smaller share of the graphs than `min_present` are left out.
    """

    runs: list[str] = field(default_factory=list)
    match: str = "role"
    min_present: float = 0.0
    figure: bool = True


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write aggregate.safetensors, nodes.csv, edges.csv and the figure."""
    from tqdm import tqdm

    from vlmscope.attribution.compare import aggregate, write_tables
    from vlmscope.attribution.export import save_merged
    from vlmscope.attribution.trace import graph_files
    from vlmscope.config.wiring import feature_labels, look_for_labels
    from vlmscope.report.graph_figure import aggregate_graph

    look_for_labels(cfg)
    files = graph_files(cfg.task.runs)
    if not files:
        raise UserError("no graphs: give task.runs=[RUN,...], the folders of task=trace runs")
    passes = iter(("matching", "summing"))  # the files are read twice

    def bar(graphs: Iterable[Any]) -> Iterator[Any]:
        return iter(tqdm(graphs, desc=next(passes), total=len(files), unit="graph"))

    names = [file.parent.name for file in files]
    merged = aggregate(files, names, cfg.task.match, cfg.task.min_present, bar)
    save_merged(context.run_dir / "aggregate.safetensors", merged)
    labels = feature_labels(cfg, merged.model, graphs=files)
    write_tables(context.run_dir, merged, labels)
    if cfg.task.figure and len(merged.sources):
        aggregate_graph(merged, context.run_dir / "figures" / "aggregate.png", labels=labels)
    print(merged)
    return {
        "aggregate/graphs": float(merged.n_graphs),
        "aggregate/nodes": float(len(merged.nodes)),
        "aggregate/edges": float(len(merged.sources)),
        "aggregate/nodes_in_all": float((merged.count == merged.n_graphs).sum()),
        "aggregate/edges_in_all": float((merged.edge_count == merged.n_graphs).sum()),
    }
