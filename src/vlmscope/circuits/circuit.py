"""A circuit: named supernodes, each a set of features with the activations that they have when it is on.

Stored as YAML (ids, evidence, positions, edges) beside a safetensors file (activations by role), so that a circuit
found once can be drawn, steered, patched and shared. Layout: `docs/formats.md`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.artifacts import built_from, load_tensors, read_yaml, save_tensors, write_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import CircuitEdge, CircuitFeature, Supernode
from vlmscope.core.records import FeatureId, PatchBox, Positions

VERSION = 2
_READ = (1, VERSION)  # version 1 had neither positions nor edges


@dataclass(frozen=True)
class Circuit:
    """Supernodes, and for each of them the mean activation of its features on its own concept.

    Attributes:
        supernodes: by name.
        levels: `levels[name]["<question>:<role>"][layer]` [n] goes with `indices(name)[layer]` [n]; may lack names.
        edges: between supernodes, and from inputs and to answers, as far as they were computed.
        model: name of the model that it was found in; "" when that is not known.
        n_features: width of each layer's transcoder there; empty when that is not known.
    """

    supernodes: dict[str, Supernode]
    levels: dict[str, dict[str, dict[int, Tensor]]]
    edges: tuple[CircuitEdge, ...] = ()
    model: str = ""
    n_features: Mapping[int, int] | None = None

    def node(self, name: str) -> Supernode:
        """A supernode.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.supernodes:
            raise UserError(f"the circuit has no supernode {name!r}: it has {', '.join(self.supernodes)}")
        return self.supernodes[name]

    def indices(self, name: str, limit: int | None = None) -> dict[int, Tensor]:
        """Feature indices of a supernode by layer, best first; at most `limit` a layer.

        Raises:
            UserError: no such supernode.
        """
        table: dict[int, list[int]] = {}
        for member in self.node(name).features:
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

    def check_fits(self, model: str, n_features: Mapping[int, int], where: str | Path = "the circuit") -> None:
        """Refuse a circuit of another model or of other transcoders.

        Args:
            model: the model's name.
            n_features: width of each layer's transcoder.
            where: what to call the circuit in the message.

        Raises:
            UserError: it is of another one, or names features that the transcoders do not have.
        """
        if self.model and self.model != model:
            raise UserError(f"{where} is a circuit of the model {self.model}, not of {model}; give one of {model}")
        if self.n_features and dict(self.n_features) != dict(n_features):
            raise UserError(f"{where} is a circuit of other transcoders than these; give those with transcoder=")
        for node in self.supernodes.values():
            for member in node.features:
                layer, index = member.feature
                if layer not in n_features:
                    raise UserError(
                        f"{where}: {node.name} has {member.feature}, but the transcoders have no such layer"
                    )
                if index >= n_features[layer]:
                    raise UserError(
                        f"{where}: {node.name} has {member.feature}, but layer {layer} has {n_features[layer]} features"
                    )


def labelled(circuit: Circuit, labels: Mapping[FeatureId, str]) -> Circuit:
    """The circuit with its features' labels; one that has none in `labels` keeps what it is called."""
    return replace(circuit, supernodes={name: with_labels(node, labels) for name, node in circuit.supernodes.items()})


def with_labels(node: Supernode, labels: Mapping[FeatureId, str]) -> Supernode:
    """One supernode, as `labelled`."""
    return replace(node, features=tuple(replace(m, label=labels.get(m.feature, m.label)) for m in node.features))


def commonest_label(node: Supernode) -> str:
    """The label that most of its features have, without the score; the earlier of equals, "" without any."""
    said = [m.label.rsplit(" (", 1)[0] for m in node.features if m.label]
    return Counter(said).most_common(1)[0][0] if said else ""


def save_circuit(circuit: Circuit, folder: Path) -> None:
    """Write `circuit.yaml` and `levels.safetensors` into `folder`."""
    body: dict[str, Any] = {"version": VERSION}
    if circuit.model:
        body["model"] = circuit.model
    if circuit.n_features:
        body["n_features"] = {int(layer): int(width) for layer, width in circuit.n_features.items()}
    body["supernodes"] = {name: _node_body(node) for name, node in circuit.supernodes.items()}
    if circuit.edges:
        body["edges"] = [vars(edge) for edge in circuit.edges]
    write_yaml(folder / "circuit.yaml", body)
    arrays: dict[str, np.ndarray] = {
        f"{name}.{role}.{layer}": (values.float() if values.dtype.itemsize < 4 else values).numpy(force=True)
        for name, roles in circuit.levels.items()
        for role, layers in roles.items()
        for layer, values in layers.items()
    }
    save_tensors(folder / "levels.safetensors", arrays, {"version": "1"})


def _node_body(node: Supernode) -> dict[str, Any]:
    body: dict[str, Any] = {"chosen": node.chosen} if node.chosen else {}
    if node.positions is not None:
        where: dict[str, Any] = {"roles": list(node.positions.roles)}
        if node.positions.box is not None:
            where["box"] = [float(x) for x in node.positions.box]
        body["positions"] = where
    body["features"] = [
        {"feature": str(m.feature), "role": m.role, "contrast": m.contrast, "influence": m.influence}
        | ({"label": m.label} if m.label else {})
        for m in node.features
    ]
    return body


def load_circuit(folder: Path) -> Circuit:
    """Read what `save_circuit` wrote, of this version or of version 1.

    Raises:
        UserError: a file is missing or is not a circuit, or was written by a later version.
    """
    path = folder / "circuit.yaml"
    body = read_yaml(path)
    if not isinstance(body, dict) or not isinstance(body.get("supernodes"), dict):
        raise UserError(f"{path} is not a circuit: it has no supernodes")
    if body.get("version") not in _READ:
        raise UserError(f"{path} has version {body.get('version')}, this program reads {VERSION}; find it anew")
    with built_from(path, "circuit", "find it again"):
        supernodes = {str(name): _node(str(name), found) for name, found in body["supernodes"].items()}
        edges = tuple(CircuitEdge(**edge) for edge in body.get("edges", ()))
    levels: dict[str, dict[str, dict[int, Tensor]]] = {}
    stored = folder / "levels.safetensors"
    arrays, _ = load_tensors(stored)
    with built_from(stored, "circuit", "find it again"):
        for key, values in arrays.items():
            name, role, layer = key.rsplit(".", 2)
            levels.setdefault(name, {}).setdefault(role, {})[int(layer)] = torch.from_numpy(values)
    return Circuit(supernodes, levels, edges, str(body.get("model", "")), body.get("n_features"))


def _node(name: str, found: Any) -> Supernode:
    """A supernode of the file; in version 1 it was the list of its features."""
    body: dict[str, Any] = {"features": found} if isinstance(found, list) else found
    members = tuple(
        CircuitFeature(
            FeatureId.parse(m["feature"]), m["role"], m["contrast"], m["influence"], label=str(m.get("label", ""))
        )
        for m in body["features"]
    )
    places = body.get("positions")
    positions = None
    if places is not None:
        box = places.get("box")
        positions = Positions(tuple(places["roles"]), None if box is None else PatchBox(*map(float, box)))
    return Supernode(name, members, positions, body.get("chosen", ""))
