"""`graph.safetensors`: a graph, whole and pruned, bit for bit. Layout: `docs/formats.md`."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, GraphScores, NodeTable, PrunedGraph
from vlmscope.core.images import PatchBox

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
