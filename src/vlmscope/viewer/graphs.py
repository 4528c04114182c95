"""Graphs of the workbench: `graph.json` of run folders, and the bundled example."""

from __future__ import annotations

from pathlib import Path

from vlmscope.core.artifacts import shipped
from vlmscope.viewer.runs import GRAPH, Runs
from vlmscope.viewer.safety import Refused, inside

EXAMPLE = "example"  # id of the graph that comes with vlmscope
MOST_BYTES = 200 << 20  # of a graph file that is sent


def example_folder() -> Path:
    """Folder of the bundled example."""
    return shipped("assets/example_graph")


def graph_folder(runs: Runs, name: str) -> Path:
    """The folder of a graph by its id: a run, or a folder in it such as `rows/<id>`."""
    folder = example_folder() if name == EXAMPLE else inside(runs.root, name)
    if not (folder / GRAPH).is_file():
        raise Refused(f"{name[:200]} has no {GRAPH}", 404)
    return folder


def graph_file(runs: Runs, name: str) -> Path:
    """The `graph.json` of an id."""
    folder = graph_folder(runs, name)
    path = folder / GRAPH if name == EXAMPLE else inside(runs.root, f"{name}/{GRAPH}")
    if path.stat().st_size > MOST_BYTES:
        size = path.stat().st_size / 1e6
        raise Refused(f"{name}/{GRAPH} has {size:.0f} MB, too large; trace with fewer attribution.max_nodes", 413)
    return path
