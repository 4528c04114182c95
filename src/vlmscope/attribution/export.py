"""Files of one graph: `graph.safetensors`, exact, and `graph.json` for viewers.

`graph.safetensors`: a graph, whole and pruned, bit for bit. Layout: `docs/formats.md`.

`graph.json`: the pruned graph for Neuronpedia's and circuit-tracer's viewers, valid against their schema.

What they do not know is in extra keys: `vlmscope` at the top (schema version, scores, prompt tokens with modality and
patch box) and `modality`, `patch` at nodes. String ids exist only here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.core.artifacts import built_from, load_tensors, save_tensors, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, AttributionGraph, GraphScores, NodeKind, NodeTable, PrunedGraph
from vlmscope.core.records import FeatureId, PatchBox

FORMAT, VERSION = "vlmscope.graph", "2"
# Version 1 had no weights of what is explained: they were the probabilities.
_READ = ("1", VERSION)

_NODE_FIELDS = tuple(field.name for field in dataclasses.fields(NodeTable))
_GRAPH_ARRAYS = (
    "indptr",
    "indices",
    "weights",
    "residual",
    "left_out_mass",
    "logit_probabilities",
    "is_image",
    "image_index",
)
_PRUNED_ARRAYS = ("node_mask", "edge_mask", "influence", "cumulative")


def save_graph(path: str | Path, pruned: PrunedGraph) -> None:
    """Write a graph and its pruning, atomically.

    Raises:
        UserError: when the file cannot be written.
    """
    graph = pruned.graph
    arrays = {f"node_{name}": getattr(graph.nodes, name) for name in _NODE_FIELDS}
    arrays |= {name: getattr(graph, name) for name in _GRAPH_ARRAYS}
    arrays |= {name: getattr(pruned, name) for name in _PRUNED_ARRAYS}
    arrays["target_weights"] = graph.end_weights
    arrays["patch_boxes"] = np.array(
        [(np.nan,) * 4 if box is None else tuple(box) for box in graph.patch_boxes], dtype=np.float64
    )
    words = {
        "tokens": graph.tokens,
        "logit_tokens": graph.logit_tokens,
        "roles": graph.roles.tolist(),
        "prompt": graph.prompt,
        "meta": graph.meta,
        "scores": dataclasses.asdict(pruned.scores),
        "node_threshold": pruned.node_threshold,
        "edge_threshold": pruned.edge_threshold,
    }
    # Python writes floats with as many digits as bring the same bits back.
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in words.items()}
    save_tensors(path, arrays, {"format": FORMAT, "version": VERSION, **metadata})


def load_graph(path: str | Path) -> PrunedGraph:
    """Read what `save_graph` wrote.

    Raises:
        UserError: when the file is missing, is no graph, or was written in another version of the layout.
    """
    arrays, metadata = load_tensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not an attribution graph; give the graph.safetensors of a trace")
    if metadata.get("version") not in _READ:
        raise UserError(f"{path} has graph layout {metadata.get('version')}, this program reads {VERSION}; trace anew")
    with built_from(path, "attribution graph", "trace again"):
        words = {name: json.loads(text) for name, text in metadata.items() if name not in ("format", "version")}
        boxes = [None if np.isnan(row[0]) else PatchBox(*row.tolist()) for row in arrays["patch_boxes"]]
        graph = AttributionGraph(
            nodes=NodeTable(**{name: arrays[f"node_{name}"] for name in _NODE_FIELDS}),
            **{name: arrays[name] for name in _GRAPH_ARRAYS},
            logit_tokens=words["logit_tokens"],
            tokens=words["tokens"],
            patch_boxes=boxes,
            roles=np.array(words["roles"]),
            prompt=words["prompt"],
            meta=words["meta"],
            target_weights=arrays.get("target_weights"),
        )
        pruned = PrunedGraph(
            graph=graph,
            **{name: arrays[name] for name in _PRUNED_ARRAYS},
            scores=GraphScores(**words["scores"]),
            node_threshold=words["node_threshold"],
            edge_threshold=words["edge_threshold"],
        )
        _check_lengths(pruned)
        return pruned


def _check_lengths(pruned: PrunedGraph) -> None:
    """Raise a `ValueError` for arrays of different graphs, which would be read past their ends later on."""
    graph = pruned.graph
    n, e = len(graph.nodes), len(graph.indices)
    by_node = [*vars(graph.nodes).values(), graph.residual, graph.indptr[1:], pruned.node_mask, pruned.influence]
    if any(array.shape != (n,) for array in by_node) or any(len(a) != e for a in (graph.weights, pruned.edge_mask)):
        raise ValueError(f"its arrays do not have one length: {n} nodes, {e} edges")
    if graph.indptr[0] != 0 or graph.indptr[-1] != e or (np.diff(graph.indptr) < 0).any():
        raise ValueError(f"indptr does not divide {e} edges")
    if e and not 0 <= graph.indices.min() <= graph.indices.max() < n:
        raise ValueError(f"an edge comes from a node that is none of {n}")


_LOG = logging.getLogger(__name__)
SCHEMA_VERSION = 2
UPLOAD_MB = 100.0  # Neuronpedia takes no larger file

# The viewers draw the first four by these names.
FEATURE_TYPES = {
    NodeKind.TOKEN: "embedding",
    NodeKind.FEATURE: "cross layer transcoder",
    NodeKind.ERROR: "mlp reconstruction error",
    NodeKind.LOGIT: "logit",
    NodeKind.BIAS: "bias",
    NodeKind.LEFT_OUT: "left out features",
    NodeKind.TARGET: "logit",  # the viewers know no other kind of end; `clerp` says what it is
}


def cantor_pair(layer: int, index: int) -> int:
    """The one number that the viewers know a feature by; see `FeatureId.cantor`."""
    return FeatureId(layer, index).cantor


def node_id(graph: AttributionGraph, node: int) -> str:
    """The id of a node, unique in its graph: only features and logits begin with a number."""
    table = graph.nodes
    layer, position = int(table.layer[node]), int(table.position[node])
    if table.kind[node] == NodeKind.TARGET:
        return f"TARGET_{_number_of_end(graph, node)}_{layer}_{position}"
    return source_id(NodeKind(int(table.kind[node])), layer, position, int(table.index[node]))


def source_id(kind: NodeKind, layer: int, position: int, index: int) -> str:
    """The id of a node that these fields tell from all others of its graph: any but a TARGET."""
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
            raise AssertionError("targets are told apart by their number")


def _number_of_end(graph: AttributionGraph, node: int) -> int:
    return node - int(graph.nodes.ends()[0])


def _label(graph: AttributionGraph, node: int, labels: Mapping[FeatureId, str]) -> str:
    table = graph.nodes
    layer, position = int(table.layer[node]), int(table.position[node])
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
        case NodeKind.LOGIT:
            number = _number_of_end(graph, node)
            return f'Output "{graph.logit_tokens[number]}" (p={graph.logit_probabilities[number]:.3f})'
        case NodeKind.TARGET:
            return f"{graph.logit_tokens[_number_of_end(graph, node)]} = {table.target[node]:+.3f}"


def _layer(graph: AttributionGraph, node: int) -> str:
    layer = int(graph.nodes.layer[node])
    match NodeKind(int(graph.nodes.kind[node])):
        case NodeKind.TOKEN:
            return "E"
        case NodeKind.LOGIT | NodeKind.TARGET:
            return str(layer + 1)  # a target above what its own layer adds
        case _:
            return str(layer)


def _patch(graph: AttributionGraph, position: int) -> dict[str, Any] | None:
    box = graph.patch_boxes[position] if position >= 0 else None
    return None if box is None else {"image": int(graph.image_index[position]), "box": list(box)}


def _modality(graph: AttributionGraph, position: int) -> str | None:
    if position < 0:
        return None
    return "image" if graph.is_image[position] else "text"


def _node(pruned: PrunedGraph, node: int, labels: Mapping[FeatureId, str]) -> dict[str, Any]:
    graph, table = pruned.graph, pruned.graph.nodes
    kind, position = NodeKind(int(table.kind[node])), int(table.position[node])
    name, end = node_id(graph, node), kind in ENDS
    feature: int | None = None
    if kind == NodeKind.FEATURE:
        feature = cantor_pair(int(table.layer[node]), int(table.index[node]))
    elif kind in (NodeKind.TOKEN, NodeKind.LOGIT):
        feature = int(table.index[node])
    record: dict[str, Any] = {
        "node_id": name,
        "feature": feature,
        "layer": _layer(graph, node),
        # Nodes without a position stand at the first, where the viewers find room for them.
        "ctx_idx": max(position, 0),
        "feature_type": FEATURE_TYPES[kind],
        "token_prob": float(table.activation[node]) if kind == NodeKind.LOGIT else 0.0,
        "is_target_logit": end and _number_of_end(graph, node) == 0,
        "jsNodeId": name,
        "clerp": _label(graph, node, labels),
        "influence": None if end else float(pruned.cumulative[node]),
        "activation": _number(table.activation[node]) if kind == NodeKind.FEATURE else None,
        "modality": _modality(graph, position),
    }
    patch = _patch(graph, position)
    return record if patch is None else {**record, "patch": patch}


def _number(value: np.floating) -> float:
    """The shortest decimal that gives the same bits back in the value's own dtype."""
    return float(str(value))


def graph_to_json(
    pruned: PrunedGraph,
    slug: str,
    scan: str,
    labels: Mapping[FeatureId, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The pruned graph as the viewers' JSON.

    Args:
        pruned: the graph; edges that it keeps become links with exactly their weights.
        slug: name of the graph.
        scan: name of the model.
        labels: what features mean, where known.
        extra: more for the key `vlmscope`.
    """
    graph = pruned.graph
    kept = np.flatnonzero(pruned.node_mask)
    names = {int(node): node_id(graph, int(node)) for node in kept}
    edges = np.flatnonzero(pruned.edge_mask)
    ends = zip(graph.indices[edges].tolist(), graph.targets_of(edges).tolist(), graph.weights[edges], strict=True)
    tokens = [
        {"token": token, "modality": _modality(graph, position), "role": str(graph.roles[position])}
        | ({"patch": patch} if (patch := _patch(graph, position)) else {})
        for position, token in enumerate(graph.tokens)
    ]
    return {
        "metadata": {
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
            "pruning_settings": {
                "node_threshold": pruned.node_threshold,
                "edge_threshold": pruned.edge_threshold,
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(pruned, int(node), labels or {}) for node in kept],
        "links": [{"source": names[s], "target": names[t], "weight": _number(w)} for s, t, w in ends],
        "vlmscope": {
            "schema_version": SCHEMA_VERSION,
            "tokens": tokens,
            "scores": {name: float(value) for name, value in vars(pruned.scores).items()},
            "n_nodes_unpruned": graph.n_nodes,
            "n_edges_unpruned": graph.n_edges,
            "target": str(graph.meta.get("target", "logits")),
            "target_weights": [float(weight) for weight in graph.end_weights],
            **(extra or {}),
        },
    }


def write_graph_json(
    path: str | Path,
    pruned: PrunedGraph,
    slug: str,
    scan: str,
    labels: Mapping[FeatureId, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> float:
    """Write `graph_to_json` to a file, atomically; returns its size in megabytes (10^6 bytes).

    A file that is too large for an upload to Neuronpedia is written all the same, with a warning that says what to
    change.

    Raises:
        UserError: when the file cannot be written.
    """
    advice = "attribution.edge_threshold, attribution.node_threshold or attribution.max_nodes lower"
    return write_graph_body(path, graph_to_json(pruned, slug, scan, labels, extra), advice)


def write_graph_body(path: str | Path, body: Mapping[str, Any], advice: str) -> float:
    """Write a graph's JSON as `write_graph_json` does; `advice` ends the warning "make ..."."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False) + "\n"
    size = len(text.encode()) / 1e6
    if size > UPLOAD_MB:
        _LOG.warning("%s has %.0f MB, Neuronpedia takes %.0f at most; make %s", path, size, UPLOAD_MB, advice)
    write_text(path, text)
    return size
