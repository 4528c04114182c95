"""Files of a trace besides its graph: attention scores, heads of edges, maps over patches; and runs of many traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.attribution.adjoint import Adjoint, target_readers
from vlmscope.attribution.compare import GRAPH_FILE, graph_file
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.export import node_id, source_id
from vlmscope.attribution.heads import HeadSplitter, Pairs, ScoreParts, source_of, top_pairs
from vlmscope.attribution.trace import Trace
from vlmscope.attribution.vision import save_maps, vision_path
from vlmscope.core.artifacts import parse_json, text_lines, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind, PrunedGraph
from vlmscope.core.maps import PictureMap
from vlmscope.models.loading import VLM

INDEX = "graphs.jsonl"  # of a run of many traces: a line per graph


def graph_files(runs: Sequence[str]) -> list[Path]:
    """The graph files of runs of traces; those of a trace of many rows in the order of its index."""
    files: list[Path] = []
    for place in map(Path, runs):
        index = place / INDEX
        if not index.is_file():
            files.append(graph_file(place))
            continue
        try:
            folders = [place / parse_json(line)["folder"] for _, line in text_lines(index)]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{index} is incomplete; finish that run with trainer.resume=true") from error
        files += [graph_file(folder / GRAPH_FILE) for folder in folders]
    return files


def strongest_edges(pruned: PrunedGraph, count: int) -> np.ndarray:
    """Numbers of the `count` kept edges that matter most to the logits, strongest first, int64.

    An edge's strength is its share of its target's incoming |weight| times the target's influence on the logits, the
    quantity that pruning ranks by.
    """
    graph = pruned.graph
    total = graph.absolute_sums()
    importance = pruned.influence.astype(np.float64).copy()
    # Influence starts from what the ends are worth and does not count the start itself.
    importance[graph.nodes.ends()] += graph.end_weights
    kept = np.flatnonzero(pruned.edge_mask)
    targets = graph.targets_of(kept)
    magnitude = np.abs(graph.weights[kept].astype(np.float64))
    strength = magnitude / np.where(total > 0, total, 1.0)[targets] * importance[targets]
    kept, strength = kept[strength > 0], strength[strength > 0]
    return kept[np.argsort(-strength, kind="stable")][:count]


def write_scores(path: Path, traced: Trace, count: int) -> dict[str, float]:
    """Write the scores of a trace of attention, with their strongest pairs of sources; nothing for another trace.

    Returns:
        Metrics: how far the sum of all pairs is from the first score, of the sum of their sizes, and the score.
    """
    if not traced.scores:
        return {}
    adjoint = Adjoint(traced.replacement)
    records = [_score_record(traced, adjoint, parts, count) for parts in traced.scores]
    body: dict[str, Any] = {"scores": records}
    if traced.flow is not None:
        flow, whole = traced.flow.flow, float(traced.flow.flow.sum())
        ranked = [(f"L{layer}H{head}", float(flow[layer, head]) / whole) for layer, head in traced.flow.ranked()]
        body["head_flow"] = {"covered": traced.flow.covered, "shares": dict(ranked)}
        print("  heads by flow: " + ", ".join(f"{name} {share:.0%}" for name, share in ranked[:8]))
    write_json(path, body, indent=1)
    for record in records:
        best = record["feature_pairs"][0] if record["feature_pairs"] else None
        most = f"; strongest pair of features {best['query']} x {best['key']} {best['term']:+.3f}" if best else ""
        print(f"  {record['place']}: score {record['score']:+.3f}, pattern {record['probability']:.3f}{most}")
    pairs = top_pairs(traced.scores[0], 1)
    residual = abs(pairs.total - traced.scores[0].score) / (pairs.absolute or 1.0)
    return {"attention/score": traced.scores[0].score, "attention/pairs_residual": residual}


def _score_record(traced: Trace, adjoint: Adjoint, parts: ScoreParts, count: int) -> dict[str, Any]:
    columns, tokens, place = adjoint.columns, traced.replacement.inputs.tokens, parts.place
    features = np.zeros(parts.query.shape[1], dtype=bool)
    features[columns.all_features()[columns.all_features() < len(features)]] = True

    def listed(pairs: Pairs) -> list[dict[str, Any]]:
        names = {c: source_id(*source_of(traced.replacement, adjoint, c)) for c in {*pairs.query, *pairs.key}}
        ends = zip(pairs.query.tolist(), pairs.key.tolist(), pairs.terms.tolist(), strict=True)
        return [{"query": names[query], "key": names[key], "term": term} for query, key, term in ends]

    every, between = top_pairs(parts, count), top_pairs(parts, count, features)
    return {
        "place": str(place),
        "layer": place.layer,
        "head": place.head,
        "query": {"position": place.query, "token": tokens[place.query]},
        "key": {"position": place.key, "token": tokens[place.key]},
        "score": parts.score,
        "probability": parts.probability,
        "sum_of_all_pairs": every.total,
        "sum_of_sizes": every.absolute,
        "pairs": listed(every),
        "feature_pairs": listed(between),
    }


def write_heads(path: Path, traced: Trace, count: int) -> None:
    """Write which heads carry the strongest kept edges, by the first and by the last head on the way."""
    graph, records = traced.graph, []
    splitter = HeadSplitter(traced.replacement, graph, traced.targets)
    for edge in strongest_edges(traced.pruned, traced.pruned.n_edges):
        source, target = int(graph.indices[edge]), int(graph.targets_of(np.array([edge]))[0])
        if graph.nodes.kind[source] in (NodeKind.BIAS, NodeKind.LEFT_OUT):
            continue
        loadings = splitter.split(source, target)
        record = {"source": node_id(graph, source), "target": node_id(graph, target), "weight": loadings.edge}
        shares = {name: _by_head(getattr(loadings, name)) for name in ("first", "last")}
        records.append({**record, "direct": loadings.direct, **shares})
        if len(records) == count:
            break
    write_json(path, {"edges": records}, indent=1)
    for record in records[:5]:
        heads = ", ".join(f"{name} {share:+.3f}" for name, share in list(record["last"].items())[:3])
        edge = f"{record['source']} -> {record['target']} {record['weight']:+.3f}"
        print(f"  {edge}: direct {record['direct']:+.3f}, {heads}")


def _by_head(shares: object) -> dict[str, float]:
    """`[L, H]` as L3H1 -> share, largest first, zeros left out."""
    values = np.asarray(shares)
    order = np.argsort(-np.abs(values), axis=None, kind="stable")
    heads = [divmod(int(at), values.shape[1]) for at in order]
    return {f"L{layer}H{head}": float(values[layer, head]) for layer, head in heads if values[layer, head]}


def write_patches(
    path: Path, vlm: VLM, traced: Trace, settings: AttributionConfig
) -> tuple[list[PictureMap], dict[str, Any]]:
    """Follow the targets of a trace to the patches of each picture, and write the maps.

    Returns:
        The maps, those of a target one after the other, and the record of them for `graph.json`.
    """
    readers = target_readers(traced.replacement, traced.targets, total=settings.patch_effect == "total")
    way = vision_path(vlm, traced.replacement.inputs, settings.patch_rule)
    maps = way.maps(readers, traced.graph.logit_tokens, settings.patch_baseline)
    record = {
        "file": path.name,
        "effect": settings.patch_effect,
        "baseline": settings.patch_baseline,
        "rule": settings.patch_rule,
        "maps": save_maps(path, maps),
    }
    return maps, record
