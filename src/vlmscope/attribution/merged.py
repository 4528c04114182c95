"""Files and tables of merged graphs.

`comparison.safetensors` and `aggregate.safetensors`: merged graphs, bit for bit (docs/graphs.md).

Merged graphs as tables for people: `nodes.csv` and `edges.csv`.

Merged graphs as `graph.json` for the viewers.

In a comparison's JSON a link weighs what the first graph has more than the second, signed; in an aggregate's, the mean.
What the viewers do not know is in extra keys of nodes and links, and under `vlmscope`.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.attribution.edges import cumulative_share
from vlmscope.attribution.export import FEATURE_TYPES, SCHEMA_VERSION, cantor_pair, source_id, write_graph_body
from vlmscope.core.artifacts import built_from, load_tensors, save_tensors, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, AggregateGraph, GraphComparison, MatchedNodes, MergedGraph, NodeKind
from vlmscope.core.records import FeatureId

_KINDS: dict[str, type[GraphComparison | AggregateGraph]] = {
    "vlmscope.comparison": GraphComparison,
    "vlmscope.aggregate": AggregateGraph,
}
VERSION = "1"


def save_merged(path: str | Path, merged: GraphComparison | AggregateGraph) -> None:
    """Write a comparison or an aggregate, atomically: arrays as they are, the rest as JSON in the file's metadata.

    Raises:
        UserError: when the file cannot be written.
    """
    fields = {f"node_{name}": value for name, value in _fields(merged.nodes).items()}
    fields |= {name: value for name, value in _fields(merged).items() if name != "nodes"}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    words = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items() if name not in arrays}
    form = next(name for name, kind in _KINDS.items() if isinstance(merged, kind))
    save_tensors(path, arrays, {"format": form, "version": VERSION, **words})


def load_merged(path: str | Path) -> GraphComparison | AggregateGraph:
    """Read what `save_merged` wrote.

    Raises:
        UserError: when the file is missing, holds something else, or was written in another version of the layout.
    """
    arrays, metadata = load_tensors(path)
    kind = _KINDS.get(metadata.get("format", ""))
    if kind is None:
        raise UserError(
            f"{path} is no comparison and no aggregate of graphs; give one that task=compare or aggregate wrote"
        )
    if metadata.get("version") != VERSION:
        raise UserError(f"{path} has layout {metadata.get('version')}, this program reads {VERSION}; make it anew")
    with built_from(path, "comparison or aggregate", "make it again"):
        words = {name: json.loads(text) for name, text in metadata.items() if name not in ("format", "version")}
        fields: dict[str, Any] = {**arrays, **words}
        nodes = MatchedNodes(
            **{field.name: fields.pop(f"node_{field.name}") for field in dataclasses.fields(MatchedNodes)}
        )
        return kind(nodes=nodes, **fields)


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


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


Merged = GraphComparison | AggregateGraph


def merged_ids(merged: MergedGraph) -> list[str]:
    """The id of every node, unique in its graph, in the form that `graph.json` of one prompt has."""
    nodes = merged.nodes
    ids: list[str] = []
    for node in range(len(nodes)):
        kind, layer, at = NodeKind(int(nodes.kind[node])), int(nodes.layer[node]), max(int(nodes.position[node]), 0)
        if kind == NodeKind.TARGET:
            ids.append(f"TARGET_{node}_{layer}_{at}")
        elif nodes.image[node] >= 0:  # the cells of two pictures can stand in one column
            ids.append(f"E_soft{node}_{at}")
        else:
            ids.append(source_id(kind, layer, at, int(nodes.index[node])))
    assert len(set(ids)) == len(ids), "two nodes have one id"
    return ids


def merged_to_json(merged: Merged, slug: str, labels: Mapping[FeatureId, str] | None = None) -> dict[str, Any]:
    """A comparison or an aggregate as the viewers' JSON; valid against their schema."""
    ids = merged_ids(merged)
    strength = merged.share.max(axis=0) if isinstance(merged, GraphComparison) else merged.share
    cumulative = cumulative_share(strength) if strength.sum() > 0 else np.ones(len(ids))
    weights = merged.difference if isinstance(merged, GraphComparison) else merged.weight
    ends = zip(merged.sources.tolist(), merged.targets.tolist(), weights.tolist(), strict=True)
    kind = "comparison" if isinstance(merged, GraphComparison) else "aggregate"
    return {
        "metadata": {
            "slug": slug,
            "scan": merged.model,
            "prompt_tokens": list(merged.columns),
            "prompt": " | ".join(dict.fromkeys(merged.prompts)),
            "info": {"generator": {"name": "vlmscope"}, "description": _description(merged)},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(merged, node, ids[node], float(cumulative[node]), labels or {}) for node in range(len(ids))],
        "links": [
            {"source": ids[s], "target": ids[t], "weight": w, **_link(merged, edge)}
            for edge, (s, t, w) in enumerate(ends)
        ],
        "vlmscope": {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "match": merged.match,
            "names": merged.names,
            "prompts": merged.prompts,
            "columns_with_soft_tokens": np.flatnonzero(merged.column_is_image).tolist(),
        },
    }


def _description(merged: Merged) -> str:
    if isinstance(merged, GraphComparison):
        first, second = merged.names
        return f"weights are {first} minus {second}; nodes matched by {merged.match}"
    return f"mean weights of {merged.n_graphs} graphs; nodes matched by {merged.match}"


def _node(merged: Merged, node: int, name: str, cumulative: float, labels: Mapping[FeatureId, str]) -> dict[str, Any]:
    nodes = merged.nodes
    kind, layer, index = NodeKind(int(nodes.kind[node])), int(nodes.layer[node]), int(nodes.index[node])
    logit, end = kind == NodeKind.LOGIT, kind in ENDS
    value = _largest(merged.activation[..., node])
    record: dict[str, Any] = {
        "node_id": name,
        "feature": cantor_pair(layer, index) if kind == NodeKind.FEATURE else index if index >= 0 else None,
        "layer": "E" if kind == NodeKind.TOKEN else str(layer + end),
        "ctx_idx": max(int(nodes.position[node]), 0),
        "feature_type": FEATURE_TYPES[kind],
        "token_prob": (value or 0.0) if logit else 0.0,
        "is_target_logit": end and value == _best_logit(merged),
        "jsNodeId": name,
        "clerp": _viewer_label(merged, node, value, labels),
        "influence": None if end else cumulative,
        "activation": value if kind == NodeKind.FEATURE else None,
        "modality": _modality(merged, node),
    }
    if nodes.image[node] >= 0:
        record["patch"] = {"image": int(nodes.image[node]), "box": nodes.box[node].tolist()}
    return {**record, **_node_values(merged, node)}


def _viewer_label(merged: Merged, node: int, value: float | None, labels: Mapping[FeatureId, str]) -> str:
    nodes = merged.nodes
    match NodeKind(int(nodes.kind[node])):
        case NodeKind.LOGIT:
            # The viewers read the probability out of the label.
            return f'Output "{nodes.label[node]}" (p={value or 0.0:.3f})'
        case NodeKind.TOKEN:
            return f"Emb: {nodes.label[node]}"
        case NodeKind.FEATURE:
            return labels.get(FeatureId(int(nodes.layer[node]), int(nodes.index[node])), "")
        case _:
            return nodes.label[node]


def _modality(merged: Merged, node: int) -> str | None:
    at = int(merged.nodes.position[node])
    if at < 0:
        return None
    return "image" if merged.column_is_image[at] else "text"


def _largest(values: np.ndarray) -> float | None:
    found = values[np.isfinite(values)]
    return float(found.max()) if found.size else None


def _best_logit(merged: Merged) -> float | None:
    return _largest(merged.activation[..., merged.nodes.kind == NodeKind.LOGIT])


def _node_values(merged: Merged, node: int) -> dict[str, Any]:
    if isinstance(merged, AggregateGraph):
        return {"share": float(merged.share[node]), "kept_in": int(merged.count[node])}
    numbers = [None if np.isnan(v) else float(v) for v in merged.activation[:, node]]
    return {
        "shares": merged.share[:, node].tolist(),
        "activations": numbers,
        "kept_by": kept_by(merged, merged.kept[:, node]),
    }


def _link(merged: Merged, edge: int) -> dict[str, Any]:
    if isinstance(merged, AggregateGraph):
        return {"mean_absolute": float(merged.absolute[edge]), "kept_in": int(merged.edge_count[edge])}
    kept = kept_by(merged, merged.edge_kept[:, edge])
    return {"weights": merged.weights[:, edge].tolist(), "shares": merged.edge_share[:, edge].tolist(), "kept_by": kept}


def kept_by(merged: GraphComparison, kept: np.ndarray) -> str:
    return "both" if kept.all() else merged.names[0] if kept[0] else merged.names[1] if kept[1] else "neither"


def write_merged_json(
    path: str | Path, merged: Merged, slug: str, labels: Mapping[FeatureId, str] | None = None
) -> float:
    """Write `merged_to_json`, atomically; returns its size in megabytes and warns as `write_graph_json` does.

    Raises:
        UserError: when the file cannot be written.
    """
    thresholds = "attribution.node_threshold or attribution.edge_threshold of the traces lower"
    advice = thresholds if isinstance(merged, GraphComparison) else f"task.min_present higher, or {thresholds}"
    return write_graph_body(path, merged_to_json(merged, slug, labels), advice)
