"""The project's side of the attribution benchmark: a process that runs what it is told, line by line.

`python -m benchmarks.attribution_own FOLDER THREADS`; requests and answers are JSON lines.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.attribution_cases import load_case
from benchmarks.measured import measured
from tests.random_graphs import random_graph
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import prune
from vlmscope.attribution.trace import attribute
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.replacement import LayerFeatures, ReplacementModel, build_replacement, feature_table
from vlmscope.scope import Scope


def without_first_position(replacement: ReplacementModel) -> ReplacementModel:
    """The peer's convention: no features and no errors at position 0."""

    def rest(features: LayerFeatures) -> LayerFeatures:
        first = features.offsets[1]
        kept = {name: getattr(features, name)[first:] for name in ("position", "index", "activation", "pre_activation")}
        return dataclasses.replace(features, **kept, offsets=[max(0, at - first) for at in features.offsets])

    features = [rest(layer) for layer in replacement.features]
    errors = replacement.errors.clone()
    errors[:, 0] = 0
    return dataclasses.replace(
        replacement, features=features, errors=errors, feature_activations=feature_table(features)
    )


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write, each tensor counted at each use; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count it."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def attribution(folder: Path) -> Callable[..., dict[str, Any]]:
    """A function that makes the case's graph once."""
    case, vlm, inputs, transcoders = load_case(folder)

    def graph_of(max_nodes: int) -> AttributionGraph:
        replacement = without_first_position(build_replacement(Scope(vlm, transcoders), inputs))
        return attribute(replacement, AttributionConfig(max_nodes=max_nodes), vlm.tokenizer)

    def run(
        save: str | None = None, count: bool = False, max_nodes: int = 10**6, prune_too: bool = False
    ) -> dict[str, Any]:
        if count:
            with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
                graph_of(max_nodes)
            return {"flops": flops.get_total_flops(), "bytes": traffic.bytes}
        with measured() as found:
            graph = graph_of(max_nodes)
        if save:
            save_matrix(graph, save, case.d_model)
        answer = found | {"nodes": graph.n_nodes, "edges": graph.n_edges}
        if prune_too:
            with measured() as pruned:
                prune(graph)
            answer |= {"prune_seconds": pruned["seconds"], "prune_added_mb": pruned["added_mb"]}
        return answer

    return run


def save_matrix(graph: AttributionGraph, path: str, d_model: int) -> None:
    """The edges in the peer's order of rows and columns, for comparison."""
    nodes = graph.nodes
    features, logits = nodes.of(NodeKind.FEATURE), nodes.of(NodeKind.LOGIT)
    columns = [features, nodes.of(NodeKind.ERROR), nodes.of(NodeKind.TOKEN)]
    dense = np.zeros((graph.n_nodes, graph.n_nodes))
    dense[graph.edge_targets(), graph.indices] = graph.weights
    rows = np.concatenate([features, logits])
    np.savez(
        path,
        features=np.stack([nodes.layer[features], nodes.position[features], nodes.index[features]], 1),
        logits=nodes.index[logits],
        matrix=dense[np.ix_(rows, np.concatenate(columns))],
        widths=[len(column) for column in columns],
        d_model=d_model,
    )


def pruning(folder: Path) -> Callable[..., dict[str, Any]]:
    """A function that prunes the folder's random graph once."""
    sizes = json.loads((folder / "graph.json").read_text())
    graph = random_graph(**sizes)

    def run(save: str | None = None) -> dict[str, Any]:
        if save:
            save_graph_for_peer(graph, save)
        with measured() as found:
            pruned = prune(graph)
        kept = {"kept_nodes": pruned.n_nodes, "kept_edges": pruned.n_edges}
        scores = dataclasses.asdict(pruned.scores)
        return found | kept | {"nodes": graph.n_nodes, "edges": graph.n_edges, "scores": scores}

    return run


def save_graph_for_peer(graph: AttributionGraph, path: str) -> None:
    """The graph and its node order features, errors and biases, tokens, logits, as the peer has it."""
    kinds = graph.nodes.kind
    rank = np.select([kinds == NodeKind.FEATURE, kinds == NodeKind.TOKEN, kinds == NodeKind.LOGIT], [0, 2, 3], 1)
    np.savez(
        path,
        order=np.argsort(rank, kind="stable"),
        counts=[int((rank == number).sum()) for number in range(4)],
        indptr=graph.indptr,
        indices=graph.indices,
        weights=graph.weights,
        probabilities=graph.logit_probabilities,
    )


def main() -> None:
    """Answer requests until the input ends."""
    folder, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    run = pruning(folder) if (folder / "graph.json").exists() else attribution(folder)
    print(json.dumps({"ready": time.time()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
