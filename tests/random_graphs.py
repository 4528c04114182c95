"""A random attribution graph of any size, laid out as a traced one is, to test and measure what reads graphs."""

import numpy as np

from vlmscope.core.graph import AttributionGraph, NodeKind, NodeTable


def random_graph(
    n_layers: int,
    n_positions: int,
    n_features: int,
    n_logits: int = 3,
    *,
    density: float = 1.0,
    grid: int | None = None,
    left_out: bool = False,
    seed: int = 0,
    dtype: str = "float32",
) -> AttributionGraph:
    """A graph of a causal model: a row reads its layer's bias and all sources below it at its position and before.

    `n_features` are per layer, spread evenly over the positions; `density` is the share of possible edges; weights are
    multiples of 1 / `grid`, so that many are equal, or without it of wide spread; with `left_out` every layer has
    features without a row.
    """
    rng = np.random.default_rng(seed)
    nodes = _nodes(n_layers, n_positions, n_features, n_logits, left_out)
    n_nodes = len(nodes)
    first = np.searchsorted(nodes.layer, np.arange(n_layers + 1))
    counts = np.zeros(n_nodes, dtype=np.int64)
    indices: list[np.ndarray] = []
    for layer in range(n_layers + 1):
        rows = first[layer] + np.flatnonzero(
            np.isin(nodes.kind[first[layer] :], (NodeKind.FEATURE, NodeKind.LOGIT))
            & (nodes.layer[first[layer] :] == layer)
        )
        for position in np.unique(nodes.position[rows]):
            mine = rows[nodes.position[rows] == position]
            below = np.flatnonzero(nodes.position[: first[layer]] <= position)
            sources = np.append(below, first[layer])[: len(below) + int(layer < n_layers)].astype(np.int32)
            for row in mine:
                taken = sources if density >= 1.0 else sources[rng.random(len(sources)) < density]
                counts[row] = len(taken)
                indices.append(taken)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    mass = np.zeros((n_nodes, n_layers if left_out else 0))
    graph = AttributionGraph(
        nodes=nodes,
        indptr=indptr,
        indices=np.concatenate(indices),
        weights=_weights(rng, int(indptr[-1]), grid, dtype),
        residual=np.zeros(n_nodes),
        left_out_mass=mass,
        logit_probabilities=np.full(n_logits, 1.0 / n_logits),
        logit_tokens=[f"token {number}" for number in range(n_logits)],
        tokens=[f"token {position}" for position in range(n_positions)],
        is_image=np.zeros(n_positions, dtype=bool),
        image_index=np.full(n_positions, -1),
        patch_boxes=[None] * n_positions,
        roles=np.full(n_positions, "user"),
        prompt="random",
        meta={"n_layers": n_layers, "max_logits": n_logits, "logit_mass": 1.0},
    )
    if left_out:
        rest = np.flatnonzero(nodes.kind[graph.indices] == NodeKind.LEFT_OUT)
        # Features of both signs partly cancel in the edge of their sum.
        mass[graph.edge_targets()[rest], nodes.layer[graph.indices[rest]]] = 2.0 * np.abs(graph.weights[rest])
    return graph


def _weights(rng: np.random.Generator, count: int, grid: int | None, dtype: str) -> np.ndarray:
    if grid is not None:
        return (rng.integers(1, 5, count) * rng.choice([-1, 1], count) / grid).astype(dtype)
    weights = rng.standard_normal(count, dtype=np.float32)
    # Cubes of normal numbers: as in traced graphs, few edges carry most.
    weights *= weights * weights
    return weights.astype(dtype, copy=False)


def _nodes(n_layers: int, n_positions: int, n_features: int, n_logits: int, left_out: bool) -> NodeTable:
    every, none = np.arange(n_positions), np.array([-1])
    parts: list[tuple[int, int, np.ndarray]] = [(NodeKind.TOKEN, -1, every)]
    for layer in range(n_layers):
        parts += [
            (NodeKind.BIAS, layer, none),
            (NodeKind.FEATURE, layer, np.arange(n_features) * n_positions // n_features),
            (NodeKind.ERROR, layer, every),
        ]
        parts += [(NodeKind.LEFT_OUT, layer, none)] if left_out else []
    parts.append((NodeKind.LOGIT, n_layers, np.full(n_logits, n_positions - 1)))
    kind = np.concatenate([np.full(len(at), kind) for kind, _, at in parts]).astype(np.int8)
    n_nodes = len(kind)
    return NodeTable(
        kind=kind,
        layer=np.concatenate([np.full(len(at), layer) for _, layer, at in parts]).astype(np.int16),
        position=np.concatenate([at for _, _, at in parts]).astype(np.int32),
        index=np.arange(n_nodes, dtype=np.int64),
        activation=np.ones(n_nodes, dtype=np.float32),
        target=np.zeros(n_nodes, dtype=np.float32),
    )
