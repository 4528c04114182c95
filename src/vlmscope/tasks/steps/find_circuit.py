"""Find a circuit by contrast of two concepts on training pictures, confirmed by influence in attribution graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.attribution.export import save_graph, write_graph_json
from vlmscope.attribution.trace import Trace, trace
from vlmscope.circuits.circuit import labelled, save_circuit
from vlmscope.circuits.contrast import contrast_circuit
from vlmscope.circuits.selectors import mean_shares
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import RoleMeans, role_means
from vlmscope.tasks.tracing.graph_metrics import graph_metrics

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.tasks.steps.bench import Bench

CONFIRMING = 0.98


def run(bench: Bench) -> None:
    """Leaves a `Circuit`, the role means and the first trace in `bench.records`; writes circuits/ and graph files."""
    config = bench.circuit_config
    train = {c: bench.concept_pictures(c, "train", config.pictures) for c in config.concepts}
    prompts = {name: question.prompt for name, question in config.questions.items()}
    means = concept_means(bench, train, prompts)
    influence, traces, seconds = concept_influence(bench, train, prompts, config.graphs)
    shown = traces[0]
    circuit, metrics = contrast_circuit(bench.transcoders, means, influence, config.per_layer, bench.vlm.name)
    circuit = labelled(circuit, bench.labels)
    save_circuit(circuit, bench.run_dir / "circuits" / "_".join(config.concepts))
    save_graph(bench.run_dir / "graph.safetensors", shown.pruned)
    write_graph_json(bench.run_dir / "graph.json", shown.pruned, bench.run_dir.name, bench.vlm.name, bench.labels)
    bench.metrics |= metrics | graph_metrics(shown, float(np.median(seconds)))
    bench.records["find_circuit"] = {
        "circuit": circuit,
        "means": means,
        "trace": shown,
        "trace_image": train[config.concepts[0]][0],
    }


def concept_means(
    bench: Bench, train: Mapping[str, Sequence[Image.Image]], prompts: Mapping[str, str]
) -> dict[str, dict[str, RoleMeans]]:
    """Concept -> question -> mean activations on the concept's pictures."""
    return {
        concept: {
            name: role_means(bench.scope, [bench.scope.batch(bench.inputs(list(images), prompt))])
            for name, prompt in prompts.items()
        }
        for concept, images in train.items()
    }


def concept_influence(
    bench: Bench, train: Mapping[str, Sequence[Image.Image]], prompts: Mapping[str, str], graphs: int
) -> tuple[dict[str, dict[FeatureId, float]], list[Trace], list[float]]:
    """Each concept's influence of features, mean over `graphs` pictures and all questions.

    Returns:
        Concept -> feature -> share of influence; the first trace alone, since each holds a whole graph; the seconds of
        each trace.
    """
    influence: dict[str, dict[FeatureId, float]] = {}
    first: list[Trace] = []
    seconds: list[float] = []
    for concept, images in train.items():
        tables = []
        for prompt in prompts.values():
            for inputs in bench.inputs(list(images[:graphs]), prompt):
                start = time.perf_counter()
                traced = trace(bench.scope, inputs, bench.cfg.attribution)
                seconds.append(time.perf_counter() - start)
                tables.append(feature_influence(traced))
                first = first or [traced]
        influence[concept] = mean_shares(tables)
    return influence, first, seconds


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
