"""The file of a circuit (docs/formats.md), without torch: ids and evidence as YAML, activations by role as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.core.artifacts import save_tensors, write_yaml
from vlmscope.core.records import FeatureId, PatchBox, Positions
from vlmscope.core.results import CircuitEdge, CircuitFeature, Supernode

VERSION = 2
READ = (1, VERSION)  # version 1 had neither positions nor edges
CIRCUIT, LEVELS = "circuit.yaml", "levels.safetensors"


def circuit_body(
    supernodes: Mapping[str, Supernode],
    edges: Iterable[CircuitEdge] = (),
    model: str = "",
    n_features: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """The content of `circuit.yaml`."""
    body: dict[str, Any] = {"version": VERSION}
    if model:
        body["model"] = model
    if n_features:
        body["n_features"] = {int(layer): int(width) for layer, width in n_features.items()}
    body["supernodes"] = {name: _node_body(node) for name, node in supernodes.items()}
    if edges := tuple(edges):
        body["edges"] = [vars(edge) for edge in edges]
    return body


def write_circuit(folder: Path, body: Mapping[str, Any], levels: Mapping[str, np.ndarray]) -> None:
    """Write both files; `levels` are mean activations [n] by `<supernode>.<question>:<role>.<layer>`."""
    write_yaml(folder / CIRCUIT, body)
    save_tensors(folder / LEVELS, levels, {"version": "1"})


def _node_body(node: Supernode) -> dict[str, Any]:
    body: dict[str, Any] = {"chosen": node.chosen} if node.chosen else {}
    if node.positions is not None:
        box = node.positions.box
        body["positions"] = {"roles": list(node.positions.roles)}
        body["positions"] |= {} if box is None else {"box": [float(x) for x in box]}
    body["features"] = [
        {"feature": str(m.feature), "role": m.role, "contrast": m.contrast, "influence": m.influence}
        | ({"label": m.label} if m.label else {})
        for m in node.features
    ]
    return body


def read_node(name: str, stored: Any) -> Supernode:
    """A supernode of the file; in version 1 it was the list of its features."""
    body: dict[str, Any] = {"features": stored} if isinstance(stored, list) else stored
    members = tuple(
        CircuitFeature(
            FeatureId.parse(m["feature"]), m["role"], m["contrast"], m["influence"], label=str(m.get("label", ""))
        )
        for m in body["features"]
    )
    positions = None
    if (places := body.get("positions")) is not None:
        box = places.get("box")
        positions = Positions(tuple(places["roles"]), None if box is None else PatchBox(*map(float, box)))
    return Supernode(name, members, positions, body.get("chosen", ""))
