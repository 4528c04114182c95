"""Merged graphs as tables for people: `nodes.csv` and `edges.csv`."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.attribution.merged_export import Merged, kept_by
from vlmscope.core.artifacts import write_text
from vlmscope.core.graph import NodeKind
from vlmscope.core.ids import FeatureId
from vlmscope.core.merged import AggregateGraph, GraphComparison, MergedGraph


def write_tables(folder: str | Path, merged: Merged, labels: Mapping[FeatureId, str] | None = None) -> None:
    """Write `nodes.csv` and `edges.csv`: what differs most (of a comparison), or matters most, comes first.

    With `labels` nodes have a last column `label`.

    Raises:
        UserError: when a file cannot be written.
    """
    if isinstance(merged, GraphComparison):
        nodes, edges = _comparison_tables(merged)
        order = np.argsort(-np.abs(merged.share[0] - merged.share[1]), kind="stable")
    else:
        nodes, edges = _aggregate_tables(merged)
        order = np.argsort(-merged.share, kind="stable")
    if labels:
        said = [_label(merged, node, labels) for node in order.tolist()]
        nodes = [(*row, label) for row, label in zip(nodes, ["label", *said], strict=True)]
    write_text(Path(folder) / "nodes.csv", _csv(nodes))
    write_text(Path(folder) / "edges.csv", _csv(edges))


def _comparison_tables(merged: GraphComparison) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
    columns = ("share_first", "share_second", "share_difference", "activation_first", "activation_second", "kept_by")
    nodes: list[Sequence[Any]] = [("node", "kind", "where", *columns)]
    gap = merged.share[0] - merged.share[1]
    for node in np.argsort(-np.abs(gap), kind="stable").tolist():
        values = (*merged.share[:, node].tolist(), float(gap[node]), *merged.activation[:, node].tolist())
        nodes.append((*_names(merged, node), *map(_shown, values), kept_by(merged, merged.kept[:, node])))
    shares = ("share_first", "share_second", "kept_by")
    edges: list[Sequence[Any]] = [(*_ENDS, "weight_first", "weight_second", "difference", *shares)]
    difference = merged.difference
    gap = merged.edge_share[0] - merged.edge_share[1]
    for edge in np.argsort(-np.abs(gap), kind="stable").tolist():
        values = (*merged.weights[:, edge].tolist(), float(difference[edge]), *merged.edge_share[:, edge].tolist())
        edges.append((*_ends(merged, edge), *map(_shown, values), kept_by(merged, merged.edge_kept[:, edge])))
    return nodes, edges


def _aggregate_tables(merged: AggregateGraph) -> tuple[list[Sequence[Any]], list[Sequence[Any]]]:
    nodes: list[Sequence[Any]] = [
        ("node", "kind", "where", "mean_share", "kept_in", "present_in", "graphs", "mean_activation")
    ]
    for node in np.argsort(-merged.share, kind="stable").tolist():
        often = (merged.count[node], merged.present[node], merged.n_graphs)
        nodes.append(
            (*_names(merged, node), _shown(float(merged.share[node])), *often, _shown(float(merged.activation[node])))
        )
    edges: list[Sequence[Any]] = [(*_ENDS, "mean_weight", "mean_absolute", "mean_share", "kept_in", "graphs")]
    for edge in np.argsort(-merged.edge_share, kind="stable").tolist():
        values = (float(merged.weight[edge]), float(merged.absolute[edge]), float(merged.edge_share[edge]))
        edges.append((*_ends(merged, edge), *map(_shown, values), merged.edge_count[edge], merged.n_graphs))
    return nodes, edges


_ENDS = ("source", "source_where", "target", "target_where")


def _names(merged: MergedGraph, node: int) -> tuple[str, str, str]:
    return merged.nodes.name(node), NodeKind(int(merged.nodes.kind[node])).name.lower(), merged.where(node)


def _ends(merged: MergedGraph, edge: int) -> tuple[str, str, str, str]:
    source, target = int(merged.sources[edge]), int(merged.targets[edge])
    return merged.nodes.name(source), merged.where(source), merged.nodes.name(target), merged.where(target)


def _label(merged: MergedGraph, node: int, labels: Mapping[FeatureId, str]) -> str:
    if merged.nodes.kind[node] != NodeKind.FEATURE:
        return ""
    return labels.get(FeatureId(int(merged.nodes.layer[node]), int(merged.nodes.index[node])), "")


def _shown(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
