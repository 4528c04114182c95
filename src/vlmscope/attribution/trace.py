"""From a prompt to its attribution graph, whole and pruned, in one call, and the files of a trace.

The phases, one module each: what is explained (`targets`), the local replacement model (`vlmscope.replacement`), its
adjoint (`adjoint`), rows of edges and the choice of features that get one (`edges`), influence and pruning
(`influence`). Next to the graph a trace writes attention scores, heads of edges, and maps over patches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlmscope.attribution.adjoint import Adjoint, SourceVectors, target_readers
from vlmscope.attribution.compare import GRAPH_FILE, graph_file
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.edges import RowStore, assemble, select_rows, target_chunk
from vlmscope.attribution.export import node_id, source_id
from vlmscope.attribution.heads import (
    HeadFlow,
    HeadSplitter,
    Pairs,
    Place,
    ScoreParts,
    find_place,
    head_flow,
    score_parts,
    source_of,
    top_pairs,
)
from vlmscope.attribution.influence import counted, end_sources, prune
from vlmscope.attribution.memory import MemoryPlan, plan_memory
from vlmscope.attribution.targets import Targets, ask, choose_logits, choose_targets
from vlmscope.attribution.vision import save_maps, vision_path
from vlmscope.core.artifacts import parse_json, text_lines, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.graph import AttributionGraph, NodeKind, PrunedGraph
from vlmscope.core.maps import PictureMap
from vlmscope.core.results import html_table, text_table
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import continued
from vlmscope.models.loading import VLM
from vlmscope.replacement import ReplacementModel, build_replacement
from vlmscope.scope import Scope


@dataclass(frozen=True, repr=False)
class Trace:
    """A traced prompt: the local replacement model, the whole and the pruned graph, and their targets."""

    replacement: ReplacementModel
    graph: AttributionGraph
    pruned: PrunedGraph
    targets: Targets
    scores: tuple[ScoreParts, ...] = ()
    flow: HeadFlow | None = None

    def metrics(self) -> dict[str, float]:
        """Size, scores and time of the graph."""
        graph, pruned, scores = self.graph, self.pruned, self.pruned.scores
        return {
            "graph/nodes": float(graph.n_nodes),
            "graph/edges": float(graph.n_edges),
            "graph/pruned_nodes": float(pruned.n_nodes),
            "graph/pruned_edges": float(pruned.n_edges),
            "graph/replacement_score": scores.replacement,
            "graph/completeness_score": scores.completeness,
            "graph/replacement_score_no_bias": scores.replacement_no_bias,
            "graph/completeness_score_no_bias": scores.completeness_no_bias,
            "graph/image_share": scores.image_share,
            "graph/text_share": scores.token_share - scores.image_share,
            "graph/error_share": scores.error_share,
            "graph/bias_share": scores.bias_share,
            "graph/left_out_share": scores.left_out_share,
            "graph/max_residual": float(graph.residual.max()),
            "graph/target_residual": float(graph.residual[graph.nodes.ends()].max()),
            "graph/seconds": float(graph.meta["seconds"]),
        }

    def explained(self) -> list[str]:
        """A string per end: a logit's token with its probability, or a label with its value."""
        graph, ends = self.graph, self.graph.nodes.ends()
        kinds, values = graph.nodes.kind[ends], graph.nodes.target[ends]
        rows = zip(graph.logit_tokens, kinds, graph.logit_probabilities, values, strict=True)
        return [f"{word}  p = {p:.3f}" if kind == NodeKind.LOGIT else f"{word} = {v:+.3f}" for word, kind, p, v in rows]

    def _rows(self) -> list[tuple[str, str, str]]:
        graph, scores = self.graph, self.pruned.scores
        return [
            ("", "whole graph", "kept by pruning"),
            ("nodes", f"{graph.n_nodes:,}", f"{self.pruned.n_nodes:,}"),
            ("edges", f"{graph.n_edges:,}", f"{self.pruned.n_edges:,}"),
            ("replacement score", f"{scores.replacement:.3f} ({scores.replacement_no_bias:.3f} without biases)", ""),
            ("completeness score", f"{scores.completeness:.3f} ({scores.completeness_no_bias:.3f} without biases)", ""),
            ("largest residual", f"{graph.residual.max():.1e}", ""),
            *(("explains", end, "") for end in self.explained()[:5]),
        ]

    def _title(self) -> str:
        return f"{self.graph.prompt!r}, {len(self.graph.tokens)} tokens"

    def __repr__(self) -> str:
        return f"Trace of {self._title()}\n{text_table(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), self._title())


def trace(scope: Scope, inputs: ModelInputs, config: AttributionConfig, folder: Path | None = None) -> Trace:
    """Trace a prompt: run the model once, freeze it, attribute, and prune.

    Edges that do not fit into `config.memory_gb` go to anonymous files in `folder`, by default the system's for
    temporary files.

    Raises:
        UserError: a setting, token, feature or head that does not fit the model or the prompt, or too little memory.
    """
    config.check()
    vlm = scope.vlm
    inputs, ids = ask(vlm, inputs, config)
    dtype = {"float32": torch.float32, "float64": torch.float64, "model": None}[config.dtype]
    replacement = build_replacement(scope, inputs, dtype)

    def graph_of(targets: Targets) -> tuple[AttributionGraph, MemoryPlan]:
        plan = plan_memory(replacement, targets, config, folder)
        return attribute(replacement, config, vlm.tokenizer, vlm.name, targets, plan), plan

    scores: tuple[ScoreParts, ...] = ()
    flow = None
    if config.attention:
        if config.attention == "auto":  # the heads that carry most of the flow to the top logits
            logits = choose_logits(replacement, config.logit_mass, config.max_logits)
            flow = head_flow(replacement, graph_of(logits)[0], logits)
            heads = flow.ranked()[: config.n_heads]
            places = [Place(*head, int(flow.query[head]), int(flow.key[head])) for head in heads]
        else:
            places = [find_place(replacement, config.attention)]
        adjoint = Adjoint(replacement)
        scores = tuple(score_parts(vlm, replacement, adjoint, place) for place in places)
        targets = scores[0].targets
    else:
        targets = choose_targets(replacement, config, vlm.tokenizer, ids)
    graph, plan = graph_of(targets)
    pruned = prune(graph, config.node_threshold, config.edge_threshold, plan.storage, config.bias)
    return Trace(replacement, graph, pruned, targets, scores, flow)


def attribute(
    replacement: ReplacementModel,
    config: AttributionConfig,
    tokenizer: Any,
    model_name: str = "",
    targets: Targets | None = None,
    plan: MemoryPlan | None = None,
) -> AttributionGraph:
    """The whole attribution graph of a replacement model, in the model's dtype.

    By default `targets` and `plan` follow from the settings; `tokenizer` may be None where targets have labels.
    """
    config.check()
    started = time.perf_counter()
    inputs = replacement.inputs
    dtype = "float64" if replacement.errors.dtype == torch.float64 else "float32"
    if targets is None:
        targets = choose_targets(replacement, config, tokenizer)
    plan = plan or plan_memory(replacement, targets, config)
    adjoint = Adjoint(replacement, SourceVectors(replacement, plan.cache_bytes))
    ends = target_chunk(adjoint, targets, dtype, plan.batch_size)
    store = RowStore(plan.storage, plan.most_edges, dtype)
    chunks = select_rows(adjoint, ends, targets, config, plan.batch_size, store, dtype)
    edges = assemble(replacement, adjoint.columns, chunks, ends, targets, dtype, plan.storage)
    n_active = int(adjoint.columns.n_features[: targets.layer].sum())
    return AttributionGraph(
        **vars(edges),
        logit_probabilities=targets.probabilities,
        logit_tokens=targets.names(tokenizer),
        tokens=list(inputs.tokens),
        is_image=inputs.is_image,
        image_index=inputs.image_index,
        patch_boxes=list(inputs.patch_boxes),
        roles=inputs.roles,
        prompt=inputs.prompt,
        meta={
            "model": model_name,
            "target": targets.what,
            "n_layers": replacement.n_layers,
            "n_active_features": n_active,
            "n_left_out_features": n_active - len(edges.nodes.of(NodeKind.FEATURE)),
            "logit_mass": config.logit_mass,
            "max_logits": config.max_logits,
            "max_nodes": config.max_nodes,
            "choice": config.choice,
            "seconds": time.perf_counter() - started,
            # Logit targets are before this cap, probabilities after it.
            **({} if replacement.logit_softcap is None else {"logit_softcap": replacement.logit_softcap}),
        },
        target_weights=targets.weights,
    )


def word_sources(scope: Scope, inputs: ModelInputs, ids: Sequence[int], config: AttributionConfig) -> np.ndarray:
    """Sources of the influence on each of an answer's n tokens, [n, 4], from one graph of the whole answer.

    The shares of the picture, of the rest of the prompt, and of the answer's earlier tokens in what tokens have; then
    the share of errors in all influence.
    """
    adapter, tokenizer = scope.adapter, scope.vlm.tokenizer
    config = replace(config, answer=tokenizer.decode(list(ids)).strip(), weights="uniform")
    whole = continued(adapter, inputs, ids[:-1], tokenizer)
    replacement = build_replacement(scope, whole)
    targets = choose_targets(replacement, config, tokenizer, ids)
    tokens, error = end_sources(attribute(replacement, config, tokenizer, scope.vlm.name, targets))
    groups = np.where(whole.is_image, 0, np.where(np.arange(len(whole)) < len(inputs), 1, 2))
    grouped, total = tokens @ np.eye(3)[groups], tokens.sum(1, keepdims=True)
    return np.concatenate([grouped / np.where(total > 0, total, 1.0), error[:, None]], 1)


_SCORES = ("replacement_score", "completeness_score", "replacement_score_no_bias", "completeness_score_no_bias")
_SHARES = ("image_share", "text_share", "error_share", "bias_share", "left_out_share")


def spread(graphs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What `Trace.metrics` of many graphs says together, since a score of one picture is one picture's.

    Returns:
        `graph/<score>_median`, `_q25` and `_q75` (quartiles), `graph/<share>_median`, and their number `graph/graphs`.
    """

    def values(name: str) -> list[float]:
        return [metrics[f"graph/{name}"] for metrics in graphs]

    found = {f"graph/{name}_median": float(np.median(values(name))) for name in (*_SCORES, *_SHARES)}
    for name in _SCORES:
        low, high = np.quantile(values(name), [0.25, 0.75]).tolist()
        found |= {f"graph/{name}_q25": low, f"graph/{name}_q75": high}
    return found | {"graph/graphs": float(len(graphs))}


def spread_in_words(found: Mapping[str, float]) -> str:
    """`spread` in two lines, without quartiles for one graph."""
    count = round(found["graph/graphs"])

    def score(key: str) -> str:
        median, low, high = (found[f"graph/{key}_{name}"] for name in ("median", "q25", "q75"))
        return f"{median:.3f}" + (f" [{low:.3f}, {high:.3f}]" if count > 1 else "")

    words = ("pictures", "words", "errors", "biases", "features left out")
    shares = zip(words, (found[f"graph/{name}_median"] for name in _SHARES), strict=True)
    scores = (f"{name} score {score(f'{name}_score')} ({score(f'{name}_score_no_bias')} without biases)"
              for name in ("replacement", "completeness"))  # fmt: skip
    ends = ", ".join(f"{word} {share:.1%}" for word, share in shares)
    end = f": medians [quartiles] of {count} graphs" if count > 1 else ""
    return f"{', '.join(scores)}\n  influence that ends at {ends}{end}"


INDEX = "graphs.jsonl"  # in the folder of a run of many traces, one line per graph


def graph_files(runs: Sequence[str]) -> list[Path]:
    """The graph files of runs; those of a run of many traces in the order of its index."""
    files: list[Path] = []
    for run in map(Path, runs):
        index = run / INDEX
        if not index.is_file():
            files.append(graph_file(run))
            continue
        try:
            folders = [run / parse_json(line)["folder"] for _, line in text_lines(index)]
        except (UserError, KeyError, TypeError) as error:
            raise UserError(f"{index} is incomplete; finish that run with trainer.resume=true") from error
        files += [graph_file(folder / GRAPH_FILE) for folder in folders]
    return files


def strongest_edges(pruned: PrunedGraph, count: int) -> np.ndarray:
    """Numbers of the `count` strongest kept edges, strongest first, int64.

    An edge's strength is its share of its target's incoming |weight| times the target's influence on the ends, the
    quantity that pruning ranks by.
    """
    graph = pruned.graph
    total = graph.absolute_sums(counted(graph, pruned.bias))
    importance = pruned.influence.astype(np.float64).copy()
    # Influence starts from the weights of the ends and does not include them.
    importance[graph.nodes.ends()] += graph.end_weights
    kept = np.flatnonzero(pruned.edge_mask)
    targets = graph.targets_of(kept)
    magnitude = np.abs(graph.weights[kept].astype(np.float64))
    strength = magnitude / np.where(total > 0, total, 1.0)[targets] * importance[targets]
    kept, strength = kept[strength > 0], strength[strength > 0]
    return kept[np.argsort(-strength, kind="stable")][:count]


def write_scores(path: Path, traced: Trace, count: int) -> dict[str, float]:
    """Write the scores of a trace of attention with their strongest pairs of sources; nothing for other traces.

    Returns:
        Metrics: the first score, and how far the sum of all pairs is from it, relative to the sum of their sizes.
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
    tokens, place = traced.replacement.inputs.tokens, parts.place
    features = np.isin(np.arange(parts.query.shape[1]), adjoint.columns.all_features())

    def listed(pairs: Pairs) -> list[dict[str, Any]]:
        columns = {*pairs.query, *pairs.key}
        names = {column: source_id(*source_of(traced.replacement, adjoint, column)) for column in columns}
        rows = zip(pairs.query.tolist(), pairs.key.tolist(), pairs.terms.tolist(), strict=True)
        return [{"query": names[query], "key": names[key], "term": term} for query, key, term in rows]

    pairs, feature_pairs = top_pairs(parts, count), top_pairs(parts, count, features)
    return {
        "place": str(place),
        "layer": place.layer,
        "head": place.head,
        "query": {"position": place.query, "token": tokens[place.query]},
        "key": {"position": place.key, "token": tokens[place.key]},
        "score": parts.score,
        "probability": parts.probability,
        "sum_of_all_pairs": pairs.total,
        "sum_of_sizes": pairs.absolute,
        "pairs": listed(pairs),
        "feature_pairs": listed(feature_pairs),
    }


def write_heads(path: Path, traced: Trace, count: int) -> None:
    """Write the heads of the `count` strongest kept edges, by the first and by the last head on the path."""
    graph, records = traced.graph, []
    splitter = HeadSplitter(traced.replacement, graph, traced.targets)
    for edge in strongest_edges(traced.pruned, traced.pruned.n_edges):
        source, target = int(graph.indices[edge]), int(graph.targets_of(np.array([edge]))[0])
        if graph.nodes.kind[source] in (NodeKind.BIAS, NodeKind.LEFT_OUT):
            continue
        loadings = splitter.split(source, target)
        record = {"source": node_id(graph, source), "target": node_id(graph, target), "weight": loadings.edge}
        heads = {"first": _by_head(loadings.first), "last": _by_head(loadings.last)}
        records.append({**record, "direct": loadings.direct, **heads})
        if len(records) == count:
            break
    write_json(path, {"edges": records}, indent=1)
    for record in records[:5]:
        heads = ", ".join(f"{name} {share:+.3f}" for name, share in list(record["last"].items())[:3])
        edge = f"{record['source']} -> {record['target']} {record['weight']:+.3f}"
        print(f"  {edge}: direct {record['direct']:+.3f}, {heads}")


def _by_head(shares: np.ndarray) -> dict[str, float]:
    """Shares `[L, H]` as L3H1 -> share, largest first, zeros left out."""
    order = np.argsort(-np.abs(shares), axis=None, kind="stable")
    heads = [divmod(number, shares.shape[1]) for number in order.tolist()]
    return {f"L{layer}H{head}": float(shares[layer, head]) for layer, head in heads if shares[layer, head]}


def target_maps(vlm: VLM, traced: Trace, settings: AttributionConfig) -> list[PictureMap]:
    """The targets of a trace followed to the patches of each picture, target by target."""
    readers = target_readers(traced.replacement, traced.targets, total=settings.patch_effect == "total")
    vision = vision_path(vlm, traced.replacement.inputs, settings.patch_rule)
    return vision.maps(readers, traced.graph.logit_tokens, settings.patch_baseline)


def write_target_maps(path: Path, maps: Sequence[PictureMap], settings: AttributionConfig) -> dict[str, Any]:
    """Write `target_maps`; returns their record for `graph.json`."""
    return {
        "file": path.name,
        "effect": settings.patch_effect,
        "baseline": settings.patch_baseline,
        "rule": settings.patch_rule,
        "maps": save_maps(path, maps),
    }
