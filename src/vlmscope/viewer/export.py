"""A graph as one HTML file that opens from disk: the page of the workbench, the graph, and what its features stand for.

The page is `static/single.html`, built with the workbench's; its policy allows its own script and style by their hashes
alone and fetches nothing. The data is JSON in an element that is never run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json, read_text, shipped, write_text
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.study import SHIPPED_STUDIES
from vlmscope.viewer.graphs import ANNOTATIONS, checked, feature_of
from vlmscope.viewer.runs import GRAPH

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
    vlmscope do for their own model. At `most` so many features get a panel (a tenth of a second
    each), those with most influence.

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
    from vlmscope.report.feature_page import PageMaker
    from vlmscope.viewer.studies import OpenStudy, feature_body

    model = str(graph.get("metadata", {}).get("scan", ""))
    makers: dict[int, PageMaker] = {}  # by the layers of features
    for path in studies or map(shipped, SHIPPED_STUDIES.values()):
        try:
            opened = OpenStudy("", path)
        except UserError:
            if not studies:  # not shipped with this copy
                continue
            raise
        if opened.study.info.model == model:
            makers |= dict.fromkeys(opened.study.layers, PageMaker(opened.study, opened.labels, _EXAMPLES, 0))
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
            page = maker.page(maker.study.feature(feature))
        except (UserError, KeyError):  # a feature that the study does not know
            continue
        panel = feature_body(page, "", {"decoder": [], "coactivation": []})
        known = len(pictures)
        for group in panel["groups"]:
            for picture in (one for example in group["examples"] for one in example["pictures"]):
                picture["url"] = str(pictures.setdefault(picture["url"], len(pictures)))
        room -= len(embedded_json(panel)) + sum(map(len, list(pictures)[known:]))
        if room < 0:
            break
        panels[name] = panel
    return panels, list(pictures)
