"""Records of feature studies: what each feature fires on, read from a study folder (docs/study.md), without torch.

Legend: T positions of an item, S soft tokens among them, E positions stored with an example.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, FeatureId, PatchBox

KINDS = ("text", "image", "answer")  # of positions: prompt and template, soft tokens, answer
TEXT, IMAGE, ANSWER = range(3)
TOP = "top"  # the group of the strongest examples; samples are in "q1" (weakest) .. "q<n>"
BINS = 64  # of histograms, two per octave
LOWEST_OCTAVE = -16  # the first bin starts at 2^-16
PICTURE = "[picture]"  # replaces soft tokens in text
LEVELS = 255  # the level of an example's peak
# Of the default model, by their ids in the workbench: of its decoder, and of its vision tower.
SHIPPED_STUDIES = {"shipped": "assets/orrery2_study", "shipped_tower": "assets/orrery2_tower_study"}
NO_LABELS = "none"  # in the place of a study: features are shown by their ids alone
MANIFEST = "study.json"  # head of a study folder, written last: its presence means that the study is finished

Words = tuple[tuple[str, float], ...]


def study_folder(path: str | Path) -> Path:
    """The folder with `study.json`: `path` itself, or its `study/` if it is a run folder.

    Raises:
        UserError: there is no finished study.
    """
    for folder in (Path(path), Path(path) / "study"):
        if (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"no {MANIFEST} in {path}; give the folder of a finished task=study")


def bin_edges() -> np.ndarray:
    """`[BINS + 1]` float64: bin b holds activations in [edge b, edge b + 1); the first and the last bin are open.

    Edges are 2^-16, 1.5 2^-16, 2^-15, .., 2^16, so exponent and first mantissa bit of a float32 give its bin.
    """
    number = np.arange(BINS + 1)
    return 2.0 ** (LOWEST_OCTAVE + number // 2) * (1 + (number % 2) / 2)


def item_hash(item: np.ndarray) -> np.ndarray:
    """A well mixed number of 0 .. 2^63 - 1 for each item: [..] int64 -> [..] int64 (splitmix64, Steele et al. 2014)."""
    z = item.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class StudyItem:
    """One input of the model: an example of the data, or one of its exchanges."""

    id: int  # ascending in the order of the data
    source: str  # name of the source
    row: int  # number in the source
    part: int  # number among the inputs of the row
    origin: str  # in words, such as a file and a line
    digest: str  # 32 hexadecimal digits of the SHA-256 of the row's pictures and words
    exchanges: tuple[Exchange, ...]  # either these or `text` is empty
    text: str
    n_pictures: int
    token_ids: np.ndarray  # [T]
    tokens: tuple[str, ...]  # T
    kinds: np.ndarray  # [T] uint8, `TEXT`, `IMAGE` or `ANSWER`
    pictures: np.ndarray  # [S] int64, number of the picture of each soft token
    patch_boxes: tuple[PatchBox, ...]  # S
    grids: tuple[tuple[int, int], ...]  # rows and columns of each picture's soft tokens; (0, 0) if they form no grid

    @property
    def caption(self) -> str:
        """The item's words on one line."""
        if not self.exchanges:
            return " ".join(self.text.split())
        return " ".join(" ".join(part.split()) for turn in self.exchanges for part in turn)


@dataclass(frozen=True)
class StudyExample:
    """An item on which a feature fires."""

    group: str  # `TOP`, or the quantile of firing items that it was drawn from: "q1" (weakest) .. "q<n>"
    rank: int  # in the group, 0 for the strongest
    activation: float  # maximum over the item
    item: int  # id of the item
    position: int  # of the maximum, the first one
    positions: np.ndarray  # [E] uint16, ascending: where it fires, among soft tokens and text near `position`
    levels: np.ndarray  # [E] uint8, activations at `positions` in 255ths of `activation`, at least 1

    def dense_levels(self, length: int) -> np.ndarray:
        """`[length]` uint8 levels of all positions of the item, 0 where it does not fire or nothing is stored."""
        out = np.zeros(length, dtype=np.uint8)
        out[self.positions] = self.levels
        return out

    def activations(self, length: int) -> np.ndarray:
        """`[length]` float32 activations of all positions of the item, accurate to 1/510 of the peak."""
        return self.dense_levels(length).astype(np.float32) * np.float32(self.activation / LEVELS)


@dataclass(frozen=True)
class Place:
    """One token as shown to a reader, or a run of soft tokens of one picture."""

    text: str  # the token; `PICTURE` for soft tokens
    kind: int  # `TEXT`, `IMAGE` or `ANSWER`
    activation: float  # maximum over its positions
    peak: bool  # whether it contains the example's peak


@dataclass(frozen=True)
class ExampleView:
    """An example with its item, position by position."""

    example: StudyExample
    item: StudyItem
    activations: np.ndarray  # [T] float32
    levels: np.ndarray  # [T] uint8, activations in 255ths of the peak

    @property
    def patch_activations(self) -> np.ndarray:
        """`[S]` float32 activations of the soft tokens, in the order of `item.patch_boxes`."""
        return self.activations[self.item.kinds == IMAGE]

    def picture_levels(self, picture: int) -> np.ndarray:
        """`[P]` uint8 levels of one picture's P soft tokens."""
        return self.levels[self.item.kinds == IMAGE][self.item.pictures == picture]

    def picture_boxes(self, picture: int) -> tuple[PatchBox, ...]:
        """The parts of one picture that its P soft tokens cover."""
        return tuple(self.item.patch_boxes[token] for token in np.flatnonzero(self.item.pictures == picture))

    def window(self, size: int = 16) -> tuple[tuple[str, ...], np.ndarray]:
        """Text tokens within `size` of the peak, soft tokens left out, and their activations `[W]` float32."""
        text = np.flatnonzero(self.item.kinds != IMAGE)
        middle = int(np.searchsorted(text, self.example.position))
        near = text[max(0, middle - size) : middle + size + 1]
        return tuple(self.item.tokens[position] for position in near), self.activations[near]

    def places(self, size: int = 16) -> tuple[Place, ...]:
        """The places within `size` of the peak; each run of a picture's soft tokens is one place."""
        kinds = self.item.kinds
        pictures = np.full(len(kinds), -1)
        pictures[kinds == IMAGE] = self.item.pictures
        starts = (kinds[1:] != IMAGE) | (pictures[1:] != pictures[:-1])
        runs = np.split(np.arange(len(kinds)), np.flatnonzero(starts) + 1)
        middle = next(n for n, run in enumerate(runs) if run[-1] >= self.example.position)
        first = max(0, middle - size)
        places = []
        for number, run in enumerate(runs[first : middle + size + 1], first):
            kind = int(kinds[run[0]])
            text = PICTURE if kind == IMAGE else self.item.tokens[run[0]]
            places.append(Place(text, kind, float(self.activations[run].max()), number == middle))
        return tuple(places)


@dataclass(frozen=True)
class FeatureRecord:
    """Statistics and examples of a feature."""

    feature: FeatureId
    fired: dict[str, int]  # number of positions at which it is active, by `KINDS`
    items_fired: int  # number of items with such a position
    activation_sum: float  # over all positions
    activation_max: float  # 0 when it never fires
    histogram: np.ndarray  # [3, BINS] int64, activations by kind of position and by bin (`bin_edges`)
    quantile_values: tuple[float, ...]  # peak activations between the groups of sampled items, weakest first
    examples: tuple[StudyExample, ...] = ()  # the strongest first, then samples by group
    top_logits: Words = ()  # tokens that it raises most; empty if the study did not compute them
    bottom_logits: Words = ()  # tokens that it lowers most

    @property
    def positions_fired(self) -> int:
        """Number of positions at which it is active."""
        return sum(self.fired.values())

    def group(self, name: str) -> tuple[StudyExample, ...]:
        """The examples of one group, such as `TOP` or "q1"."""
        return tuple(example for example in self.examples if example.group == name)


@dataclass(frozen=True)
class StudyInfo:
    """The head of a study folder, `study.json`."""

    model: str
    transcoders: dict[str, object]  # name, activation, k and cross_layer
    n_features: dict[int, int]  # by layer
    data: dict[str, Any]  # settings of the sources, with split and limit
    settings: dict[str, Any]  # of the study
    items: int  # number of inputs of the model
    rows: int  # number of rows that they come from
    positions: dict[str, int]  # number in all items, by `KINDS`
    skipped: dict[str, int] = field(default_factory=dict)  # number of unusable rows, by source
    origin: dict[str, Any] = field(default_factory=dict)  # as in `core.artifacts`; empty in studies of old versions
