"""What task=circuit does with a circuit once its supernodes are known: graphs, edges, labels, numbers, and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.circuits.circuit import Circuit
    from vlmscope.config import AppConfig
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.features.study_files import StudyFolder
    from vlmscope.scope import Scope
    from vlmscope.tasks.circuits.inputs import Asked
    from vlmscope.tasks.circuits.page import Origin, Scene
    from vlmscope.tasks.registry import RunContext


def finished(
    cfg: AppConfig,
    context: RunContext,
    circuit: Circuit,
    name: str,
    scene: Scene,
    study: StudyFolder | None,
    origin: Origin | None = None,
) -> dict[str, float]:
    """Give a circuit its edges and labels, save it and draw it; its metrics."""
    from vlmscope.circuits.circuit import labelled, save_circuit
    from vlmscope.tasks.circuits.page import Origin, draw_circuit
    from vlmscope.tasks.label import feature_labels

    circuit = with_edges(circuit, scene.graphs, cfg.task.answers)
    circuit = labelled(circuit, feature_labels(cfg, scene.scope.vlm.name, scene.scope.transcoders))
    save_circuit(circuit, context.run_dir / "circuits" / name)
    metrics = circuit_metrics(circuit, scene.graphs)
    if cfg.task.figure:
        draw_circuit(cfg, context.run_dir, circuit, name, scene, study, metrics, origin or Origin())
    return metrics


def traced(
    cfg: AppConfig,
    context: RunContext,
    scope: Scope,
    asked: Sequence[Asked],
    settings: Sequence[AttributionConfig] = (),
) -> list[PrunedGraph]:
    """The graphs of all inputs, with settings of their own if given; the first one is written to the run folder."""
    from tqdm import tqdm

    from vlmscope.attribution.export import save_graph
    from vlmscope.attribution.trace import trace
    from vlmscope.tasks.circuits.inputs import prepared

    found: list[PrunedGraph] = []
    each = zip(prepared(scope.vlm, asked), settings or [cfg.attribution] * len(asked), strict=True)
    for inputs, how in tqdm(each, desc="trace", unit="input", total=len(asked), disable=len(asked) < 2):
        found.append(trace(scope, inputs, how, context.run_dir).pruned)
        if len(found) == 1:
            save_graph(context.run_dir / "graph.safetensors", found[0])
    return found


def with_edges(circuit: Circuit, graphs: Sequence[PrunedGraph], answers: int) -> Circuit:
    """The circuit with edges from these graphs; with its own where there are none."""
    from dataclasses import replace

    from vlmscope.circuits.supernode_edges import direct_edges

    if not graphs:
        return circuit
    return replace(
        circuit, edges=direct_edges((one.graph for one in graphs), list(circuit.supernodes.values()), answers)
    )


def circuit_metrics(circuit: Circuit, graphs: Sequence[PrunedGraph]) -> dict[str, float]:
    """Sizes, edges, and how much of the graphs the circuit holds.

    `circuit/influence_share` is the members' part of all features' influence on the most probable answer, mean over
    the graphs; `circuit/<name>/active_frac` the share of a supernode's features that are active in some graph.
    """
    import numpy as np

    from vlmscope.attribution.influence import influence
    from vlmscope.circuits.supernode_edges import supernode_mask
    from vlmscope.core.graph import NodeKind

    nodes = circuit.supernodes
    metrics = {
        "circuit/supernodes": float(len(nodes)),
        "circuit/features": float(circuit.size(*nodes)),
        "circuit/graphs": float(len(graphs)),
        "circuit/edges": float(sum(edge.source in nodes and edge.source != edge.target for edge in circuit.edges)),
    }
    shares: list[float] = []
    active: dict[str, set[tuple[int, int]]] = {name: set() for name in nodes}
    for pruned in graphs:
        graph = pruned.graph
        weights = np.zeros(graph.n_nodes)
        weights[graph.nodes.ends()[int(np.argmax(graph.end_weights))]] = 1.0
        flow = influence(graph, weights).nodes
        masks = {name: supernode_mask(graph, node) for name, node in nodes.items()}
        total = float(flow[graph.nodes.of(NodeKind.FEATURE)].sum()) or 1.0
        shares.append(float(flow[np.any(list(masks.values()), axis=0)].sum()) / total)
        for name, mask in masks.items():
            active[name] |= {graph.nodes.feature_id(at) for at in np.flatnonzero(mask).tolist()}
    for name, node in nodes.items():
        key = f"circuit/{name.replace(' ', '_')}"
        metrics[f"{key}/features"] = float(len(node.features))
        if graphs:
            metrics[f"{key}/active_frac"] = len(active[name]) / max(len(node.features), 1)
    if shares:
        metrics["circuit/influence_share"] = float(np.mean(shares))
    return metrics
