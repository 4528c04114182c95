"""A circuit: named supernodes, each a set of features with the activations that they have when it is on.

Stored as YAML (ids, evidence) beside a safetensors file (activations by role), so that a circuit found once can be
steered, patched and shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.artifacts import load_tensors, read_yaml, save_tensors, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.ids import FeatureId
from vlmscope.core.intervention import CircuitFeature, Supernode


@dataclass(frozen=True)
class Circuit:
    """Supernodes, and for each of them the mean activation of its features on its own concept.

    `levels[name]["<question>:<role>"][layer]` [n] goes with `indices(name)[layer]` [n].
    """

    supernodes: dict[str, Supernode]
    levels: dict[str, dict[str, dict[int, Tensor]]]

    def indices(self, name: str, limit: int | None = None) -> dict[int, Tensor]:
        """Feature indices of a supernode by layer, best first; at most `limit` a layer.

        Raises:
            UserError: no such supernode.
        """
        if name not in self.supernodes:
            raise UserError(f"the circuit has no supernode {name!r}: it has {', '.join(self.supernodes)}")
        table: dict[int, list[int]] = {}
        for member in self.supernodes[name].features:
            table.setdefault(member.feature.layer, []).append(member.feature.index)
        return {layer: torch.tensor(found[:limit]) for layer, found in sorted(table.items())}

    def level(self, name: str, role: str, layer: int, question: str | None = None) -> Tensor:
        """Mean activations [n] of a supernode's features of a layer at a role: under one question, or over all of them.

        A role that the training prompts did not have gives zeros.
        """
        tables = self.levels[name]
        keys = [k for k in tables if k.endswith(f":{role}") and (question is None or k == f"{question}:{role}")]
        if not keys:
            return torch.zeros(len(self.indices(name)[layer]))
        return torch.stack([tables[key][layer] for key in keys]).mean(0)

    def size(self, *names: str, limit: int | None = None) -> int:
        """Number of distinct features in these supernodes."""
        ids = {(layer, i) for n in names for layer, found in self.indices(n, limit).items() for i in found.tolist()}
        return len(ids)


def save_circuit(circuit: Circuit, folder: Path) -> None:
    """Write `circuit.yaml` and `levels.safetensors` into `folder`."""
    body = {
        name: [
            {"feature": str(m.feature), "role": m.role, "contrast": m.contrast, "influence": m.influence}
            for m in node.features
        ]
        for name, node in circuit.supernodes.items()
    }
    write_yaml(folder / "circuit.yaml", {"version": 1, "supernodes": body})
    arrays: dict[str, np.ndarray] = {
        f"{name}.{role}.{layer}": values.cpu().numpy()
        for name, roles in circuit.levels.items()
        for role, layers in roles.items()
        for layer, values in layers.items()
    }
    save_tensors(folder / "levels.safetensors", arrays, {"version": "1"})


def load_circuit(folder: Path) -> Circuit:
    """Read what `save_circuit` wrote.

    Raises:
        UserError: a file is missing or is not a circuit.
    """
    body = read_yaml(folder / "circuit.yaml")
    if not isinstance(body, dict) or "supernodes" not in body:
        raise UserError(f"{folder / 'circuit.yaml'} is not a circuit: it has no supernodes")
    supernodes = {
        name: Supernode(
            name,
            tuple(
                CircuitFeature(FeatureId.parse(m["feature"]), m["role"], m["contrast"], m["influence"]) for m in members
            ),
        )
        for name, members in body["supernodes"].items()
    }
    levels: dict[str, dict[str, dict[int, Tensor]]] = {}
    arrays, _ = load_tensors(folder / "levels.safetensors")
    for key, values in arrays.items():
        name, role, layer = key.rsplit(".", 2)
        levels.setdefault(name, {}).setdefault(role, {})[int(layer)] = torch.from_numpy(values)
    return Circuit(supernodes, levels)
