"""`index.html` of feature pages: a tile a feature, to be searched, filtered and sorted without a server.

Names, words and links are in the page's text; small pictures are in one table, each once, and drawn when they come into
sight. So it opens at once for a thousand features.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from vlmscope.core.artifacts import write_text
from vlmscope.core.ids import FeatureId
from vlmscope.core.study import IMAGE, KINDS, Place
from vlmscope.report.feature_page import FeaturePage, PageExample, StudyFacts
from vlmscope.report.feature_words import shown_token
from vlmscope.report.heat import Geometries, HeatPicture, strongest
from vlmscope.report.scripted import KIND_NAMES, render_scripted
from vlmscope.report.sections import percent
from vlmscope.report.thumbnails import data_uri

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
