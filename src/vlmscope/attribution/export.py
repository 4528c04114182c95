"""Files of graphs: exact ones in safetensors, and `graph.json` for viewers (docs/formats.md, docs/graphs.md).

`graph.safetensors` holds a graph, whole and pruned, bit for bit. `graph.json` is valid against the schema of
Neuronpedia's and circuit-tracer's viewers; what the schema lacks is in extra keys: `vlmscope` at the top (with the
pictures), `modality` and `patch` at nodes. String ids exist only here.

*What a file shows first.* Pinned are the ends, and of soft tokens, words and features each the fewest nodes with half
of their kind's influence, at most `_MOST`. With groups of features given, as a circuit has them, the members that
pruning kept are pinned in place of the strongest features, and are its supernodes.

Else nodes are joined by one distance, average linkage up to 1/2: infinite between nodes of two kinds or roles, 0 where
both have one label, else 1 minus the mean of two cosines, that of the edges into both and that of the edges out of both
(each over its target's sum of |edges|). Soft tokens have one label, words stay alone. A supernode has at least two
nodes, and is named by the label of its strongest member, or by that feature.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from vlmscope.attribution.influence import SubgraphScores, scores, subgraph_scores
from vlmscope.core.artifacts import built_from, load_tensors, read_json, save_tensors, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.graph import (
    ENDS,
    AttributionGraph,
    EdgeHeads,
    GraphScores,
    NodeKind,
    NodeTable,
    PrunedGraph,
    QueryKeys,
    Source,
)
from vlmscope.core.records import TOWER, FeatureId, PatchBox, layer_name
from vlmscope.data.images import embedded

_LOG = logging.getLogger(__name__)

Labels = Mapping[FeatureId, str] | None

GRAPH_FILE, GRAPH_JSON = "graph.safetensors", "graph.json"
FORMAT, VERSION = "vlmscope.graph", "3"
# Version 1 had no target weights: they were the probabilities. Before 3, biases were always nodes, and scores without
# them were not kept.
_READ = ("1", "2", VERSION)
SCHEMA_VERSION = 2
UPLOAD_MB = 100.0  # Neuronpedia takes no larger file

_NODE_FIELDS = tuple(field.name for field in dataclasses.fields(NodeTable))
_EDGE_ARRAYS = ("indptr", "indices", "weights", "residual", "left_out_mass")
_GRAPH_ARRAYS = (*_EDGE_ARRAYS, "logit_probabilities", "is_image", "image_index")
_PRUNED_ARRAYS = ("node_mask", "edge_mask", "influence", "cumulative")
_SCORES = tuple(field.name for field in dataclasses.fields(GraphScores))
_GRAPH_WORDS = ("tokens", "logit_tokens", "prompt", "meta")
_PRUNED_WORDS = ("node_threshold", "edge_threshold", "bias")
_HEAD_ARRAYS = ("edges", "strength", "loadings", "stream", "skip")
_HEADS_OF_LINK, _LEAST_SHARE = 4, 0.01  # heads named at a link: at most so many, each with so much of its weight
_HEADS_OF_GRAPH = 32

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
    if pruned.heads is not None:
        arrays |= {f"head_{name}": getattr(pruned.heads, name) for name in _HEAD_ARRAYS}
        found = [vars(one) for one in pruned.heads.query_keys]
        words["heads"] = {"query_keys": found, "seconds": pruned.heads.seconds}
    # Python writes floats with as many digits as bring the same bits back.
    metadata = {name: json.dumps(value, ensure_ascii=False) for name, value in words.items()}
    save_tensors(path, arrays, {"format": FORMAT, "version": VERSION, **metadata})


def load_graph(path: str | Path) -> PrunedGraph:
    """Read what `save_graph` wrote."""
    arrays, metadata = load_tensors(path)
    form, version = metadata.pop("format", ""), metadata.pop("version", "")
    if form != FORMAT:
        raise UserError(f"{path} is no attribution graph that task=trace wrote; give another file")
    if version not in _READ:
        raise UserError(f"{path} has layout {version}, this program reads {', '.join(_READ)}; create it again")
    with built_from(path, "attribution graph", "trace again"):
        words = {name: json.loads(text) for name, text in metadata.items()}
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
        if "heads" in words:
            found = [_query_keys(one) for one in words["heads"]["query_keys"]]
            loaded = {name: arrays[f"head_{name}"] for name in _HEAD_ARRAYS}
            pruning["heads"] = EdgeHeads(**loaded, query_keys=found, seconds=words["heads"]["seconds"])
        known = GraphScores(**{**dict.fromkeys(_SCORES, 0.0), **words["scores"]})
        pruned = PrunedGraph(graph=graph, scores=known, **pruning)
        _check_lengths(pruned)
        old = len(words["scores"]) < len(_SCORES)
        return dataclasses.replace(pruned, scores=scores(graph)) if old else pruned


def _source(row: list[int]) -> Source:
    return Source(NodeKind(row[0]), *row[1:])


def _query_keys(body: dict[str, Any]) -> QueryKeys:
    """What `vars` gave, through JSON, which has lists for tuples."""
    sides = {name: [(_source(one), term) for one, term in body[name]] for name in ("queries", "keys")}
    pairs = [(_source(query), _source(key), term) for query, key, term in body["pairs"]]
    return QueryKeys(**{**body, **sides, "pairs": pairs})


def _check_lengths(pruned: PrunedGraph) -> None:
    """Raise a `ValueError` for arrays of different graphs, which would be read past their ends later."""
    graph = pruned.graph
    n, e = len(graph.nodes), len(graph.indices)
    by_node = [*vars(graph.nodes).values(), graph.residual, graph.indptr[1:], pruned.node_mask, pruned.influence]
    if any(array.shape != (n,) for array in by_node) or any(len(a) != e for a in (graph.weights, pruned.edge_mask)):
        raise ValueError(f"its arrays do not have one length: {n} nodes, {e} edges")
    if pruned.heads is not None:
        sizes = [len(getattr(pruned.heads, name)) for name in _HEAD_ARRAYS]
        if len(set(sizes)) > 1 or (sizes[0] and not 0 <= pruned.heads.edges.min() <= pruned.heads.edges.max() < e):
            raise ValueError(f"its heads are not of its {e} edges")
    if graph.indptr[0] != 0 or graph.indptr[-1] != e or (np.diff(graph.indptr) < 0).any():
        raise ValueError(f"indptr does not divide {e} edges")
    if e and not 0 <= graph.indices.min() <= graph.indices.max() < n:
        raise ValueError(f"an edge comes from a node that is none of {n}")


def node_id(graph: AttributionGraph, node: int) -> str:
    """The id of a node, unique in its graph: only those of features and logits begin with a number."""
    table = graph.nodes
    layer, position = int(table.layer[node]), int(table.position[node])
    if table.kind[node] == NodeKind.TARGET:
        return f"TARGET_{node - int(table.ends()[0])}_{layer}_{position}"
    return source_id(table.source(node))


def source_id(source: Source) -> str:
    """The id of a node of any kind but TARGET; these fields identify it in its graph."""
    kind, layer, position, index = source
    match kind:
        case NodeKind.TOKEN if layer < -1:
            return f"PATCH_{position}"
        case NodeKind.TOKEN:
            return f"E_{index}_{position}"
        case NodeKind.FEATURE:
            return f"{_layer(layer)}_{index}_{position}"
        case NodeKind.ERROR:
            return f"ERR_{_layer(layer)}_{position}"
        case NodeKind.BIAS:
            return f"BIAS_{_layer(layer)}"
        case NodeKind.LEFT_OUT:
            return f"REST_{_layer(layer)}"
        case NodeKind.LOGIT:
            # The viewers put logits one layer above the last, as circuit-tracer does.
            return f"{layer + 1}_{index}_{position}"
        case NodeKind.TARGET:
            raise AssertionError("targets have ids by their number")


def _layer(layer: int) -> str:
    """A layer as the viewers read it: `T0` of the vision tower, whose patches are at `P`."""
    return str(layer) if layer >= -1 else "P" if layer < TOWER else layer_name(layer)


def graph_to_json(
    pruned: PrunedGraph,
    slug: str,
    scan: str,
    labels: Labels = None,
    extra: Mapping[str, Any] | None = None,
    pictures: Sequence[Image.Image] = (),
    groups: Labels = None,
) -> dict[str, Any]:
    """The pruned graph as the viewers' JSON; kept edges become links with exactly their weights.

    `slug` is the graph's name, `scan` the model's; `extra` joins the values under the key `vlmscope`, small copies of
    the prompt's `pictures` among them. `groups` names the supernodes of features, which are found otherwise.
    """
    graph, table = pruned.graph, pruned.graph.nodes
    names = {node: node_id(graph, node) for node in np.flatnonzero(pruned.node_mask).tolist()}
    where = []
    for position, image in enumerate(graph.is_image):
        box = graph.patch_boxes[position]
        patch = {} if box is None else {"patch": {"image": int(graph.image_index[position]), "box": list(box)}}
        where.append({"modality": "image" if image else "text", **patch})
    nodes, first_end, columns = [], int(table.ends()[0]), graph.prompt_positions()
    n_tokens = len(graph.tokens) - graph.n_patches
    for node, name in names.items():
        position, value = int(table.position[node]), _number(table.activation[node])
        label = _label(graph, table.source(node), node - first_end, labels or {})
        record = _viewer_node(table.source(node), name, label, value)
        end = int(table.kind[node]) in ENDS
        record |= {"influence": None if end else float(pruned.cumulative[node]), "is_target_logit": node == first_end}
        record["ctx_idx"] = int(columns[position]) if position >= 0 else 0
        nodes.append({**record, "modality": None, **(where[position] if position >= 0 else {})})
    edges = np.flatnonzero(pruned.edge_mask)
    ends = zip(graph.indices[edges].tolist(), graph.targets_of(edges).tolist(), graph.weights[edges], strict=True)
    links = [{"source": names[s], "target": names[t], "weight": _number(w)} for s, t, w in ends]
    found = pruned.heads
    attention = {} if found is None else _add_heads(graph, found, links, edges, nodes, list(names))
    unlisted = {} if found is None else _unlisted(graph, found, set(names.values()), labels or {})
    metadata = {
        "slug": slug,
        "scan": scan,
        "prompt_tokens": list(graph.tokens[:n_tokens]),
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
            for token, role, place in zip(graph.tokens[:n_tokens], graph.roles, where, strict=False)
        ],
        # Of each token of the vision tower, whose nodes are drawn at its soft token (`ctx_idx`).
        **({"tower": [place.get("patch") for place in where[n_tokens:]]} if graph.n_patches else {}),
        "scores": {name: float(value) for name, value in vars(pruned.scores).items()},
        "bias": pruned.bias,
        "n_nodes_unpruned": graph.n_nodes,
        "n_edges_unpruned": graph.n_edges,
        "target": str(graph.meta.get("target", "logits")),
        "target_weights": [float(weight) for weight in graph.end_weights],
        "pictures": [embedded(picture) for picture in pictures],
        **attention,
        **(extra or {}),
    }
    pinned = pins(pruned, labels or {}, groups)
    supernodes = [[name, *(names[node] for node in members.tolist())] for name, members in pinned.supernodes.items()]
    view = {"pinnedIds": [names[node] for node in pinned.nodes.tolist()], "supernodes": supernodes}
    view |= {"linkType": "both", "clickedId": "", "sg_pos": ""}
    details["pinned_scores"] = pinned.scores._asdict()
    body = {"metadata": metadata, "qParams": view, "nodes": nodes, "links": links}
    return {**body, **({"qk_only_nodes": unlisted} if unlisted else {}), "vlmscope": details}


def _add_heads(
    graph: AttributionGraph,
    heads: EdgeHeads,
    links: list[dict[str, Any]],
    edges: np.ndarray,
    nodes: list[dict[str, Any]],
    numbers: list[int],
) -> dict[str, Any]:
    """Add shares of heads to links (of `edges`) and scores to nodes (`numbers`); returns the record of them all.

    A link's shares are of its weight; with the heads too weak to be named they sum to 1. `qk_tracing_results` is
    Neuronpedia's field of attention features; heads are no nodes here, so it is at the node into which a head carries
    most, whose position is the query's.
    """
    for number, edge in enumerate(np.searchsorted(edges, heads.edges).tolist()):
        weight = float(graph.weights[heads.edges[number]])
        loadings = heads.loadings[number].ravel().astype(np.float64) / weight
        best = np.argsort(-np.abs(loadings), kind="stable")[:_HEADS_OF_LINK]
        best = best[np.abs(loadings[best]) >= _LEAST_SHARE].tolist()
        each = heads.loadings.shape[2]
        links[edge]["heads"] = [[*divmod(one, each), round(float(loadings[one]), 4)] for one in best]
        for name, value in (("stream", heads.stream[number]), ("skip", heads.skip[number])):
            if value:
                links[edge][name] = round(float(value) / weight, 4)
    records = []
    for one in heads.query_keys:
        listed = {
            "pair_wise_contributors": [[source_id(q), source_id(k), term] for q, k, term in one.pairs],
            "top_q_marginal_contributors": [[source_id(source), term] for source, term in one.queries],
            "top_k_marginal_contributors": [[source_id(source), term] for source, term in one.keys],
        }
        place = {name: getattr(one, name) for name in ("layer", "head", "query", "key")}
        record = {**place, "score": one.score, "probability": one.probability, "sum_of_sizes": one.sizes}
        node = {"node": node_id(graph, one.node)} if one.node in numbers else {}
        if node:
            nodes[numbers.index(one.node)].setdefault("qk_tracing_results", listed)
        records.append({**node, **record, **listed})
    shares = {f"L{layer}H{head}": round(share, 4) for layer, head, share in heads.ranked()[:_HEADS_OF_GRAPH]}
    staying = float(heads.parts()[0].sum() / heads.strength.sum()) if len(heads.edges) else 0.0
    return {"attention": {"edges": len(heads.edges), "heads": shares, "stays": round(staying, 4), "scores": records}}


def _unlisted(graph: AttributionGraph, heads: EdgeHeads, listed: set[str], labels: Mapping[FeatureId, str]) -> dict:
    """Sources of scores that are no node of the pruned graph, by their id."""
    found: dict[str, dict[str, Any]] = {}
    for one in heads.query_keys:
        pairs = [source for pair in one.pairs for source in pair[:2]]
        for source in [*pairs, *(source for source, _ in [*one.queries, *one.keys])]:
            name = source_id(source)
            if name not in listed and name not in found:
                label = _label(graph, source, -1, labels)
                found[name] = _viewer_node(source, name, label, graph.nodes.activation_of(source))
    return found


def _viewer_node(source: Source, name: str, label: str, value: float | None) -> dict[str, Any]:
    """A node as the viewers read it; `value` is a feature's activation or a logit's probability, if known."""
    kind, layer, position, index = source
    end = kind in ENDS
    feature = index if kind in (NodeKind.TOKEN, NodeKind.LOGIT) and index >= 0 else None
    return {
        "node_id": name,
        # Viewers number the decoder's features alone.
        "feature": FeatureId(layer, index).cantor if kind == NodeKind.FEATURE and layer >= 0 else feature,
        # Ends are drawn one layer up, above what their own layer adds.
        "layer": "E" if kind == NodeKind.TOKEN and layer == -1 else _layer(layer + end),
        # The viewers need a position; nodes without one are drawn at the first.
        "ctx_idx": max(position, 0),
        "feature_type": _FEATURE_TYPES[kind],
        "token_prob": value if kind == NodeKind.LOGIT else 0.0,
        "jsNodeId": name,
        "clerp": label,
        "activation": value if kind == NodeKind.FEATURE else None,
    }


def _label(graph: AttributionGraph, source: Source, end: int, labels: Mapping[FeatureId, str]) -> str:
    """The words at a node, the `end`-th end or a source."""
    kind, layer, position, index = source
    match kind:
        case NodeKind.TOKEN:
            return "Patch" if layer < -1 else f'Emb: "{graph.tokens[position]}"'
        case NodeKind.FEATURE:
            return labels.get(FeatureId(layer, index), "")
        case NodeKind.ERROR:
            return f"Err: layer {_layer(layer)}, position {position}"
        case NodeKind.BIAS:
            return "Bias: vision tower" if layer < -1 else f"Bias: layer {layer}"
        case NodeKind.LEFT_OUT:
            return f"Features left out: layer {_layer(layer)}"
        case NodeKind.LOGIT:  # the viewers read the probability out of the label
            return f'Output "{graph.logit_tokens[end]}" (p={graph.logit_probabilities[end]:.3f})'
        case NodeKind.TARGET:
            return f"{graph.logit_tokens[end]} = {graph.nodes.target[graph.nodes.ends()[end]]:+.3f}"


def source_words(graph: AttributionGraph, source: Source, labels: Mapping[FeatureId, str]) -> str:
    """A source in words: what it is, and where."""
    if source.kind == NodeKind.TOKEN:
        return graph.place(source.position)
    label = _label(graph, source, -1, labels)
    if source.kind == NodeKind.FEATURE:
        return f"{FeatureId(source.layer, source.index)} {label}".strip() + f" ({graph.place(source.position)})"
    return label


def _number(value: np.floating) -> float:
    """The shortest decimal that gives the same bits in the value's own dtype."""
    return float(str(value))


def saved_labels(graphs: Sequence[Path]) -> dict[FeatureId, str]:
    """The labels of features in the `graph.json` next to each of these graph files; a file without one has none."""
    named = {}
    for path in (graph.with_name(GRAPH_JSON) for graph in graphs):
        nodes = read_json(path)["nodes"] if path.is_file() else ()
        for node in nodes:
            if node["feature_type"] == _FEATURE_TYPES[NodeKind.FEATURE] and node["clerp"] and node["layer"].isdigit():
                layer, index, *_ = node["node_id"].split("_")
                named[FeatureId(int(layer), int(index))] = node["clerp"]
    return named


def write_graph_json(
    path: str | Path,
    pruned: PrunedGraph,
    slug: str,
    scan: str,
    labels: Labels = None,
    extra: Mapping[str, Any] | None = None,
    pictures: Sequence[Image.Image] = (),
    groups: Labels = None,
) -> float:
    """Write `graph_to_json`, atomically; returns its size in megabytes (10^6 bytes).

    A file too large for an upload to Neuronpedia is written too, with a warning.
    """
    body = graph_to_json(pruned, slug, scan, labels, extra, pictures, groups)
    text = json.dumps(body, ensure_ascii=False, allow_nan=False) + "\n"
    size = len(text.encode()) / 1e6
    if size > UPLOAD_MB:
        advice = "attribution.edge_threshold, attribution.node_threshold or attribution.max_nodes lower"
        _LOG.warning("%s has %.0f MB, Neuronpedia takes %.0f at most; make %s", path, size, UPLOAD_MB, advice)
    write_text(path, text)
    return size


_SCORE = re.compile(r" \([01]\.\d+\)$")  # of a label, which two features with the same words need not share
_HALF, _MOST, _CUT, _APART = 0.5, 24, 0.5, 2.0


@dataclass(frozen=True)
class Pins:
    """Pinned nodes, strongest first, some of them in named supernodes, and the scores of this part of the graph."""

    nodes: np.ndarray
    supernodes: dict[str, np.ndarray]
    scores: SubgraphScores


def pins(pruned: PrunedGraph, labels: Mapping[FeatureId, str], groups: Mapping[FeatureId, str] | None = None) -> Pins:
    """Pins and supernodes of a graph; `groups` names those of features, from a circuit."""
    graph, table = pruned.graph, pruned.graph.nodes
    labels = {feature: _SCORE.sub("", label) for feature, label in labels.items()}
    image = (table.kind == NodeKind.TOKEN) & np.append(graph.is_image, False)[table.position]
    features = np.flatnonzero(pruned.node_mask & (table.kind == NodeKind.FEATURE))
    names = {node: (groups or {}).get(table.feature_id(node), "") for node in features.tolist()}
    members = np.array([node for node in features.tolist() if names[node]], dtype=np.int64)
    if not len(members):
        members = _strongest(pruned, features)
    tokens = [_strongest(pruned, np.flatnonzero(pruned.node_mask & mask & (table.kind == NodeKind.TOKEN)))
              for mask in (image, ~image)]  # fmt: skip
    ends = np.flatnonzero(pruned.node_mask & np.isin(table.kind, ENDS))
    pinned = np.concatenate([ends, *tokens, members])
    pinned = pinned[np.argsort(-pruned.influence[pinned] - np.isin(pinned, ends), kind="stable")]
    found: dict[str, np.ndarray] = {"picture": tokens[0]} if len(tokens[0]) > 1 else {}
    if groups and any(names.values()):
        found |= {name: np.array([node for node in members.tolist() if names[node] == name])
                  for name in dict.fromkeys(groups.values()) if name in names.values()}  # fmt: skip
    else:
        for nodes in _joined(pruned, members, labels):
            feature, role = table.feature_id(int(nodes[0])), str(graph.roles[table.position[nodes[0]]])
            name = labels.get(feature) or str(feature)
            name = f"{name} ({role})" if name in found else name
            found[name if name not in found else f"{name} {len(found)}"] = nodes
    mask = np.zeros(graph.n_nodes, dtype=bool)
    mask[pinned] = True
    return Pins(pinned, found, subgraph_scores(graph, mask))


def _strongest(pruned: PrunedGraph, nodes: np.ndarray) -> np.ndarray:
    """The fewest `nodes` with half of their influence, at most `_MOST`, the strongest first."""
    nodes = nodes[np.argsort(-pruned.influence[nodes], kind="stable")]
    reached = np.cumsum(pruned.influence[nodes])
    return nodes[: min(int((reached < _HALF * reached[-1]).sum()) + 1, _MOST)] if len(nodes) else nodes


def _joined(pruned: PrunedGraph, nodes: np.ndarray, labels: Mapping[FeatureId, str]) -> list[np.ndarray]:
    """Features `nodes` that belong together, the strongest of each first; those alone are left out."""
    if len(nodes) < 2:
        return []
    graph, table = pruned.graph, pruned.graph.nodes
    edges = np.flatnonzero(pruned.edge_mask)
    target, sums = graph.targets_of(edges), graph.absolute_sums()
    size = (graph.n_nodes, graph.n_nodes)
    matrix = sparse.csr_matrix((graph.weights[edges] / sums[target], (target, graph.indices[edges])), shape=size)
    alike = sum(_cosines(part[nodes]) for part in (matrix, matrix.T.tocsr())) / 2
    distance = np.clip(1.0 - alike, 0.0, 1.0)
    words = np.array([labels.get(table.feature_id(node), "") for node in nodes.tolist()])
    distance[(words[:, None] == words) & (words != "")] = 0.0
    roles = graph.roles[table.position[nodes]]
    distance[roles[:, None] != roles] = _APART
    np.fill_diagonal(distance, 0.0)
    found = fcluster(linkage(squareform(distance, checks=False), "average"), _CUT, "distance")
    return [nodes[found == one] for one in dict.fromkeys(found.tolist()) if (found == one).sum() > 1]


def _cosines(rows: sparse.csr_matrix) -> np.ndarray:
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).ravel())
    return (rows @ rows.T).toarray() / np.maximum(np.outer(norms, norms), 1e-30)
