"""Graphs of the workbench: their files, what users add to them, the scores of a pinned part, and a graph as one file.

Annotations are `annotations.json` next to a graph. Each save names the version that it started from, so that a second
tab learns of the first one's changes instead of undoing them. A graph file of another program has no
`graph.safetensors`; then scores are of the pruned graph that its `graph.json` holds.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmscope.core.artifacts import read_json, read_text, shipped, write_json, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, FeatureId
from vlmscope.core.study import SHIPPED_STUDIES
from vlmscope.viewer.runs import GRAPH, Runs
from vlmscope.viewer.safety import Refused, inside

if TYPE_CHECKING:
    from vlmscope.core.graph import AttributionGraph

EXAMPLE = "example"  # id of the graph that comes with vlmscope
ANNOTATIONS, EXACT, WORKBENCH = "annotations.json", "graph.safetensors", "workbench"
MOST_BYTES = 200 << 20  # of a graph file
_MOST = 20_000  # pins, members of supernodes, or labels
_LONGEST = 20_000  # characters of a text
_SAVING = threading.Lock()
# Parts of peers' names of kinds of nodes, and numbers of `NodeKind`; all others are features, of MLPs or attention.
_KINDS = {"error": 2, "embedding": 0, "logit": 4, "bias": 3, "left out": 5}
_FEATURE = 1


def graph_file(runs: Runs, name: str) -> Path:
    """The `graph.json` of an id: a run, or a folder in it such as `rows/<id>`."""
    path = shipped(f"assets/example_graph/{GRAPH}") if name == EXAMPLE else inside(runs.root, f"{name}/{GRAPH}")
    if not path.is_file():
        raise Refused(f"{name[:200]} has no {GRAPH}", 404)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise Refused(f"{name}/{GRAPH} has {size / 1e6:.0f} MB, too large; trace with fewer attribution.max_nodes", 413)
    return path


def read_graph(runs: Runs, name: str) -> dict[str, Any]:
    """The parsed `graph.json` of an id; one that lacks nodes or links is refused."""
    path = graph_file(runs, name)
    body = read_json(path)
    if not isinstance(body, dict) or not all(isinstance(body.get(key), list) for key in ("nodes", "links")):
        raise Refused(f"{name}/{GRAPH} is not a graph: it has no nodes and links", 422)
    return body


# ---- what users add


def annotations_file(runs: Runs, name: str) -> Path:
    """Where the annotations of a graph are kept; those of the bundled example below the root, which can be written."""
    if name == EXAMPLE:
        return runs.root / WORKBENCH / EXAMPLE / ANNOTATIONS
    return graph_file(runs, name).with_name(ANNOTATIONS)


def read_annotations(runs: Runs, name: str) -> dict[str, Any]:
    """What was saved; before the first save, what the graph's own file says is pinned."""
    path = annotations_file(runs, name)
    if path.is_symlink():
        raise Refused(f"{name}/{ANNOTATIONS} is a link; remove it", 409)
    if path.is_file():
        return checked(read_json(path), name)
    return from_neuronpedia(read_graph(runs, name))


def save_annotations(runs: Runs, name: str, version: str, body: Any) -> dict[str, Any]:
    """Save what a page sends, if it started from the version that is stored, and return it with its new version.

    Raises:
        Stale: another page saved since.
    """
    if not version.strip('"').isdigit():
        raise Refused("If-Match must name the version that was edited", 428)
    new = checked(body, "the annotations")
    with _SAVING:
        stored = read_annotations(runs, name)
        if int(version.strip('"')) != stored["version"]:
            raise Stale(stored)
        new["version"] = stored["version"] + 1
        write_json(annotations_file(runs, name), new)
    return new


class Stale(Refused):
    """A save that started from another version than the one stored, `current`."""

    def __init__(self, current: Mapping[str, Any]) -> None:
        super().__init__("another page has saved annotations of this graph since; merge and save again", 409)
        self.current = current


def checked(body: Any, name: str) -> dict[str, Any]:
    """Annotations with exactly the known keys; anything of another shape or size is refused."""
    try:
        pinned, labels = _texts(body.get("pinned", [])), body.get("labels", {})
        nodes = [
            {"id": _text(node["id"]), "name": _text(node["name"]), "members": _texts(node["members"])}
            for node in body.get("supernodes", [])
        ]
        labels = {_text(key): _text(value) for key, value in labels.items()}
        version, notes = body.get("version", 0), _text(body.get("notes", ""))
        if not isinstance(version, int) or version < 0 or len(labels) > _MOST:
            raise ValueError
        if sum(1 + len(node["members"]) for node in nodes) > _MOST:
            raise ValueError
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise Refused(f"{name}: not annotations of a graph, or too many", 422) from error
    return {"version": version, "pinned": pinned, "supernodes": nodes, "labels": labels, "notes": notes}


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise ValueError
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list) or len(values) > _MOST:
        raise ValueError
    return list(dict.fromkeys(map(_text, values)))


def from_neuronpedia(graph: Mapping[str, Any]) -> dict[str, Any]:
    """Annotations of version 0 from a graph file's `qParams`: pins and supernodes, `[name, node, ...]` each."""
    view = graph.get("qParams")
    view = view if isinstance(view, dict) else {}
    known = {node.get("node_id") for node in graph["nodes"] if isinstance(node, dict)}
    groups = [group for group in view.get("supernodes") or [] if isinstance(group, list) and len(group) > 1]
    nodes = [
        {"id": f"n{number}", "name": str(group[0]), "members": [str(member) for member in group[1:] if member in known]}
        for number, group in enumerate(groups[:_MOST])
    ]
    pinned = [str(pin) for pin in view.get("pinnedIds") or [] if pin in known]
    return checked({"pinned": pinned, "supernodes": [node for node in nodes if node["members"]]}, "qParams")


def _kind(node: Mapping[str, Any]) -> int:
    name = str(node.get("feature_type")).lower()
    return next((kind for part, kind in _KINDS.items() if part in name), _FEATURE)


def _layer(name: str) -> int:
    """The number of a layer, by which nodes are ordered: those of the vision tower lie below the embeddings."""
    if name in ("E", "P"):
        return -1 if name == "E" else TOWER - 1
    return TOWER + int(name[1:]) if name.startswith("T") else int(name)


def feature_of(node: Mapping[str, Any]) -> str | None:
    """The name `L5/9`, or `T5/9` in the vision tower, of a feature's node `5_9_<position>`; None for other nodes."""
    if _kind(node) != _FEATURE:
        return None
    found = re.match(r"(T?)(\d+)_(\d+)_", str(node.get("node_id")))
    return f"{found[1] or 'L'}{int(found[2])}/{int(found[3])}" if found else None


# ---- a pinned part


def score(runs: Runs, name: str, pinned: Any) -> dict[str, Any]:
    """Replacement and completeness score of the pinned features (docs/graphs.md), of the whole graph where it is kept.

    `of` says of which graph: "whole", or "pruned" for one that has only its `graph.json`.
    """
    from vlmscope.attribution.influence import subgraph_scores

    try:
        pins = set(_texts(pinned))
    except ValueError as error:
        raise Refused("pinned must be a list of nodes' ids", 422) from error
    file = graph_file(runs, name).with_name(EXACT)
    if name != EXAMPLE and file.is_file():
        inside(runs.root, f"{name}/{EXACT}")  # no link out of the root
        graph, ids, of = *_exact(file), "whole"
    else:
        graph, ids, of = *from_json(read_graph(runs, name)), "pruned"
    mask = np.array([one in pins for one in ids])
    return {**subgraph_scores(graph, mask)._asdict(), "of": of}


_LAST: dict[Path, tuple[int, AttributionGraph, list[str]]] = {}  # the graph that was read last: a user pins many nodes


def _exact(file: Path) -> tuple[AttributionGraph, list[str]]:
    """A whole graph and the ids of its nodes; the last one is kept."""
    from vlmscope.attribution.export import load_graph, node_id

    time = file.stat().st_mtime_ns
    if (known := _LAST.get(file)) is None or known[0] != time:
        graph = load_graph(file).graph
        _LAST.clear()
        _LAST[file] = known = time, graph, [node_id(graph, node) for node in range(graph.n_nodes)]
    return known[1], known[2]


def from_json(body: Mapping[str, Any]) -> tuple[AttributionGraph, list[str]]:
    """The pruned graph that a file of any program holds, without texts, and the ids of its nodes in its order.

    Raises:
        Refused: the file has other shapes than the schema says, or its links run in a circle.
    """
    from vlmscope.core.graph import AttributionGraph, NodeKind, NodeTable

    try:
        rows = []
        for node in body["nodes"]:
            kind = _kind(node)
            layer = _layer(str(node["layer"]))
            rows.append((kind == NodeKind.LOGIT, layer, kind, str(node["node_id"]), float(node.get("token_prob") or 0)))
        # A bias is a source of its own layer's features, an error of the next layer's.
        order = {NodeKind.BIAS: 0, NodeKind.FEATURE: 1}
        rows.sort(key=lambda row: (row[0], row[1], order.get(NodeKind(row[2]), 2)))
        number = {row[3]: place for place, row in enumerate(rows)}
        links = [
            (number[str(link["target"])], number[str(link["source"])], float(link["weight"])) for link in body["links"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            f"the graph's nodes and links cannot be read ({type(error).__name__}: {str(error)[:80]})", 422
        ) from error
    links.sort(key=lambda link: link[:2])
    targets, sources = (np.array([link[side] for link in links], dtype=np.int64) for side in (0, 1))
    weights = np.array([link[2] for link in links], dtype=np.float64)
    if (sources >= targets).any() or not np.isfinite(weights).all():
        raise Refused("the graph's links do not all run from earlier to later layers", 422)
    kinds = np.array([row[2] for row in rows], dtype=np.int8)
    count, ends = len(rows), int((kinds == NodeKind.LOGIT).sum())
    zeros = np.zeros(count)
    probabilities = np.array([row[4] for row in rows if row[0]], dtype=np.float64)
    table = NodeTable(kinds, np.array([row[1] for row in rows], np.int16), zeros.astype(np.int32), zeros.astype(int),
                      zeros, zeros)  # fmt: skip
    graph = AttributionGraph(
        nodes=table,
        indptr=np.searchsorted(targets, np.arange(count + 1)),
        indices=sources.astype(np.int32),
        weights=weights,
        residual=zeros,
        left_out_mass=np.zeros((count, 0)),
        logit_probabilities=probabilities if probabilities.any() else np.ones(ends),
        logit_tokens=[""] * ends,
        tokens=[""],
        is_image=np.zeros(1, bool),
        image_index=np.full(1, -1),
        patch_boxes=[None],
        roles=np.array([""]),
        prompt="",
    )
    return graph, [row[3] for row in rows]


# ---- one file

# The page is built with the workbench's; its policy allows its own script and style by their hashes alone and fetches
# nothing. The data is JSON in an element that is never run.
PAGE = "graph.html"
TEMPLATE = shipped("assets/viewer/single.html")
_PLACE = "<!--DATA-->"
_BYTES = 18_000_000  # of a page; features with less influence lose their panels beyond it
_EXAMPLES = 4  # of each feature
_WITH_REPORT = 40  # features with a panel in the page of a report; task=export makes one with all


def is_built() -> bool:
    """Whether the page's template is there: a clone has it after `make viewer`, a wheel always."""
    return TEMPLATE.is_file()


def export_graph(folder: Path, studies: Sequence[Path] = (), most: int | None = None) -> tuple[Path, int]:
    """Write graph.html next to the graph.json in `folder`; returns its path and how many features have a panel.

    `studies` (of the decoder, of the vision tower) tell what features stand for; without any, those that come with
    vlmscope do for their own model. `most` limits the number of features with a panel, to those
    with most influence (a panel takes a tenth of a second).

    Raises:
        UserError: there is no graph, the page is not built, or the study is another model's.
    """
    if not (folder / GRAPH).is_file():
        raise UserError(f"{folder} has no {GRAPH}; give a run of task=trace or of an experiment with a graph")
    if not is_built():
        raise UserError("the page is not built: run `make viewer` once (it needs Node.js), or install the wheel")
    graph = read_json(folder / GRAPH)
    if not isinstance(graph, dict) or not isinstance(graph.get("nodes"), list):
        raise UserError(f"{folder / GRAPH} is not a graph: it has no nodes")
    data: dict[str, Any] = {"name": folder.resolve().name, "graph": graph, "features": {}}
    if (folder / ANNOTATIONS).is_file():
        data["annotations"] = checked(read_json(folder / ANNOTATIONS), str(folder / ANNOTATIONS))
    room = _BYTES - TEMPLATE.stat().st_size - len(embedded_json(data))
    data["features"], data["pictures"] = feature_panels(graph, studies, room, most)
    path = folder / PAGE
    write_text(path, read_text(TEMPLATE).replace(_PLACE, embedded_json(data), 1))
    return path, len(data["features"])


def export_with_report(folder: Path) -> None:
    """Write graph.html for the report in `folder` to link, where there is a graph and the page is built."""
    if (folder / GRAPH).is_file() and is_built():
        export_graph(folder, most=_WITH_REPORT)


def embedded_json(data: Mapping[str, Any]) -> str:
    """The element that holds `data`; nothing in it can end the element or begin another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
        text = text.replace(sign, escaped)
    return f'<script type="application/json" id="data">{text}</script>'


def feature_panels(
    graph: Mapping[str, Any], studies: Sequence[Path], room: int, most: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """What studies say about the graph's features, the most influential first, in at most `room` bytes.

    Features share many pictures: each is in the list once, and the panels name its number.
    """
    from vlmscope.viewer.studies import OpenStudy, Panels

    model = str(graph.get("metadata", {}).get("scan", ""))
    makers: dict[int, Panels] = {}  # by the layers of features
    for path in studies or map(shipped, SHIPPED_STUDIES.values()):
        try:
            opened = OpenStudy("", path)
        except UserError:
            if not studies:  # not shipped with this copy
                continue
            raise
        if opened.study.info.model == model:
            makers |= dict.fromkeys(opened.study.layers, Panels(opened.study, opened.labels, _EXAMPLES, 0))
        elif studies:
            raise UserError(
                f"the study {path} is of model {opened.study.info.model}, the graph of {model}; give another"
            )
    nodes = sorted(graph["nodes"], key=lambda node: node.get("influence") or 0.0)  # cumulative: the first has most
    panels: dict[str, Any] = {}
    pictures: dict[str, int] = {}
    for name in list(dict.fromkeys(name for node in nodes if (name := feature_of(node))))[:most]:
        try:
            feature = FeatureId.parse(name)
            maker = makers[feature.layer]
            panel = maker.panel(maker.study.feature(feature))
        except (UserError, KeyError):  # a feature that the study does not know
            continue
        known = len(pictures)
        for group in panel["groups"]:
            for picture in (one for example in group["examples"] for one in example["pictures"]):
                picture["url"] = str(pictures.setdefault(picture["url"], len(pictures)))
        room -= len(embedded_json(panel)) + sum(map(len, list(pictures)[known:]))
        if room < 0:
            break
        panels[name] = panel
    return panels, list(pictures)
