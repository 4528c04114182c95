"""The gallery of feature pages, and features as JSON for viewers.

A feature as JSON that the field's viewers read (Neuronpedia's, circuit-tracer's), and more for ours.

What they know: `index`, `transcoder_id`, `examples_quantiles` (each with `quantile_name` and `examples` of `tokens`,
`tokens_acts_list`, `train_token_ind`, `is_repeated_datapoint`), `top_logits`, `bottom_logits`, `act_min`, `act_max`,
`quantile_values`, `histogram`, `activation_frequency`. They know no pictures,
so each run of a picture's soft tokens is one token, `[picture]`, with its largest activation; patches are beside it.
The schema is in `schema/feature.schema.json`.

`index.html` of feature pages: a tile a feature, to be searched, filtered and sorted without a server.

Names, words and links are in the page's text; small pictures are in one table, each once, and drawn when they come into
sight. So it opens at once for a thousand features.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscope.core.artifacts import write_text
from vlmscope.core.records import FeatureId
from vlmscope.core.study import IMAGE, KINDS, TOP, ExampleView, FeatureRecord, Place, StudyInfo, bin_edges
from vlmscope.report.feature_page import KIND_NAMES, FeaturePage, PageExample, StudyFacts, render_scripted, shown_token
from vlmscope.report.page import percent
from vlmscope.report.thumbnails import Geometries, HeatPicture, data_uri, strongest

SCHEMA_VERSION = 1


def feature_json(
    record: FeatureRecord, views: Sequence[ExampleView], info: StudyInfo, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The JSON of a feature.

    Args:
        record: what the study knows of it.
        views: of its examples, in their order.
        info: of the study.
        extra: more for the key `vlmscope`, such as a label.
    """
    window, positions = int(str(info.settings["window"])), sum(info.positions.values())
    names = list(dict.fromkeys(view.example.group for view in views))
    counts, edges = record.histogram.sum(0), bin_edges()
    used = np.flatnonzero(counts)
    bins = slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
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
        "examples_quantiles": [
            _group(name, names, [v for v in views if v.example.group == name], window) for name in names
        ],
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
            **(extra or {}),
        },
    }


def quantile_name(name: str, quantiles: int) -> str:
    """A group in the words of the field's viewers: `Top activations`, `Subsample interval 0` (the strongest) ..."""
    return "Top activations" if name == TOP else f"Subsample interval {quantiles - int(name[1:])}"


def _group(name: str, names: Sequence[str], views: Sequence[ExampleView], window: int) -> dict[str, Any]:
    quantiles = max((int(other[1:]) for other in names if other != TOP), default=0)
    seen: set[tuple[str, int]] = set()
    examples = []
    for view in views:
        input_ = (view.item.digest, view.item.part)
        examples.append(_example(view, window, input_ in seen))
        seen.add(input_)
    return {"quantile_name": quantile_name(name, quantiles), "group": name, "examples": examples}


def _example(view: ExampleView, window: int, repeated: bool) -> dict[str, Any]:
    places = view.places(window)
    return {
        "tokens": [place.text for place in places],
        "tokens_acts_list": [place.activation for place in places],
        "train_token_ind": next(n for n, place in enumerate(places) if place.peak),
        "is_repeated_datapoint": repeated,
        "token_kinds": [KINDS[place.kind] for place in places],
        "activation": view.example.activation,
        "origin": view.item.origin,
        "caption": view.item.caption,
        "patches": [_patches(view, picture) for picture in range(view.item.n_pictures)],
    }


def _patches(view: ExampleView, picture: int) -> dict[str, Any]:
    """One picture: levels are 255ths of the example's activation, one a soft token; no rows where they are no grid."""
    rows, columns = view.item.grids[picture] if picture < len(view.item.grids) else (0, 0)
    return {
        "picture": picture,
        "rows": rows,
        "columns": columns,
        "levels": view.picture_levels(picture).tolist(),
        "boxes": [[round(edge, 6) for edge in box] for box in view.picture_boxes(picture)],
    }


PICTURES = 3  # a tile
_SIDE, _QUALITY = 92, 75
_NEAR = 6  # places beside the peak
_WORDS = 400  # letters that the search looks through
_SORTS = (
    ("layer up", "layer"),
    ("often down", "most often"),
    ("often up", "most rarely"),
    ("strong down", "strongest activation"),
    ("score down", "label score"),
)


@dataclass(frozen=True)
class TilePicture:
    """A picture of a tile; `number` is its place in the page's table, None when the picture could not be had."""

    heat: HeatPicture
    number: int | None


@dataclass(frozen=True)
class Tile:
    """What the gallery says of a feature; `places` are the words around its `top`, if it is in words."""

    feature: FeatureId
    file: str
    title: str
    kind: str
    shares: dict[str, float]
    split: str
    often: str
    item_share: float
    activation_max: float
    score: float | None
    label_class: str
    promotes: str
    words: str
    pictures: tuple[TilePicture, ...]
    places: tuple[Place, ...]
    top: float


@dataclass
class Gallery:
    """The page, filled by `add`.

    Attributes:
        title, summary, footer: what it says of itself.
        facts: of the study.
        order: what the first way to sort is called, that in which features are added.
    """

    title: str
    summary: str
    facts: StudyFacts
    order: str = "as chosen"
    footer: str = ""
    missing: str = ""
    tiles: list[Tile] = field(default_factory=list)
    _numbers: dict[bytes, int] = field(default_factory=dict)

    def add(self, page: FeaturePage) -> None:
        """Put a feature at the end."""
        top: Sequence[PageExample] = page.groups[0].examples if page.groups else ()
        best = [found for one in top if (found := strongest(one.pictures)) is not None][:PICTURES]
        in_words = bool(top) and any(place.peak and place.kind != IMAGE for place in top[0].places)
        label = page.label
        self.missing = self.missing or page.missing
        self.tiles.append(
            Tile(
                page.feature,
                page.file,
                page.title,
                page.main_kind,
                page.shares,
                ", ".join(f"{percent(page.shares[kind])} {KIND_NAMES[kind]}" for kind in KINDS),
                f"{percent(page.item_share)} of inputs",
                page.item_share,
                page.record.activation_max,
                label.score if label and label.holds else None,
                "unlabelled" if label is None or not label.holds else "labelled",
                ", ".join(shown_token(word) for word, _ in page.record.top_logits[:PICTURES]),
                _words(page, top),
                tuple(TilePicture(picture, self._number(picture)) for picture in best),
                _near_peak(top) if in_words else (),
                top[0].activation if top else 0.0,
            )
        )

    def arrange(self, features: Sequence[FeatureId]) -> None:
        """Put the tiles into this order."""
        place = {feature: at for at, feature in enumerate(features)}
        self.tiles.sort(key=lambda tile: place[tile.feature])

    @property
    def layers(self) -> list[int]:
        """Those of its features."""
        return sorted({tile.feature.layer for tile in self.tiles})

    @property
    def kinds(self) -> list[tuple[str, str]]:
        """Where its features mostly fire, with words."""
        present = {tile.kind for tile in self.tiles}
        known = [
            *((kind, KIND_NAMES[kind]) for kind in ("image", "text", "answer")),
            ("mixed", "several"),
            ("none", "nothing"),
        ]
        return [(kind, words) for kind, words in known if kind in present]

    @property
    def sorts(self) -> list[tuple[str, str]]:
        """Ways to sort that tell its features apart."""
        scored = any(tile.score is not None for tile in self.tiles)
        return [("order up", self.order), *(one for one in _SORTS if scored or not one[0].startswith("score"))]

    def render(self) -> str:
        """The page as one HTML string."""
        geometries = Geometries()
        table = [data_uri(data) for data in self._numbers]
        return render_scripted(
            "gallery.html.j2", geometries=geometries, gallery=self, heat=geometries, tables={"pictures": table}
        )

    def write(self, folder: Path) -> Path:
        """Write `index.html`; returns its path.

        Raises:
            UserError: the folder cannot be written.
        """
        write_text(folder / "index.html", self.render())
        return folder / "index.html"

    def _number(self, picture: HeatPicture) -> int | None:
        if picture.data is None:
            return None
        small = _small(picture.data)
        return self._numbers.setdefault(small, len(self._numbers))


def _small(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_QUALITY, optimize=True)
    return buffer.getvalue()


def _near_peak(top: Sequence[PageExample]) -> tuple[Place, ...]:
    places = top[0].places
    at = next(n for n, place in enumerate(places) if place.peak)
    return places[max(0, at - _NEAR) : at + _NEAR + 1]


def _words(page: FeaturePage, top: Sequence[PageExample]) -> str:
    """What the search looks through, in lower case."""
    parts: Iterable[str] = (
        str(page.feature),
        page.title,
        *page.tags,
        *(shown_token(word) for word, _ in page.record.top_logits[:PICTURES]),
        *(graph.name for graph in page.graphs),
        *dict.fromkeys(one.caption for one in top[:PICTURES]),
    )
    return " ".join(" ".join(parts).lower().split())[:_WORDS]
