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
from collections.abc import Mapping, Sequence
from functools import lru_cache
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
from vlmscope.core.study import IMAGE, KINDS, TOP, ExampleView, FeatureRecord, StudyInfo, bin_edges
from vlmscope.features.labels import Label
from vlmscope.features.study_files import StudyFolder
from vlmscope.report.feature_page import (
    KIND_NAMES,
    ExampleGroup,
    FeaturePage,
    GraphUse,
    Numbered,
    PageExample,
    guess,
    render_scripted,
    shown_token,
    word_shares,
)
from vlmscope.report.page import percent
from vlmscope.report.pictures import SIDE, HeatPicture, decode, jpeg_bytes, thumbnail

_CACHED = 4096  # items whose small pictures are kept; features share their strongest items


class PageMaker:
    """Makes the pages of one study's features; `gone` counts the items whose pictures are not available."""

    def __init__(
        self,
        study: StudyFolder,
        labels: Mapping[FeatureId, Label],
        graphs: Mapping[FeatureId, Sequence[GraphUse]],
        tags: Mapping[FeatureId, tuple[str, ...]],
        examples: int,
        samples: int,
    ) -> None:
        """`examples` of the strongest inputs are shown, and `samples` of each weaker group."""
        self.study, self.labels, self.graphs, self.tags = study, labels, graphs, tags
        self.examples, self.samples = examples, samples
        self.run = (study.path.parent if study.path.name == "study" else study.path).name
        self.usual = word_shares(study.items[int(item)].caption for item in study.items.ids)
        self.missing, self.gone = "", 0
        # A cache of this maker, rather than of the class, which would keep all studies alive.
        self._thumbnails = lru_cache(_CACHED)(self._make_thumbnails)

    def page(self, record: FeatureRecord) -> tuple[FeaturePage, list[ExampleView]]:
        """The page of a feature, and the views of all its examples."""
        views = [self.study.view(example) for example in record.examples]
        grouped: dict[str, list[ExampleView]] = {TOP: []}
        for view in views:
            grouped.setdefault(view.example.group, []).append(view)
        quarters = sorted((name for name in grouped if name != TOP), key=lambda name: -int(name[1:]))
        groups = [self._group(name, quarters, grouped[name]) for name in (TOP, *quarters) if grouped[name]]
        label = self.labels.get(record.feature)
        page = FeaturePage(
            record,
            self.study.info,
            guess([(view.item.caption, view.places()) for view, _ in _once(grouped[TOP])], self.usual),
            tuple(groups),
            label if label is not None and label.text else None,
            tuple(self.graphs.get(record.feature, ())),
            self.tags.get(record.feature, ()),
            self.run,
            self.missing if any(p.data is None for g in groups for e in g.examples for p in e.pictures) else "",
        )
        return page, views

    def _group(self, name: str, quarters: Sequence[str], views: Sequence[ExampleView]) -> ExampleGroup:
        title, shown = "Strongest examples", self.examples
        if name != TOP:
            place, shown = quarters.index(name), self.samples
            ends = {0: ", the stronger inputs", len(quarters) - 1: ", the weakest inputs"}
            title = f"Part {place + 1} of {len(quarters)}{ends.get(place, '')}"
        examples = [
            PageExample(
                view.example.activation, self._pictures(view), view.places(), view.item.caption, view.item.origin, times
            )
            for view, times in _once(views)[:shown]
        ]
        return ExampleGroup(name, title, tuple(examples))

    def _pictures(self, view: ExampleView) -> tuple[HeatPicture, ...]:
        item, position = view.item, view.example.position
        at_peak = -1
        if item.kinds[position] == IMAGE:
            at_peak = int(item.pictures[np.count_nonzero(item.kinds[:position] == IMAGE)])
        return tuple(
            HeatPicture(*small, item.caption, view.picture_boxes(n), view.picture_levels(n), n == at_peak)
            for n, small in enumerate(self._thumbnails(item.id))
        )

    def _make_thumbnails(self, number: int) -> list[tuple[bytes | None, int, int]]:
        item = self.study.items[number]
        try:
            return [thumbnail(picture) for picture in self.study.pictures(item)]
        except UserError as error:
            self.missing = self.missing or str(error)
            self.gone += 1
            return [(None, SIDE, SIDE)] * item.n_pictures


def _once(views: Sequence[ExampleView]) -> list[tuple[ExampleView, int]]:
    """Each input once, in order of first appearance, with its number of views."""
    times: dict[tuple[str, int], list[ExampleView]] = {}
    for view in views:
        times.setdefault((view.item.digest, view.item.part), []).append(view)
    return [(same[0], len(same)) for same in times.values()]


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
