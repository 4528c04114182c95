"""Intersection and difference of two graphs, and the mean of many (rules of matching: `vlmscope.attribution.matching`).

What counts is what pruning kept in at least one graph; its weights and shares are read from the whole graphs, so that a
node which just missed the cut of one is not taken for absent there.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vlmscope.attribution.graph_io import load_graph
from vlmscope.attribution.matching import check_same_model, choose_match
from vlmscope.attribution.merging import Layout, Projection, Union, project
from vlmscope.core.errors import UserError
from vlmscope.core.graph import PrunedGraph
from vlmscope.core.merged import AggregateGraph, GraphComparison

GRAPH_FILE = "graph.safetensors"


def graph_file(place: str | Path) -> Path:
    """The graph's file in a run folder, or the file itself.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    found = path / GRAPH_FILE if path.is_dir() else path
    if not found.is_file():
        what = f"holds no {GRAPH_FILE}" if path.is_dir() else "is neither a run folder nor a file"
        raise UserError(f"{path} {what}; give the folder of a task=trace run")
    return found


def compare(
    first: PrunedGraph, second: PrunedGraph, names: Sequence[str] = ("first", "second"), match: str = "auto"
) -> GraphComparison:
    """Match two graphs and set them against each other.

    Args:
        first: the graph whose weights count as positive in the difference.
        second: the other.
        names: what to call them.
        match: when nodes are the same: auto, position, from_end, role or feature.

    Raises:
        UserError: the graphs are of different models, or there is no such rule.
    """
    both = (first, second)
    check_same_model([pruned.graph for pruned in both], names)
    union = Union(choose_match(match, [pruned.graph for pruned in both]))
    for pruned in both:
        union.add(pruned)
    layout = union.layout()
    a, b = (project(pruned, layout) for pruned in both)
    return GraphComparison(
        **_common(layout, first, list(names), [pruned.graph.prompt for pruned in both]),
        share=np.stack([a.share, b.share]),
        kept=np.stack([a.kept, b.kept]),
        present=np.stack([a.present, b.present]),
        activation=np.stack([a.activation, b.activation]),
        weights=np.stack([a.weight, b.weight]),
        edge_share=np.stack([a.edge_share, b.edge_share]),
        edge_kept=np.stack([a.edge_kept, b.edge_kept]),
    )


def aggregate(
    graphs: Sequence[PrunedGraph | str | Path],
    names: Sequence[str] | None = None,
    match: str = "role",
    min_present: float = 0.0,
    each: Callable[[Iterator[PrunedGraph]], Iterator[PrunedGraph]] = iter,
) -> AggregateGraph:
    """Mean of many graphs. They are read twice, one at a time, so that memory holds one and the result.

    Args:
        graphs: graphs, files or run folders.
        names: of the graphs; those of files' folders, else numbers.
        match: when nodes are the same: position, from_end, role or feature; auto looks at the first two.
        min_present: nodes and edges that pruning kept in a smaller share of the graphs are left out.
        each: wraps each of the two passes, for a progress bar.

    Raises:
        UserError: no graphs, graphs of different models, a file that is none, or a setting that makes no sense.
    """
    if not graphs:
        raise UserError("no graphs to aggregate; give the folders of task=trace runs")
    if not 0.0 <= min_present <= 1.0:
        raise UserError(f"min_present={min_present}: it is a share of the graphs; choose a number between 0 and 1")
    names = list(names) if names is not None else [_name(place, at) for at, place in enumerate(graphs)]
    head = [_loaded(place) for place in graphs[:2]]
    union, prompts = Union(choose_match(match, [pruned.graph for pruned in head])), []
    for pruned, name in zip(each(map(_loaded, graphs)), names, strict=True):
        check_same_model([head[0].graph, pruned.graph], [names[0], name])
        union.add(pruned)
        prompts.append(pruned.graph.prompt)
    layout = union.layout(max(1, int(np.ceil(min_present * len(graphs) - 1e-9))))
    sums = _Sums(layout)
    for pruned in each(map(_loaded, graphs)):
        sums.add(project(pruned, layout))
    return sums.mean(_common(layout, head[0], names, prompts))


class _Sums:
    """Running sums of projections onto one layout."""

    def __init__(self, layout: Layout) -> None:
        nodes, edges = len(layout.nodes), len(layout.edges)
        self.share, self.activation = np.zeros(nodes), np.zeros(nodes)
        self.count, self.present = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
        self.weight, self.absolute, self.edge_share = np.zeros(edges), np.zeros(edges), np.zeros(edges)
        self.edge_count = np.zeros(edges, np.int64)

    def add(self, one: Projection) -> None:
        self.share += one.share
        self.count += one.kept
        self.present += one.present
        self.activation += np.nan_to_num(one.activation)
        self.weight += one.weight
        self.absolute += np.abs(one.weight)
        self.edge_share += one.edge_share
        self.edge_count += one.edge_kept

    def mean(self, common: dict) -> AggregateGraph:
        n_graphs = len(common["names"])
        return AggregateGraph(
            **common,
            share=self.share / n_graphs,
            count=self.count,
            present=self.present,
            activation=self.activation / np.maximum(self.present, 1),
            weight=self.weight / n_graphs,
            absolute=self.absolute / n_graphs,
            edge_share=self.edge_share / n_graphs,
            edge_count=self.edge_count,
        )


def _common(layout: Layout, first: PrunedGraph, names: list[str], prompts: list[str]) -> dict:
    return {
        "nodes": layout.nodes,
        "columns": layout.columns,
        "column_is_image": layout.column_is_image,
        "sources": layout.sources,
        "targets": layout.targets,
        "match": layout.match,
        "n_layers": first.graph.n_layers,
        "model": str(first.graph.meta.get("model", "")),
        "names": names,
        "prompts": prompts,
    }


def _loaded(place: PrunedGraph | str | Path) -> PrunedGraph:
    return place if isinstance(place, PrunedGraph) else load_graph(graph_file(place))


def _name(place: PrunedGraph | str | Path, number: int) -> str:
    return f"graph {number + 1}" if isinstance(place, PrunedGraph) else graph_file(place).parent.name
