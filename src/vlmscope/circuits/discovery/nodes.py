"""The nodes that a circuit may have: features, errors and embeddings, each at a position role.

A feature at (layer, role) is one node over all positions of the role, as prompts of one wording share roles. What is
the same on both sides of every pair is no node: putting its counterfactual value there changes nothing.

Legend: N nodes, R roles, T positions, F features of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.records import FeatureId


class Kind(IntEnum):
    """What a node is."""

    EMBEDDING = 0  # what enters the first layer (with DeepStack: what pictures add later) at a role
    FEATURE = 1
    ERROR = 2  # MLP output minus reconstruction of a layer at a role


@dataclass(frozen=True)
class Nodes:
    """A row a node.

    Attributes:
        roles: R names.
        kind: [N] int8.
        layer: [N] int16, -1 for embeddings.
        role: [N] int8, numbers in `roles`.
        index: [N] int64, a feature's; -1 for others.
    """

    roles: tuple[str, ...]
    kind: np.ndarray
    layer: np.ndarray
    role: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def is_feature(self) -> np.ndarray:
        """[N] bool."""
        return self.kind == Kind.FEATURE

    def name(self, row: int) -> str:
        """`L5/123@last`, `error L5@image`, `embedding@image`."""
        role = self.roles[self.role[row]]
        if self.kind[row] == Kind.FEATURE:
            return f"{self.feature(row)}@{role}"
        return f"error L{self.layer[row]}@{role}" if self.kind[row] == Kind.ERROR else f"embedding@{role}"

    def feature(self, row: int) -> FeatureId:
        """The feature that a row stands for."""
        assert self.kind[row] == Kind.FEATURE, f"node {row} is no feature"
        return FeatureId(int(self.layer[row]), int(self.index[row]))

    def rows(self) -> dict[tuple[int, int, int, int], int]:
        """(kind, layer, role, index) -> row."""
        columns = (self.kind.tolist(), self.layer.tolist(), self.role.tolist(), self.index.tolist())
        return {key: row for row, key in enumerate(zip(*columns, strict=True))}


def make_nodes(roles: Sequence[str], keys: Sequence[tuple[int, int, int, int]]) -> Nodes:
    """Nodes from their (kind, layer, role, index)."""
    table = np.array(list(keys), dtype=np.int64).reshape(-1, 4)
    kind, layer, role, index = table.T
    return Nodes(tuple(roles), kind.astype(np.int8), layer.astype(np.int16), role.astype(np.int8), index)


@dataclass(frozen=True)
class Kept:
    """Which nodes a run keeps, as masks: bool, or numbers for what lies between.

    Attributes:
        embeddings: [T].
        errors: layer -> [T].
        features: layer -> [R, F].
        role_of: [T] int64, the role of each position.
    """

    embeddings: Tensor
    errors: dict[int, Tensor]
    features: dict[int, Tensor]
    role_of: Tensor


def role_numbers(roles: Sequence[str], at: np.ndarray) -> np.ndarray:
    """[T] int64: the number of each position's role among `roles`."""
    numbers = {role: number for number, role in enumerate(roles)}
    return np.array([numbers[role] for role in at.tolist()], dtype=np.int64)


def keep(nodes: Nodes, chosen: np.ndarray, widths: dict[int, int], at: np.ndarray, device: torch.device) -> Kept:
    """Masks that keep some nodes and nothing else.

    Args:
        nodes: the nodes.
        chosen: [N] bool, or row numbers.
        widths: layer -> F.
        at: [T] position roles of the prompt.
        device: of the masks.
    """
    rows = np.flatnonzero(chosen) if np.asarray(chosen).dtype == bool else np.asarray(chosen, dtype=np.int64)
    role_of = torch.from_numpy(role_numbers(nodes.roles, at)).to(device)
    n_roles = len(nodes.roles)
    embeddings = torch.zeros(n_roles, dtype=torch.bool, device=device)
    errors = {layer: torch.zeros(n_roles, dtype=torch.bool, device=device) for layer in widths}
    features = {layer: torch.zeros(n_roles, width, dtype=torch.bool, device=device) for layer, width in widths.items()}
    kind, layers, role, index = (x[rows] for x in (nodes.kind, nodes.layer, nodes.role, nodes.index))
    embeddings[torch.from_numpy(role[kind == Kind.EMBEDDING]).long()] = True
    for layer in widths:
        here = layers == layer
        errors[layer][torch.from_numpy(role[here & (kind == Kind.ERROR)]).long()] = True
        mine = here & (kind == Kind.FEATURE)
        features[layer][torch.from_numpy(role[mine]).long(), torch.from_numpy(index[mine])] = True
    return Kept(embeddings[role_of], {i: found[role_of] for i, found in errors.items()}, features, role_of)


def keep_all(nodes: Nodes, widths: dict[int, int], at: np.ndarray, device: torch.device, value: bool = True) -> Kept:
    """Keep everything (or nothing): also what is no node because training pairs never had it."""
    role_of = torch.from_numpy(role_numbers(nodes.roles, at)).to(device)
    whole = torch.full((len(at),), value, device=device)
    features = {layer: torch.full((len(nodes.roles), width), value, device=device) for layer, width in widths.items()}
    return Kept(whole, dict.fromkeys(widths, whole), features, role_of)


def opposite(kept: Kept) -> Kept:
    """Keep what was not kept."""
    return Kept(
        ~kept.embeddings,
        {layer: ~mask for layer, mask in kept.errors.items()},
        {layer: ~mask for layer, mask in kept.features.items()},
        kept.role_of,
    )


def read(nodes: Nodes, values: Kept) -> np.ndarray:
    """[N] float64: the values of nodes from numbers in the shape of masks, summed over the positions of a role."""
    out = np.zeros(len(nodes))
    n_roles = len(nodes.roles)

    def by_role(found: Tensor) -> np.ndarray:
        sums = found.double().new_zeros(n_roles).index_add_(0, values.role_of, found.double())
        return sums.cpu().numpy()

    mine = nodes.kind == Kind.EMBEDDING
    out[mine] = by_role(values.embeddings)[nodes.role[mine]]
    for layer, found in values.features.items():
        mine = (nodes.layer == layer) & (nodes.kind == Kind.FEATURE)
        out[mine] = found.double().cpu().numpy()[nodes.role[mine], nodes.index[mine]]
        mine = (nodes.layer == layer) & (nodes.kind == Kind.ERROR)
        out[mine] = by_role(values.errors[layer])[nodes.role[mine]]
    return out
