"""Pages of a study's features: their examples, labels and graphs, the gallery, and JSON for the field's viewers.

`index.html` has a tile per feature, to be searched, filtered and sorted without a server. Names, words and links are
in the page's text; small pictures are in one table, each once, and drawn when they come into sight, so the page opens
at once for a thousand features.

The JSON of a feature is what Neuronpedia's and circuit-tracer's viewers read (`schema/feature.schema.json`), with more
under the key `vlmscope`. They know no pictures, so each run of a picture's soft tokens is one token, `[picture]`, with
its largest activation; its patches are listed next to it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from vlmscope.attribution.compare import graph_file
from vlmscope.attribution.export import load_graph
from vlmscope.core.artifacts import write_text
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.core.study import IMAGE, KINDS, TOP, ExampleView, StudyInfo, bin_edges
from vlmscope.report.feature_page import (
    KIND_NAMES,
    FeaturePage,
    GraphUse,
    Numbered,
    render_scripted,
    shown_token,
)
from vlmscope.report.page import percent
from vlmscope.report.pictures import decode, jpeg_bytes

_LINKED = {"report": "report.html", "drawing": "figures/graph.png", "graph.json": "graph.json"}


def graph_uses(places: Sequence[str], info: StudyInfo, pages: Path) -> dict[FeatureId, list[GraphUse]]:
    """The graphs in which pruning kept each feature, and where; links are relative to the folder `pages`.

    `places` are run folders of traces, or their graph.safetensors. A `UserError` for graphs of another model.
    """
    uses: dict[FeatureId, list[GraphUse]] = {}
    for file in dict.fromkeys(graph_file(place) for place in places):
        pruned = load_graph(file)
        graph, table, run = pruned.graph, pruned.graph.nodes, file.parent
        model = str(graph.meta.get("model", info.model))
        if model != info.model:
            raise UserError(f"{file} is of model {model}, the study of {info.model}; give graphs of one model")
        links = tuple(
            (words, quote(os.fsencode(os.path.relpath(run / name, pages))))
            for words, name in _LINKED.items()
            if (run / name).is_file()
        )
        kept: dict[FeatureId, list[int]] = {}
        for node in np.flatnonzero(pruned.node_mask & (table.kind == NodeKind.FEATURE)).tolist():
            kept.setdefault(table.feature_id(node), []).append(node)
        for feature, nodes in kept.items():
            columns = table.position[nodes].tolist()
            tokens = [graph.tokens[column] for column in columns]
            positions = zip(columns, tokens, table.activation[nodes].tolist(), strict=True)
            share = float(pruned.influence[nodes].sum() / (pruned.influence.sum() or 1.0))
            uses.setdefault(feature, []).append(GraphUse(run.name, graph.prompt, links, tuple(positions), share))
    return uses


SCHEMA_VERSION = 1
_LABEL_KEYS = ("text", "source", "score", "low", "high", "beats_chance", "place")


def feature_json(page: FeaturePage, views: Sequence[ExampleView]) -> dict[str, Any]:
    """The JSON of a feature; `views` are of all its examples, in their order."""
    record, info = page.record, page.info
    window, positions = int(str(info.settings["window"])), sum(info.positions.values())
    counts, edges = record.histogram.sum(0), bin_edges()
    used = np.flatnonzero(counts)
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
    names = list(dict.fromkeys(view.example.group for view in views))
    quantiles = max((int(name[1:]) for name in names if name != TOP), default=0)
    groups = []
    for name in names:
        seen: set[tuple[str, int]] = set()
        examples = []
        for view in (view for view in views if view.example.group == name):
            input_ = (view.item.digest, view.item.part)
            examples.append(_example(view, window, input_ in seen))
            seen.add(input_)
        groups.append({"quantile_name": quantile_name(name, quantiles), "group": name, "examples": examples})
    return {
        "index": record.feature.index,
        "layer": record.feature.layer,
        "transcoder_id": f"{info.transcoders.get('name')}/layer_{record.feature.layer}",
        "top_logits": [token for token, _ in record.top_logits],
        "bottom_logits": [token for token, _ in record.bottom_logits],
        "act_min": 0.0,
        "act_max": record.activation_max,
        "quantile_values": list(record.quantile_values),
        "histogram": counts[bins].tolist(),
        "activation_frequency": record.positions_fired / positions if positions else 0.0,
        "examples_quantiles": groups,
        "vlmscope": {
            "schema_version": SCHEMA_VERSION,
            "feature": str(record.feature),
            "cantor": record.feature.cantor,
            "model": info.model,
            "fired": dict(record.fired),
            "positions": dict(info.positions),
            "items_fired": record.items_fired,
            "items": info.items,
            "activation_sum": record.activation_sum,
            "histogram_edges": edges[bins.start : bins.stop + 1].tolist() if len(used) else [],
            "histogram_by_kind": {kind: record.histogram[row, bins].tolist() for row, kind in enumerate(KINDS)},
            "top_logit_values": [value for _, value in record.top_logits],
            "bottom_logit_values": [value for _, value in record.bottom_logits],
            "label": None if page.label is None else {key: getattr(page.label, key) for key in _LABEL_KEYS},
            "guess": page.guess,
            "sentence": page.sentence(),
            "graphs": [{"name": use.name, "prompt": use.prompt, "share": use.share} for use in page.graphs],
        },
    }


def quantile_name(name: str, quantiles: int) -> str:
    """The name of a group in the field's viewers: `Top activations`, `Subsample interval 0` (the strongest) ..."""
    return "Top activations" if name == TOP else f"Subsample interval {quantiles - int(name[1:])}"


def _example(view: ExampleView, window: int, repeated: bool) -> dict[str, Any]:
    places, item, patches = view.places(window), view.item, []
    for picture in range(item.n_pictures):
        # No rows where the soft tokens are no grid.
        rows, columns = item.grids[picture] if picture < len(item.grids) else (0, 0)
        levels = view.picture_levels(picture).tolist()  # 255ths of the example's activation
        boxes = [[round(edge, 6) for edge in box] for box in view.picture_boxes(picture)]
        patches.append({"picture": picture, "rows": rows, "columns": columns, "levels": levels, "boxes": boxes})
    return {
        "tokens": [place.text for place in places],
        "tokens_acts_list": [place.activation for place in places],
        "train_token_ind": next(n for n, place in enumerate(places) if place.peak),
        "is_repeated_datapoint": repeated,
        "token_kinds": [KINDS[place.kind] for place in places],
        "activation": view.example.activation,
        "origin": item.origin,
        "caption": item.caption,
        "patches": patches,
    }


_PICTURES = 3  # a tile
_NEAR = 6  # places on either side of the peak
_WORDS = 400  # letters that the search looks through
_KINDS = {**KIND_NAMES, "mixed": "several", "none": "nothing"}
_SORTS = {
    "layer up": "layer",
    "often down": "most often",
    "often up": "most rarely",
    "strong down": "strongest activation",
    "score down": "label score",
}


def write_gallery(
    folder: Path, pages: Sequence[FeaturePage], title: str, summary: str, order: str = "as chosen", footer: str = ""
) -> Path:
    """Write `index.html` with a tile per page, in their order, which `order` names; returns its path."""
    small, kinds = Numbered(), {page.main_kind for page in pages}
    sorts = {"order up": order} | _SORTS
    if not any(page.labelled and page.label and page.label.score is not None for page in pages):
        del sorts["score down"]
    text = render_scripted(
        "gallery.html.j2",
        small,
        title=title,
        summary=summary,
        footer=footer,
        model=pages[0].info.model,
        missing=next((page.missing for page in pages if page.missing), ""),
        layers=sorted({page.feature.layer for page in pages}),
        kinds=[(kind, words) for kind, words in _KINDS.items() if kind in kinds],
        sorts=list(sorts.items()),
        tiles=[(page, _tile(page, small)) for page in pages],
    )
    write_text(folder / "index.html", text)
    return folder / "index.html"


def _tile(page: FeaturePage, small: Numbered) -> dict[str, Any]:
    """Values of a tile that the page lacks; its pictures are numbers of the table `small`."""
    top = page.groups[0].examples if page.groups else ()
    promotes = [shown_token(word) for word, _ in page.record.top_logits[:_PICTURES]]
    of_examples = [example.pictures for example in top if example.pictures]
    best = [max(pictures, key=lambda picture: int(picture.levels.max(initial=0))) for pictures in of_examples]
    searched = [
        str(page.feature),
        page.title,
        *page.tags,
        *promotes,
        *(graph.name for graph in page.graphs),
        *dict.fromkeys(example.caption for example in top[:_PICTURES]),
    ]
    places = top[0].places if top else ()
    peak = next((n for n, place in enumerate(places) if place.peak and place.kind != IMAGE), None)
    return {
        "split": ", ".join(f"{percent(page.shares[kind])} {KIND_NAMES[kind]}" for kind in KINDS),
        "promotes": ", ".join(promotes),
        "words": " ".join(" ".join(searched).lower().split())[:_WORDS],
        "pictures": [
            (picture, None if picture.data is None else small.number(jpeg_bytes(decode(picture.data), 92, 75)[0]))
            for picture in best[:_PICTURES]
        ],
        # The words around the peak, if it is in words.
        "places": () if peak is None else places[max(0, peak - _NEAR) : peak + _NEAR + 1],
        "top": top[0].activation if top else 0.0,
    }
