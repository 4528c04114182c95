"""Files of graphs: exact ones in safetensors, and `graph.json` for viewers (docs/formats.md, docs/graphs.md).

`graph.safetensors` holds a graph, whole and pruned, bit for bit; `comparison.safetensors` and `aggregate.safetensors`
hold merged graphs. `graph.json` is valid against the schema of Neuronpedia's and circuit-tracer's viewers; what the
schema lacks is in extra keys: `vlmscope` at the top (with the pictures), `modality` and `patch` at nodes. String ids
exist only here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscope.attribution.influence import scores
from vlmscope.core.artifacts import built_from, load_tensors, save_tensors, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.graph import (
    ENDS,
    AggregateGraph,
    AttributionGraph,
    GraphComparison,
    GraphScores,
    MatchedNodes,
    NodeKind,
    NodeTable,
    PrunedGraph,
)
from vlmscope.core.records import FeatureId, PatchBox
from vlmscope.data.images import embedded

_LOG = logging.getLogger(__name__)

Merged = GraphComparison | AggregateGraph
Labels = Mapping[FeatureId, str] | None

GRAPH_FILE = "graph.safetensors"
FORMAT, VERSION = "vlmscope.graph", "3"
# Version 1 had no target weights: they were the probabilities. Before 3, biases were always nodes, and scores without
# them were not kept.
_READ = ("1", "2", VERSION)
_MERGED_FORMATS = {"vlmscope.comparison": GraphComparison, "vlmscope.aggregate": AggregateGraph}
_MERGED_VERSION = "1"
SCHEMA_VERSION = 2
UPLOAD_MB = 100.0  # Neuronpedia takes no larger file

_NODE_FIELDS = tuple(field.name for field in dataclasses.fields(NodeTable))
_EDGE_ARRAYS = ("indptr", "indices", "weights", "residual", "left_out_mass")
_GRAPH_ARRAYS = (*_EDGE_ARRAYS, "logit_probabilities", "is_image", "image_index")
_PRUNED_ARRAYS = ("node_mask", "edge_mask", "influence", "cumulative")
_SCORES = tuple(field.name for field in dataclasses.fields(GraphScores))
_GRAPH_WORDS = ("tokens", "logit_tokens", "prompt", "meta")
_PRUNED_WORDS = ("node_threshold", "edge_threshold", "bias")

# The viewers draw the first four by these names.
_FEATURE_TYPES = {
    NodeKind.TOKEN: "embedding",
    NodeKind.FEATURE: "cross layer transcoder",
    NodeKind.ERROR: "mlp reconstruction error",
    NodeKind.LOGIT: "logit",
    NodeKind.BIAS: "bias",
    NodeKind.LEFT_OUT: "left out features",
    NodeKind.TARGET: "logit",  # the viewers know no other kind of end; `clerp` says what it is
}


def save_graph(path: str | Path, pruned: PrunedGraph) -> None:
    """Write a graph with its pruning, atomically."""
    graph = pruned.graph
    arrays = {f"node_{name}": getattr(graph.nodes, name) for name in _NODE_FIELDS}
    arrays |= {name: getattr(graph, name) for name in _GRAPH_ARRAYS}
    arrays |= {name: getattr(pruned, name) for name in _PRUNED_ARRAYS}
    arrays["target_weights"] = graph.end_weights
    boxes = [(np.nan,) * 4 if box is None else tuple(box) for box in graph.patch_boxes]
    arrays["patch_boxes"] = np.array(boxes, dtype=np.float64)
    words = {name: getattr(graph, name) for name in _GRAPH_WORDS} | {"roles": graph.roles.tolist()}
    words |= {name: getattr(pruned, name) for name in _PRUNED_WORDS} | {"scores": dataclasses.asdict(pruned.scores)}
    _save(path, arrays, words, FORMAT, VERSION)


def load_graph(path: str | Path) -> PrunedGraph:
    """Read what `save_graph` wrote."""
    _, arrays, words = _load(path, (FORMAT,), _READ, "attribution graph that task=trace wrote")
    with built_from(path, "attribution graph", "trace again"):
        graph = AttributionGraph(
            nodes=NodeTable(**{name: arrays[f"node_{name}"] for name in _NODE_FIELDS}),
            **{name: arrays[name] for name in _GRAPH_ARRAYS},
            **{name: words[name] for name in _GRAPH_WORDS},
            patch_boxes=[None if np.isnan(row[0]) else PatchBox(*row.tolist()) for row in arrays["patch_boxes"]],
            roles=np.array(words["roles"]),
            target_weights=arrays.get("target_weights"),
        )
        pruning: dict[str, Any] = {name: arrays[name] for name in _PRUNED_ARRAYS}
        pruning |= {name: words[name] for name in _PRUNED_WORDS if name in words}
        known = GraphScores(**{**dict.fromkeys(_SCORES, 0.0), **words["scores"]})
        pruned = PrunedGraph(graph=graph, scores=known, **pruning)
        _check_lengths(pruned)
        old = len(words["scores"]) < len(_SCORES)
        return dataclasses.replace(pruned, scores=scores(graph)) if old else pruned


def _check_lengths(pruned: PrunedGraph) -> None:
    """Raise a `ValueError` for arrays of different graphs, which would be read past their ends later."""
    graph = pruned.graph
    n, e = len(graph.nodes), len(graph.indices)
    by_node = [*vars(graph.nodes).values(), graph.residual, graph.indptr[1:], pruned.node_mask, pruned.influence]
    if any(array.shape != (n,) for array in by_node) or any(len(a) != e for a in (graph.weights, pruned.edge_mask)):
        raise ValueError(f"its arrays do not have one length: {n} nodes, {e} edges")
    if graph.indptr[0] != 0 or graph.indptr[-1] != e or (np.diff(graph.indptr) < 0).any():
        raise ValueError(f"indptr does not divide {e} edges")
    if e and not 0 <= graph.indices.min() <= graph.indices.max() < n:
        raise ValueError(f"an edge comes from a node that is none of {n}")


def save_merged(path: str | Path, merged: Merged) -> None:
    """Write a comparison or an aggregate, atomically."""
    values = {f"node_{name}": value for name, value in vars(merged.nodes).items()}
    values |= {name: value for name, value in vars(merged).items() if name != "nodes"}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    words = {name: value for name, value in values.items() if name not in arrays}
    form = next(name for name, kind in _MERGED_FORMATS.items() if isinstance(merged, kind))
    _save(path, arrays, words, form, _MERGED_VERSION)


def load_merged(path: str | Path) -> Merged:
    """Read what `save_merged` wrote."""
    form, arrays, words = _load(path, _MERGED_FORMATS, (_MERGED_VERSION,), "comparison or aggregate of graphs")
    with built_from(path, "comparison or aggregate", "make it again"):
        values: dict[str, Any] = {**arrays, **words}
        names = [field.name for field in dataclasses.fields(MatchedNodes)]
        return _MERGED_FORMATS[form](
            nodes=MatchedNodes(**{name: values.pop(f"node_{name}") for name in names}), **values
        )


def _save(path: str | Path, arrays: dict[str, np.ndarray], words: dict[str, Any], form: str, version: str) -> None:
    # Python writes floats with as many digits as bring the same bits back.
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in words.items()}
    save_tensors(path, arrays, {"format": form, "version": version, **metadata})


def _load(
    path: str | Path, forms: Collection[str], versions: Collection[str], what: str
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """The format, the arrays and the words of a file that `_save` wrote."""
    arrays, metadata = load_tensors(path)
    form, version = metadata.pop("format", ""), metadata.pop("version", "")
    if form not in forms:
        raise UserError(f"{path} is no {what}; give another file")
    if version not in versions:
        raise UserError(f"{path} has layout {version}, this program reads {', '.join(versions)}; create it again")
    with built_from(path, what, "create it again"):
        return form, arrays, {name: json.loads(text) for name, text in metadata.items()}


def node_id(graph: AttributionGraph, node: int) -> str:
    """The id of a node, unique in its graph: only those of features and logits begin with a number."""
    table = graph.nodes
    layer, position = int(table.layer[node]), int(table.position[node])
    if table.kind[node] == NodeKind.TARGET:
        return f"TARGET_{node - int(table.ends()[0])}_{layer}_{position}"
    return source_id(NodeKind(int(table.kind[node])), layer, position, int(table.index[node]))


def source_id(kind: NodeKind, layer: int, position: int, index: int) -> str:
    """The id of a node of any kind but TARGET; these fields identify it in its graph."""
    match kind:
        case NodeKind.TOKEN:
            return f"E_{index}_{position}"
        case NodeKind.FEATURE:
            return f"{layer}_{index}_{position}"
        case NodeKind.ERROR:
            return f"ERR_{layer}_{position}"
        case NodeKind.BIAS:
            return f"BIAS_{layer}"
        case NodeKind.LEFT_OUT:
            return f"REST_{layer}"
        case NodeKind.LOGIT:
            # The viewers put logits one layer above the last, as circuit-tracer does.
            return f"{layer + 1}_{index}_{position}"
        case NodeKind.TARGET:
            raise AssertionError("targets have ids by their number")


def graph_to_json(
    pruned: PrunedGraph,
    slug: str,
    scan: str,
    labels: Labels = None,
    extra: Mapping[str, Any] | None = None,
    pictures: Sequence[Image.Image] = (),
) -> dict[str, Any]:
    """The pruned graph as the viewers' JSON; kept edges become links with exactly their weights.

    `slug` is the graph's name, `scan` the model's; `extra` joins the values under the key `vlmscope`, small copies of
    the prompt's `pictures` among them.
    """
    graph, table = pruned.graph, pruned.graph.nodes
    names = {node: node_id(graph, node) for node in np.flatnonzero(pruned.node_mask).tolist()}
    where = []
    for position, image in enumerate(graph.is_image):
        box = graph.patch_boxes[position]
        patch = {} if box is None else {"patch": {"image": int(graph.image_index[position]), "box": list(box)}}
        where.append({"modality": "image" if image else "text", **patch})
    nodes, first_end = [], int(table.ends()[0])
    for node, name in names.items():
        position, value = int(table.position[node]), _number(table.activation[node])
        label = _label(graph, node, first_end, labels or {})
        record = _viewer_node(table, node, name, label, value, pruned.cumulative[node])
        record["is_target_logit"] = node == first_end
        nodes.append({**record, "modality": None, **(where[position] if position >= 0 else {})})
    edges = np.flatnonzero(pruned.edge_mask)
    ends = zip(graph.indices[edges].tolist(), graph.targets_of(edges).tolist(), graph.weights[edges], strict=True)
    links = [{"source": names[s], "target": names[t], "weight": _number(w)} for s, t, w in ends]
    metadata = {
        "slug": slug,
        "scan": scan,
        "prompt_tokens": list(graph.tokens),
        "prompt": graph.prompt,
        "node_threshold": pruned.node_threshold,
        "info": {"generator": {"name": "vlmscope"}},
        "generation_settings": {
            "max_n_logits": int(graph.meta["max_logits"]),
            "desired_logit_prob": float(graph.meta["logit_mass"]),
            "max_feature_nodes": int(graph.meta["max_nodes"]),
        },
        "pruning_settings": {"node_threshold": pruned.node_threshold, "edge_threshold": pruned.edge_threshold},
    }
    details = {
        "schema_version": SCHEMA_VERSION,
        "tokens": [
            {"token": token, "role": str(role), **place}
            for token, role, place in zip(graph.tokens, graph.roles, where, strict=True)
        ],
        "scores": {name: float(value) for name, value in vars(pruned.scores).items()},
        "bias": pruned.bias,
        "n_nodes_unpruned": graph.n_nodes,
        "n_edges_unpruned": graph.n_edges,
        "target": str(graph.meta.get("target", "logits")),
        "target_weights": [float(weight) for weight in graph.end_weights],
        "pictures": [embedded(picture) for picture in pictures],
        **(extra or {}),
    }
    view = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
    return {"metadata": metadata, "qParams": view, "nodes": nodes, "links": links, "vlmscope": details}


def _viewer_node(table: NodeTable, node: int, name: str, label: str, value: float, cumulative: float) -> dict[str, Any]:
    """A node as the viewers read it; `value` is a feature's activation or a logit's probability."""
    kind, layer, index = NodeKind(int(table.kind[node])), int(table.layer[node]), int(table.index[node])
    end = kind in ENDS
    feature = index if kind in (NodeKind.TOKEN, NodeKind.LOGIT) and index >= 0 else None
    return {
        "node_id": name,
        "feature": FeatureId(layer, index).cantor if kind == NodeKind.FEATURE else feature,
        # Ends are drawn one layer up, above what their own layer adds.
        "layer": "E" if kind == NodeKind.TOKEN else str(layer + end),
        # The viewers need a position; nodes without one are drawn at the first.
        "ctx_idx": max(int(table.position[node]), 0),
        "feature_type": _FEATURE_TYPES[kind],
        "token_prob": value if kind == NodeKind.LOGIT else 0.0,
        "jsNodeId": name,
        "clerp": label,
        "influence": None if end else float(cumulative),
        "activation": value if kind == NodeKind.FEATURE else None,
    }


def _label(graph: AttributionGraph, node: int, first_end: int, labels: Mapping[FeatureId, str]) -> str:
    table = graph.nodes
    layer, position, end = int(table.layer[node]), int(table.position[node]), node - first_end
    match NodeKind(int(table.kind[node])):
        case NodeKind.TOKEN:
            return f'Emb: "{graph.tokens[position]}"'
        case NodeKind.FEATURE:
            return labels.get(table.feature_id(node), "")
        case NodeKind.ERROR:
            return f"Err: layer {layer}, position {position}"
        case NodeKind.BIAS:
            return f"Bias: layer {layer}"
        case NodeKind.LEFT_OUT:
            return f"Features left out: layer {layer}"
        case NodeKind.LOGIT:  # the viewers read the probability out of the label
            return f'Output "{graph.logit_tokens[end]}" (p={graph.logit_probabilities[end]:.3f})'
        case NodeKind.TARGET:
            return f"{graph.logit_tokens[end]} = {table.target[node]:+.3f}"


def _number(value: np.floating) -> float:
    """The shortest decimal that gives the same bits in the value's own dtype."""
    return float(str(value))


def write_graph_json(
    path: str | Path,
    pruned: PrunedGraph,
    slug: str,
    scan: str,
    labels: Labels = None,
    extra: Mapping[str, Any] | None = None,
    pictures: Sequence[Image.Image] = (),
) -> float:
    """Write `graph_to_json`, atomically; returns its size in megabytes (10^6 bytes).

    A file too large for an upload to Neuronpedia is written too, with a warning.
    """
    body = graph_to_json(pruned, slug, scan, labels, extra, pictures)
    text = json.dumps(body, ensure_ascii=False, allow_nan=False) + "\n"
    size = len(text.encode()) / 1e6
    if size > UPLOAD_MB:
        advice = "attribution.edge_threshold, attribution.node_threshold or attribution.max_nodes lower"
        _LOG.warning("%s has %.0f MB, Neuronpedia takes %.0f at most; make %s", path, size, UPLOAD_MB, advice)
    write_text(path, text)
    return size
