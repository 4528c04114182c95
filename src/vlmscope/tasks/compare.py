"""Compare the attribution graphs of two finished traces: what both use, and what only one uses."""

from __future__ import annotations

from vlmscope.attribution.compare import compare, graph_file, write_tables
from vlmscope.attribution.export import load_graph
from vlmscope.config import AppConfig
from vlmscope.config.wiring import feature_labels
from vlmscope.core.errors import UserError
from vlmscope.report.graph_figure import difference_graph, share_bars
from vlmscope.tasks.settings import CompareSettings, RunContext


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write nodes.csv, edges.csv and the figures."""
    task: CompareSettings = cfg.task
    if task.first is None or task.second is None:
        raise UserError("two graphs are compared: give task.first=RUN and task.second=RUN, folders of task=trace")
    files = [graph_file(task.first), graph_file(task.second)]
    names = list(task.names) or [file.parent.name for file in files]
    if not task.names and names[0] == names[1]:
        names = ["first", "second"]
    if len(names) != 2 or names[0] == names[1]:
        raise UserError(f"task.names={names}: give two different names, such as task.names=[mars,earth]")
    first, second = map(load_graph, files)
    comparison = compare(first, second, names, task.match)
    labels = feature_labels(cfg, comparison.model, graphs=files)
    write_tables(context.run_dir, comparison, labels)
    if task.figure and len(comparison.sources):
        difference_graph(comparison, context.run_dir / "figures" / "difference.png", labels=labels)
        share_bars(comparison, context.run_dir / "figures" / "shares.png", labels=labels)
    print(comparison)
    return {f"compare/{name}": float(value) for name, value in vars(comparison.summary()).items()}
