"""Comparison of two graphs of one model (docs/graphs.md).

Nodes of two graphs are the same node by these rules:

| kind | same when |
| --- | --- |
| feature | same layer and index, and same place |
| token | same token id, and same place |
| soft token | same picture and same box in it, wherever it stands in the prompt |
| error | same layer and same place |
| bias, left out | same layer |
| logit | same token id and string, and same place in graphs that explain several positions |
| other target | a feature: same layer and index; else same name |

The place is, by `match`: `position` the position; `from_end` the position counted from the end of the prompt; `role`
the position's role (image, question, special, last), so that the nodes of a role become one; `feature` nothing, so
that those at all positions become one. `auto` is `position` for prompts of the same length whose soft tokens stand at
the same positions, else `role`. A node made of several has the sum of their influence, an edge the sum of the weights.

What counts is what pruning kept in at least one graph; its weights and shares are read from the whole graphs, so that a
node which just missed the cut of one is not taken for absent there. Only the edges between nodes of the union are
read, a block of rows at a time, so that graphs of many millions of edges need no second copy.

Legend: N nodes of a graph, M matched nodes, E matched edges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlmscope.attribution.export import GRAPH_FILE
from vlmscope.attribution.influence import (
    absolute_rows,
    counted,
    influence,
    logit_weights,
    row_blocks,
    rows_of,
    take_rows,
)
from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError, check_choice
from vlmscope.core.graph import (
    ENDS,
    AttributionGraph,
    GraphComparison,
    MatchedNodes,
    NodeKind,
    PrunedGraph,
)
from vlmscope.core.records import FeatureId

MATCHES = ("position", "from_end", "role", "feature")
# The order of kinds within a layer, that of the node table of one graph.
_ORDER = [NodeKind[kind] for kind in ("TOKEN", "BIAS", "FEATURE", "ERROR", "LEFT_OUT", "LOGIT", "TARGET")]
_SHIFT = 32  # an edge is the integer `target << 32 | source`
# Columns in which equal nodes agree. `place` is a position, a role, or "" for a node without one; `token` a feature's
# index or a token's id; picture and box belong to a soft token, `name` to an end.
_BOX = ["top", "left", "right", "bottom"]
KEY = ["layer", "kind", "place", "token", "image", *_BOX, "name"]


def choose_match(match: str, graphs: Sequence[AttributionGraph]) -> str:
    """`match`, or what `auto` stands for with these graphs."""
    check_choice("match", match, ("auto", *MATCHES))
    if match != "auto":
        return match
    same = all(np.array_equal(graph.is_image, graphs[0].is_image) for graph in graphs)
    return "position" if same else "role"


def _check_alike(first: PrunedGraph, second: PrunedGraph, names: Sequence[str]) -> None:
    """Raise a `UserError` for graphs of two models or with two conventions for biases."""
    graphs = first.graph, second.graph
    models = [f"{graph.meta.get('model') or 'a model without a name'} ({graph.n_layers} layers)" for graph in graphs]
    if models[0] != models[1]:
        raise UserError(
            f"{names[0]} is a graph of {models[0]}, {names[1]} of {models[1]}: "
            "features of two models are not the same; give graphs of one"
        )
    if first.bias != second.bias:
        raise UserError(
            f"{names[0]} was traced with attribution.bias={first.bias}, {names[1]} with {second.bias}: shares of their "
            "influence do not compare; trace one of them again"
        )


def places(graph: AttributionGraph, match: str) -> list[int | str]:
    """The place of each position under the rule `match`."""
    count = len(graph.tokens)
    if match == "role":
        return graph.roles.tolist()
    if match == "feature":
        return ["any position"] * count
    return list(range(count) if match == "position" else range(-count, 0))


def node_frame(graph: AttributionGraph, match: str) -> pd.DataFrame:
    """The `KEY` of every node, in order, and the place of its `column`."""
    nodes, kind, nowhere = graph.nodes, graph.nodes.kind, (np.nan,) * 4
    column = np.array([*places(graph, match), ""], dtype=object)[nodes.position]  # without a position: the last
    boxes = [nowhere if b is None else (b.top, b.left, b.right, b.bottom) for b in graph.patch_boxes]
    box = np.array([*boxes, nowhere]).round(6)[nodes.position]
    end, ends = np.isin(kind, ENDS), nodes.ends()
    soft = (kind == NodeKind.TOKEN) & ~np.isnan(box[:, 0])
    keyed = end | (kind == NodeKind.FEATURE) | ((kind == NodeKind.TOKEN) & ~soft)
    placeless = soft | (kind == NodeKind.TARGET)
    if len(np.unique(nodes.position[ends])) == 1:
        placeless |= kind == NodeKind.LOGIT
    # A feature's name says where it fires, which may differ between prompts.
    named = (kind == NodeKind.LOGIT) | ((kind == NodeKind.TARGET) & (nodes.index < 0))
    names = np.full(len(nodes), "", dtype=object)
    names[ends] = graph.logit_tokens
    frame = pd.DataFrame({"layer": nodes.layer, "kind": kind, "column": column})
    frame["place"] = np.where(placeless, "", column)
    frame["token"] = np.where(keyed, nodes.index, -1)
    frame["image"] = np.where(soft, np.append(graph.image_index, -1)[nodes.position], -1)
    frame[_BOX] = np.where(soft[:, None], box, np.nan)
    frame["name"] = np.where(named, names, "")
    return frame


def numbers_of(frame: Any, union: Any) -> np.ndarray:
    """[N] int64, for each row of a `node_frame` the row of the union with the same `KEY`, -1 without one."""
    found: Any = frame[KEY].merge(union[KEY].reset_index(names="number"), "left", KEY)
    return found.number.fillna(-1).to_numpy(np.int64)


@dataclass(frozen=True)
class Layout:
    """The nodes and edges of a union."""

    match: str
    frame: pd.DataFrame  # `KEY` of each node
    edges: np.ndarray  # [E] int64, ascending
    nodes: MatchedNodes
    columns: list[str]
    column_is_image: np.ndarray


def unite(graphs: Iterable[PrunedGraph], match: str) -> Layout:
    """The nodes and edges that some graph keeps, sources before targets.

    A soft token or an end has the column and the label of the first that keeps it.
    """
    union: Any = pd.DataFrame()  # pandas' own types are too wide
    edges = np.empty(0, np.int64)
    texts: dict[int | str, dict[str, None]] = {}  # the tokens at each place
    image: dict[int | str, bool] = {}  # whether only soft tokens are there
    for pruned in graphs:
        graph, mask = pruned.graph, pruned.node_mask
        for position, place in enumerate(places(graph, match)):
            text = graph.tokens[position] if graph.patch_boxes[position] is None else _cell(graph, position)
            texts.setdefault(place, {})[text] = None
            image[place] = image.get(place, True) and bool(graph.is_image[position])
        frame = node_frame(graph, match)
        kept = frame[mask].assign(label=[_label(graph, node) for node in np.flatnonzero(mask).tolist()])
        union = pd.concat([union, kept]).drop_duplicates(KEY, ignore_index=True)
        number = numbers_of(frame, union)
        kept_edges = np.flatnonzero(pruned.edge_mask)
        edges = np.union1d(edges, number[graph.targets_of(kept_edges)] << _SHIFT | number[graph.indices[kept_edges]])
    order = sorted(texts) if match in ("position", "from_end") else list(texts)  # pyright: ignore[reportArgumentType]
    rank = {kind: number for number, kind in enumerate(_ORDER)}
    column = union.column.map({place: number for number, place in enumerate(order)}).fillna(-1).astype(np.int32)
    union = union.assign(column=column, rank=union.kind.map(rank))
    chosen = union.sort_values(["layer", "rank", "column", "token", "image", "top", "left", "name"])
    renamed = np.empty(len(union), np.int64)
    renamed[chosen.index] = np.arange(len(chosen))
    targets, sources = renamed[edges >> _SHIFT], renamed[edges & ((1 << _SHIFT) - 1)]
    nodes = MatchedNodes(
        chosen.kind.to_numpy(np.int8),
        chosen.layer.to_numpy(np.int16),
        chosen.column.to_numpy(np.int32),
        chosen.token.to_numpy(np.int64),
        chosen.image.to_numpy(np.int64),
        chosen[["left", "top", "right", "bottom"]].to_numpy(np.float64),
        chosen.label.tolist(),
    )
    columns = [place if isinstance(place, str) else " | ".join(texts[place]) for place in order]
    united = np.sort(targets << _SHIFT | sources)
    frame = chosen[KEY].reset_index(drop=True)
    return Layout(match, frame, united, nodes, columns, np.array([image[place] for place in order]))


def _label(graph: AttributionGraph, node: int) -> str:
    nodes = graph.nodes
    kind, layer, position, index = (int(v[node]) for v in (nodes.kind, nodes.layer, nodes.position, nodes.index))
    match NodeKind(kind):
        case NodeKind.TOKEN if (box := graph.patch_boxes[position]) is not None:
            x, y = box.centre
            return f"picture {graph.image_index[position] + 1} at {x:.0%}, {y:.0%}"
        case NodeKind.TOKEN:
            return f'"{graph.tokens[position]}"'
        case NodeKind.FEATURE:
            return f"feature {index} of layer {layer}"
        case NodeKind.ERROR | NodeKind.BIAS | NodeKind.LEFT_OUT as other:
            return f"{other.name.lower().replace('_', ' ')} L{layer}"
        case _:
            return graph.logit_tokens[node - int(graph.nodes.ends()[0])]


def _cell(graph: AttributionGraph, position: int) -> str:
    """`1: 2,3` for the soft token of picture 1 in row 2 and column 3, all from 1."""
    picture, box = int(graph.image_index[position]), graph.patch_boxes[position]
    assert box is not None, f"position {position} is no soft token"
    images = zip(graph.patch_boxes, graph.image_index, strict=True)
    boxes = [patch for patch, image in images if patch is not None and image == picture]
    row = sorted({patch.top for patch in boxes}).index(box.top) + 1
    column = sorted({patch.left for patch in boxes}).index(box.left) + 1
    return f"{picture + 1}: {row},{column}"


def project(pruned: PrunedGraph, layout: Layout) -> dict[str, np.ndarray]:
    """Values of one graph at a layout's M nodes and E edges.

    From the whole graph `share`, `activation` (NaN where absent) `[M]`, `weights` and `edge_share` `[E]`, float64; from
    it and its pruning bool `present`, `kept` `[M]` and `edge_kept` `[E]`.
    """
    graph = pruned.graph
    number = numbers_of(node_frame(graph, layout.match), layout.frame)
    flow = influence(graph, logit_weights(graph), counted(graph, pruned.bias))
    total = flow.nodes.sum() or 1.0
    inside = np.flatnonzero(number >= 0)
    m, e = len(layout.nodes), len(layout.edges)
    kept, present, edge_kept = np.zeros(m, bool), np.zeros(m, bool), np.zeros(e, bool)
    present[number[inside]] = True
    kept[number[inside[pruned.node_mask[inside]]]] = True
    activation = np.full(m, np.nan)
    shown = np.flatnonzero((number >= 0) & np.isin(graph.nodes.kind, (NodeKind.FEATURE, NodeKind.LOGIT)))
    np.fmax.at(activation, number[shown], graph.nodes.activation[shown].astype(np.float64))

    def find(targets: np.ndarray, sources: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places in the layout of edges between numbered nodes (-1: none), and a mask of the edges that it has."""
        codes = targets << _SHIFT | np.maximum(sources, 0)
        place = np.minimum(np.searchsorted(layout.edges, codes), max(e - 1, 0))
        return place, (targets >= 0) & (sources >= 0) & (layout.edges[place] == codes if e else False)

    weights, edge_share, per_edge = np.zeros(e), np.zeros(e), flow.per_edge / total
    for rows in row_blocks(graph, rows_of(graph, number >= 0)):
        signed, absolute = take_rows(graph, graph.weights, rows), absolute_rows(graph, rows)
        row = np.repeat(rows, np.diff(signed.indptr))
        place, hit = find(number[row], number[signed.indices])
        weights += np.bincount(place[hit], signed.data[hit], e)
        edge_share += np.bincount(place[hit], absolute.data[hit] * per_edge[row[hit]], e)
    edges = np.flatnonzero(pruned.edge_mask)
    place, hit = find(number[graph.targets_of(edges)], number[graph.indices[edges]])
    edge_kept[place[hit]] = True
    return {
        "share": np.bincount(number[inside], flow.nodes[inside], m) / total,
        "kept": kept,
        "present": present,
        "activation": activation,
        "weights": weights,
        "edge_share": edge_share,
        "edge_kept": edge_kept,
    }


def compare(
    first: PrunedGraph, second: PrunedGraph, names: Sequence[str] = ("first", "second"), match: str = "auto"
) -> GraphComparison:
    """Match two graphs by a rule; the weights of the first count as positive in the difference."""
    graphs = [first.graph, second.graph]
    _check_alike(first, second, names)
    layout = unite((first, second), choose_match(match, graphs))
    parts = project(first, layout), project(second, layout)
    both: dict[str, Any] = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return GraphComparison(
        nodes=layout.nodes,
        columns=layout.columns,
        column_is_image=layout.column_is_image,
        sources=(layout.edges & ((1 << _SHIFT) - 1)).astype(np.int32),
        targets=(layout.edges >> _SHIFT).astype(np.int32),
        match=layout.match,
        n_layers=first.graph.n_layers,
        model=str(first.graph.meta.get("model", "")),
        names=list(names),
        prompts=[graph.prompt for graph in graphs],
        **both,
    )


def graph_file(place: str | Path) -> Path:
    """The graph file of a run folder, or the file itself."""
    path = Path(place)
    file = path / GRAPH_FILE if path.is_dir() else path
    if not file.is_file():
        what = f"holds no {GRAPH_FILE}" if path.is_dir() else "is neither a run folder nor a file"
        raise UserError(f"{path} {what}; give the folder of a task=trace run")
    return file


def kept_by(merged: GraphComparison, kept: np.ndarray) -> np.ndarray:
    """Which of the two graphs keeps each node or edge, from `kept` [2, n]."""
    return np.select([kept.all(0), kept[0], kept[1]], ["both", *merged.names], "neither")


def write_tables(folder: str | Path, merged: GraphComparison, labels: Mapping[FeatureId, str] | None = None) -> None:
    """Write `nodes.csv` and `edges.csv`, the largest difference first.

    With `labels` nodes have a last column `label`.
    """
    table, where = merged.nodes, np.array([merged.where(node) for node in range(len(merged.nodes))], dtype=object)
    names = np.array([table.name(node) for node in range(len(table))], dtype=object)
    kinds = [NodeKind(kind).name.lower() for kind in table.kind.tolist()]
    nodes: dict[str, Any] = {"node": names, "kind": kinds, "where": where}
    edges: dict[str, Any] = {
        f"{end}{what}": values[numbers]
        for end, numbers in (("source", merged.sources), ("target", merged.targets))
        for what, values in (("", names), ("_where", where))
    }
    share, edge_share = merged.share[0] - merged.share[1], merged.edge_share[0] - merged.edge_share[1]
    nodes |= {"share_first": merged.share[0], "share_second": merged.share[1], "share_difference": share}
    nodes |= {"activation_first": merged.activation[0], "activation_second": merged.activation[1]}
    nodes["kept_by"] = kept_by(merged, merged.kept)
    edges |= {"weight_first": merged.weights[0], "weight_second": merged.weights[1]}
    edges |= {"difference": merged.difference}
    edges |= {"share_first": merged.edge_share[0], "share_second": merged.edge_share[1]}
    edges["kept_by"] = kept_by(merged, merged.edge_kept)
    if labels:
        ids = map(FeatureId, table.layer.tolist(), table.index.tolist())
        is_feature = table.kind == NodeKind.FEATURE
        nodes["label"] = [labels.get(name, "") if known else "" for name, known in zip(ids, is_feature, strict=True)]
    for name, columns, size in (("nodes", nodes, share), ("edges", edges, edge_share)):
        rows = pd.DataFrame(columns).iloc[np.argsort(-np.abs(size), kind="stable")]
        write_text(Path(folder) / f"{name}.csv", rows.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
