"""Where features stand in attribution graphs, with relative links to what can be opened of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.report.feature_page import GraphUse

if TYPE_CHECKING:
    from vlmscope.core.graph import PrunedGraph
    from vlmscope.core.study import StudyInfo

_FILES = {"report": "report.html", "drawing": "figures/graph.png", "graph.json": "graph.json"}


def graph_uses(places: Sequence[str], info: StudyInfo, pages: Path) -> dict[FeatureId, list[GraphUse]]:
    """For every feature that pruning kept in some graph, where it is there.

    Args:
        places: run folders of traces, or their graph.safetensors.
        info: of the study that pages are made of.
        pages: the folder of the pages, from which links lead.

    Raises:
        UserError: no graph there, or one of another model.
    """
    from vlmscope.attribution.compare import graph_file
    from vlmscope.attribution.export import load_graph

    uses: dict[FeatureId, list[GraphUse]] = {}
    for file in dict.fromkeys(graph_file(place) for place in places):
        pruned = load_graph(file)
        model = str(pruned.graph.meta.get("model", info.model))
        if model != info.model:
            raise UserError(f"{file} is of model {model}, the study of {info.model}; give graphs of one model")
        links = _links(file.parent, pages)
        for feature, nodes in _kept(pruned).items():
            uses.setdefault(feature, []).append(_use(pruned, nodes, file.parent.name, links))
    return uses


def _kept(pruned: PrunedGraph) -> dict[FeatureId, list[int]]:
    table = pruned.graph.nodes
    found: dict[FeatureId, list[int]] = {}
    for node in np.flatnonzero(pruned.node_mask & (table.kind == NodeKind.FEATURE)).tolist():
        found.setdefault(table.feature_id(node), []).append(node)
    return found


def _use(pruned: PrunedGraph, nodes: list[int], name: str, links: tuple[tuple[str, str], ...]) -> GraphUse:
    graph, table = pruned.graph, pruned.graph.nodes
    positions = tuple(
        (int(table.position[node]), graph.tokens[int(table.position[node])], float(table.activation[node]))
        for node in nodes
    )
    share = float(pruned.influence[nodes].sum() / (pruned.influence.sum() or 1.0))
    return GraphUse(name, graph.prompt, links, positions, share)


def _links(run: Path, pages: Path) -> tuple[tuple[str, str], ...]:
    there = {words: run / file for words, file in _FILES.items() if (run / file).is_file()}
    return tuple((words, quote(os.fsencode(os.path.relpath(file, pages)))) for words, file in there.items())
