"""From a prompt to its attribution graph, whole and pruned, in one call, and the files of a trace.

The phases, one module each: what is explained (`targets`), the local replacement model (`vlmscope.replacement`), its
adjoint (`adjoint`), rows of edges and the choice of features that get one (`edges`), influence and pruning
(`influence`). To the graph are added the heads that carry its edges and the scores of those (`heads`), and maps over
patches.
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
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.edges import RowStore, assemble, select_rows, target_chunk
from vlmscope.attribution.heads import ScoreParts, carriers, edge_heads, find_place, query_keys, score_parts
from vlmscope.attribution.influence import end_sources, prune
from vlmscope.attribution.memory import MemoryPlan, plan_memory
from vlmscope.attribution.targets import Targets, ask, choose_logits, choose_targets
from vlmscope.attribution.vision import save_maps, vision_path
from vlmscope.attribution.workers import Workers
from vlmscope.core.graph import AttributionGraph, NodeKind, PictureMap, PrunedGraph
from vlmscope.core.results import html_table, text_table
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import continued
from vlmscope.models.checkpoint import DTYPES
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
    scores: tuple[ScoreParts, ...] = ()  # of attention, where the question is one
    batch_size: int = 64  # of sweeps that go on from the graph

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
            **self._of_heads(),
        }

    def _of_heads(self) -> dict[str, float]:
        """Residuals of what `with_heads` added, and the score that was asked for."""
        heads = self.pruned.heads
        if heads is None:
            return {}
        gaps = [abs(one.total - one.score) / (one.sizes or 1.0) for one in heads.query_keys]
        score = {"attention/score": self.scores[0].score} if self.scores else {}
        residuals = {"heads/edge_residual": heads.residual(self.graph), "heads/score_residual": max(gaps, default=0.0)}
        return {**score, **residuals, "heads/edges": float(len(heads.edges)), "heads/seconds": heads.seconds}

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
    replacement = build_replacement(scope, inputs, DTYPES.get(config.dtype))
    if replacement.tower is not None:  # every feature of a tower sees every patch: rows are long
        config = replace(config, max_nodes=min(config.max_nodes, config.tower_nodes))

    def graph_of(targets: Targets) -> tuple[AttributionGraph, MemoryPlan]:
        plan = plan_memory(replacement, targets, config, folder)
        return attribute(replacement, config, vlm.tokenizer, vlm.name, targets, plan), plan

    scores: tuple[ScoreParts, ...] = ()
    if config.attention:
        if config.attention == "auto":  # the heads that carry most of the graph of the top logits
            logits = choose_logits(replacement, config.logit_mass, config.max_logits)
            graph, plan = graph_of(logits)
            pruned = prune(graph, config.node_threshold, config.edge_threshold, plan.storage, config.bias)
            heads, splitter = edge_heads(replacement, pruned, logits, config.heads or _EDGES, plan.batch_size)
            places = [place for _, place in carriers(pruned, heads, splitter, config.n_heads)]
        else:
            places = [find_place(replacement, config.attention)]
        adjoint = Adjoint(replacement)
        scores = tuple(score_parts(vlm.adapter, replacement, adjoint, place) for place in places)
        targets = scores[0].targets
    else:
        targets = choose_targets(replacement, config, vlm.tokenizer, ids)
    graph, plan = graph_of(targets)
    pruned = prune(graph, config.node_threshold, config.edge_threshold, plan.storage, config.bias)
    return Trace(replacement, graph, pruned, targets, scores, plan.batch_size)


_EDGES = 5000  # edges split to find the heads of `attention=auto` where `heads` is 0


def with_heads(scope: Scope, traced: Trace, config: AttributionConfig) -> Trace:
    """The same with the heads that carry its strongest kept edges, and why those that carry most attend.

    To split a score takes a row of edges for each number of its query and key. So there are at most as many scores as
    take a quarter of the graph's rows, but one, and none where their rows exceed `config.memory_gb`. The graph comes
    back unchanged where `config.heads` is 0, and where it explains a feature of the vision tower, above which there are
    no heads of the decoder.
    """
    if not config.heads or traced.targets.layer < 0:
        return traced
    started = time.perf_counter()
    replacement, pruned, graph = traced.replacement, traced.pruned, traced.graph
    heads, splitter = edge_heads(replacement, pruned, traced.targets, config.heads, traced.batch_size)
    adjoint = Adjoint(replacement)
    width = max(frozen.output_weight.shape[1] for frozen in replacement.layers) // replacement.state.patterns[0].n_heads
    most = max(int((np.diff(graph.indptr) > 0).sum()) // (8 * width), 1)
    if (
        config.memory_gb
        and 2 * width * adjoint.columns.total * replacement.errors.element_size() > config.memory_gb * 1e9
    ):
        most = 0
    # Scores that were asked for come first; the graph explains the first of them.
    parts = list(zip([int(graph.nodes.ends()[0])] + [-1] * len(traced.scores), traced.scores, strict=False))
    for node, place in carriers(pruned, heads, splitter, min(config.n_heads, most)):
        parts.append((node, score_parts(scope.adapter, replacement, adjoint, place)))
    found = [query_keys(one, replacement, adjoint.columns, config.n_pairs, node) for node, one in parts]
    heads = replace(heads, query_keys=found, seconds=time.perf_counter() - started)
    return replace(traced, pruned=replace(pruned, heads=heads))


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
    store = RowStore(plan.storage, dtype)
    workers = Workers(adjoint, config.devices, plan.cache_bytes)
    chunks = select_rows(adjoint, ends, targets, config, plan.batch_size, store, dtype, workers)
    edges = assemble(replacement, adjoint.columns, chunks, ends, targets, dtype, plan.storage)
    n_active = adjoint.columns.below(targets.layer)
    patches = [] if replacement.tower is None else replacement.tower.boxes
    return AttributionGraph(
        **vars(edges),
        logit_probabilities=targets.probabilities,
        logit_tokens=targets.names(tokenizer),
        tokens=[*inputs.tokens, *["patch"] * len(patches)],
        is_image=np.concatenate([inputs.is_image, np.ones(len(patches), dtype=bool)]),
        image_index=np.concatenate([inputs.image_index, *([replacement.tower.picture] if replacement.tower else [])]),
        patch_boxes=[*inputs.patch_boxes, *patches],
        roles=np.concatenate([inputs.roles, ["patch"] * len(patches)]) if patches else inputs.roles,
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
            **({"n_patches": len(patches)} if patches else {}),
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
