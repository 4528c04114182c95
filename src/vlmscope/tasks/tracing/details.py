"""What `task=trace` writes beside the graph: a score's pairs of sources, and the heads of edges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmscope.attribution.adjoint import Adjoint
    from vlmscope.attribution.heads import ScoreParts
    from vlmscope.attribution.trace import Trace
    from vlmscope.core.graph import AttributionGraph


def print_ends(graph: AttributionGraph) -> None:
    """A line for each logit with its probability, or for each other target with its value."""
    from vlmscope.core.graph import NodeKind

    for number, node in enumerate(graph.nodes.ends()):
        label = graph.logit_tokens[number]
        shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in label)  # a newline stays on its line
        if graph.nodes.kind[node] == NodeKind.LOGIT:
            print(f"  {shown:<16} p = {graph.logit_probabilities[number]:.3f}")
        else:
            print(f"  {shown} = {graph.nodes.target[node]:+.3f}")


def write_scores(path: Path, traced: Trace, count: int) -> dict[str, float]:
    """Write the scores of a trace of attention, with their strongest pairs of sources; nothing for another trace.

    Returns:
        Metrics: how far the sum of all pairs is from the first score, of the sum of their sizes, and the score.
    """
    if not traced.scores:
        return {}
    from vlmscope.attribution.adjoint import Adjoint
    from vlmscope.attribution.heads import top_pairs
    from vlmscope.core.artifacts import write_json

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
    import numpy as np

    from vlmscope.attribution.export import source_id
    from vlmscope.attribution.heads import Pairs, source_of, top_pairs

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
    import numpy as np

    from vlmscope.attribution.export import node_id
    from vlmscope.attribution.heads import HeadSplitter
    from vlmscope.core.artifacts import write_json
    from vlmscope.core.graph import NodeKind
    from vlmscope.report.graph_figure import strongest_edges

    graph, records = traced.graph, []
    splitter = HeadSplitter(traced.replacement, graph, traced.targets)
    for edge in strongest_edges(traced.pruned, traced.pruned.n_edges):
        source, target = int(graph.indices[edge]), int(graph.targets_of(np.array([edge]))[0])
        if graph.nodes.kind[source] in (NodeKind.BIAS, NodeKind.LEFT_OUT):
            continue
        found = splitter.split(source, target)
        record = {"source": node_id(graph, source), "target": node_id(graph, target), "weight": found.edge}
        shares = {name: _named(getattr(found, name)) for name in ("first", "last")}
        records.append({**record, "direct": found.direct, **shares})
        if len(records) == count:
            break
    write_json(path, {"edges": records}, indent=1)
    for record in records[:5]:
        heads = ", ".join(f"{name} {share:+.3f}" for name, share in list(record["last"].items())[:3])
        edge = f"{record['source']} -> {record['target']} {record['weight']:+.3f}"
        print(f"  {edge}: direct {record['direct']:+.3f}, {heads}")


def _named(shares: object) -> dict[str, float]:
    """`[L, H]` as L3H1 -> share, largest first, zeros left out."""
    import numpy as np

    values = np.asarray(shares)
    order = np.argsort(-np.abs(values), axis=None, kind="stable")
    found = [(int(at) // values.shape[1], int(at) % values.shape[1]) for at in order]
    return {f"L{layer}H{head}": float(values[layer, head]) for layer, head in found if values[layer, head]}
