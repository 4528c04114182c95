"""`comparison.safetensors` and `aggregate.safetensors`: merged graphs, bit for bit (docs/graphs.md)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.merged import AggregateGraph, GraphComparison, MatchedNodes

_KINDS: dict[str, type[GraphComparison | AggregateGraph]] = {
    "vlmscope.comparison": GraphComparison,
    "vlmscope.aggregate": AggregateGraph,
}
VERSION = "1"


def save_merged(path: str | Path, merged: GraphComparison | AggregateGraph) -> None:
    """Write a comparison or an aggregate, atomically: arrays as they are, the rest as JSON in the file's metadata.

    Raises:
        UserError: when the file cannot be written.
    """
    fields = {f"node_{name}": value for name, value in _fields(merged.nodes).items()}
    fields |= {name: value for name, value in _fields(merged).items() if name != "nodes"}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    words = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items() if name not in arrays}
    form = next(name for name, kind in _KINDS.items() if isinstance(merged, kind))
    save_tensors(path, arrays, {"format": form, "version": VERSION, **words})


def load_merged(path: str | Path) -> GraphComparison | AggregateGraph:
    """Read what `save_merged` wrote.

    Raises:
        UserError: when the file is missing, holds something else, or was written in another version of the layout.
    """
    arrays, metadata = load_tensors(path)
    kind = _KINDS.get(metadata.get("format", ""))
    if kind is None:
        raise UserError(
            f"{path} is no comparison and no aggregate of graphs; give one that task=compare or aggregate wrote"
        )
    if metadata.get("version") != VERSION:
        raise UserError(f"{path} has layout {metadata.get('version')}, this program reads {VERSION}; make it anew")
    with built_from(path, "comparison or aggregate", "make it again"):
        words = {name: json.loads(text) for name, text in metadata.items() if name not in ("format", "version")}
        fields: dict[str, Any] = {**arrays, **words}
        nodes = MatchedNodes(
            **{field.name: fields.pop(f"node_{field.name}") for field in dataclasses.fields(MatchedNodes)}
        )
        return kind(nodes=nodes, **fields)


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
