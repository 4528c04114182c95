"""Find a circuit by contrast of two concepts on training pictures, confirmed by influence in attribution graphs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.attribution.export import write_graph_json
from vlmscope.attribution.graph_io import save_graph
from vlmscope.attribution.trace import Trace, trace
from vlmscope.circuits.circuit import save_circuit
from vlmscope.circuits.contrast import contrast_circuit
from vlmscope.core.graph import NodeKind
from vlmscope.core.ids import FeatureId
from vlmscope.features.role_means import RoleMeans, role_means
from vlmscope.models.batching import make_batch
from vlmscope.tasks.graph_metrics import graph_metrics

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

CONFIRMING = 0.98


def run(bench: Bench) -> None:
    """Leaves a `Circuit`, the role means and the first trace in `bench.records`; writes circuits/ and graph files."""
    config = bench.circuit_config
    train = {c: bench.concept_pictures(c, "train", config.pictures) for c in config.concepts}
    means: dict[str, dict[str, RoleMeans]] = {}
    for concept, images in train.items():
        means[concept] = {
            name: role_means(
                bench.vlm.adapter,
                bench.transcoders,
                [make_batch(bench.vlm.adapter, bench.inputs(images, question.prompt))],
            )
            for name, question in config.questions.items()
        }
    influence: dict[str, dict[FeatureId, float]] = {}
    shown: Trace | None = None
    seconds: list[float] = []
    for concept, images in train.items():
        tables = []
        for question in config.questions.values():
            for inputs in bench.inputs(images[: config.graphs], question.prompt):
                start = time.perf_counter()
                traced = trace(bench.vlm, bench.transcoders, inputs, bench.cfg.attribution)
                seconds.append(time.perf_counter() - start)
                tables.append(feature_influence(traced))
                shown = shown or traced
        influence[concept] = mean_influence(tables)
    assert shown is not None, "CircuitConfig asks for at least one graph"
    circuit, metrics = contrast_circuit(bench.transcoders, means, influence, config.per_layer)
    save_circuit(circuit, bench.run_dir / "circuits" / "_".join(config.concepts))
    save_graph(bench.run_dir / "graph.safetensors", shown.pruned)
    write_graph_json(bench.run_dir / "graph.json", shown.pruned, bench.run_dir.name, bench.vlm.name)
    bench.metrics |= metrics | graph_metrics(shown, float(np.median(seconds)))
    bench.records["find_circuit"] = {
        "circuit": circuit,
        "means": means,
        "trace": shown,
        "trace_image": train[config.concepts[0]][0],
    }


def feature_influence(traced: Trace) -> dict[FeatureId, float]:
    """Share of all influence of each feature that belongs to the most influential nodes, summed over positions.

    The nodes that reach `CONFIRMING` of the influence count, more than the pruned graph keeps: that one is for reading.
    """
    nodes, pruned = traced.graph.nodes, traced.pruned
    total = float(pruned.influence.sum()) or 1.0
    shares: dict[FeatureId, float] = {}
    for node in nodes.of(NodeKind.FEATURE).tolist():
        if pruned.influence[node] > 0 and pruned.cumulative[node] <= CONFIRMING:
            feature = nodes.feature_id(node)
            shares[feature] = shares.get(feature, 0.0) + float(pruned.influence[node]) / total
    return shares


def mean_influence(tables: Sequence[dict[FeatureId, float]]) -> dict[FeatureId, float]:
    """Mean share over graphs; absent counts as zero."""
    summed: dict[FeatureId, float] = {}
    for table in tables:
        for feature, share in table.items():
            summed[feature] = summed.get(feature, 0.0) + share / len(tables)
    return summed
