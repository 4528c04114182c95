"""Random circuits that are alike: as many features of each layer and role, that change about as much.

Legend: N nodes.
"""

from __future__ import annotations

import numpy as np

from vlmscope.circuits.discovery.nodes import Nodes
from vlmscope.core.records import control_draws, generator

NEIGHBOURS = 8  # candidates, nearest in change, of which one is drawn


def matched_circuits(nodes: Nodes, members: np.ndarray, change: np.ndarray, seed: int, draws: int) -> list[np.ndarray]:
    """`draws` of `matched_circuit` under the root seed; none where the circuit has more than half of the features."""
    chosen = int(nodes.is_feature[members].sum())
    if 2 * chosen > int(nodes.is_feature.sum()):
        return []
    return [matched_circuit(nodes, members, change, draw) for draw in control_draws(seed, draws)]


def matched_circuit(nodes: Nodes, members: np.ndarray, change: np.ndarray, seed: int) -> np.ndarray:
    """Replace each feature of a circuit by a random one outside it, of its layer and role and about as much change.

    Errors and embeddings stay, as there are no others like them. Where a layer and role have no more features outside
    the circuit, one of the layer is taken, and then any: the number of features never differs.

    Args:
        nodes: the candidates.
        members: [n] numbers of the circuit.
        change: [N], how far each node moves the stream.
        seed: which draw.

    Raises:
        ValueError: fewer features outside the circuit than in it.
    """
    rng = generator(seed, "matched circuit")
    free = nodes.is_feature.copy()
    free[members] = False
    wanted = int(nodes.is_feature[members].sum())
    if free.sum() < wanted:
        raise ValueError(f"{wanted} features of the circuit, {int(free.sum())} others")
    out = [row for row in members.tolist() if not nodes.is_feature[row]]
    for row in members[nodes.is_feature[members]].tolist():
        same_layer = free & (nodes.layer == nodes.layer[row])
        pools = (same_layer & (nodes.role == nodes.role[row]), same_layer, free)
        pool = next(np.flatnonzero(pool) for pool in pools if pool.any())
        near = pool[np.argsort(np.abs(change[pool] - change[row]), kind="stable")[:NEIGHBOURS]]
        pick = int(rng.choice(near))
        free[pick] = False
        out.append(pick)
    return np.array(out, dtype=np.int64)


def random_order(nodes: Nodes, order: np.ndarray, seed: int) -> np.ndarray:
    """An order with its features shuffled; errors and embeddings keep their places, so that only features differ."""
    out = order.copy()
    places = np.flatnonzero(nodes.is_feature[order])
    out[places] = generator(seed, "random order").permutation(order[places])
    return out
