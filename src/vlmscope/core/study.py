"""Records of feature studies: what each feature fires on, read from a study folder (docs/study.md). No torch here.

Legend: T positions of an item, S soft tokens among them, E positions that an example keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, FeatureId, PatchBox

KINDS = ("text", "image", "answer")  # of positions: what the user and the template say, soft tokens, what is answered
TEXT, IMAGE, ANSWER = range(3)
TOP = "top"  # the group of the strongest examples; samples are in "q1" (weakest) .. "q<n>"
BINS = 64  # of histograms, two an octave
LOWEST_OCTAVE = -16
PICTURE = "[picture]"  # stands for soft tokens where text is shown
LEVELS = 255  # the level of an example's peak
MANIFEST = "study.json"  # head of a study folder, written last

Words = tuple[tuple[str, float], ...]


def study_folder(path: str | Path) -> Path:
    """The folder with `study.json`: `path`, or `study/` in it when that is a run folder.

    Raises:
        UserError: there is no finished study.
    """
    for folder in (Path(path), Path(path) / "study"):
        if (folder / MANIFEST).is_file():
            return folder
    raise UserError(f"no {MANIFEST} in {path}; give the folder of a finished task=study")


def bin_edges() -> np.ndarray:
    """`[BINS + 1]` float64: bin b holds activations in [edge b, edge b + 1); the first and the last bin are open.

    They are 2^-16, 1.5 2^-16, 2^-15, .., 2^16: the bin is read off a float32's exponent and first bit of its mantissa.
    """
    number = np.arange(BINS + 1)
    return 2.0 ** (LOWEST_OCTAVE + number // 2) * (1 + (number % 2) / 2)


@dataclass(frozen=True)
class StudyItem:
    """One input of the model: an example of the data, or one exchange of it.

    Attributes:
        id: grows in the order of the data.
        source, row, part: which source of the study's data, which of its rows, and which of the row's inputs.
        origin: the same in words, such as a file and a line.
        digest: SHA-256 (32 hexadecimal digits) of the row's pictures and words.
        exchanges, text: what is said; one of them is empty.
        n_pictures: how many pictures come with it.
        token_ids, tokens: T of each.
        kinds: `[T]` uint8, `TEXT`, `IMAGE` or `ANSWER`.
        pictures: `[S]` int64, which picture each soft token belongs to.
        patch_boxes: S parts of pictures.
        grids: rows and columns of each picture's soft tokens; (0, 0) where they are no plain grid.
    """

    id: int
    source: str
    row: int
    part: int
    origin: str
    digest: str
    exchanges: tuple[Exchange, ...]
    text: str
    n_pictures: int
    token_ids: np.ndarray
    tokens: tuple[str, ...]
    kinds: np.ndarray
    pictures: np.ndarray
    patch_boxes: tuple[PatchBox, ...]
    grids: tuple[tuple[int, int], ...]

    @property
    def caption(self) -> str:
        """What is said, in one line."""
        if not self.exchanges:
            return " ".join(self.text.split())
        return " ".join(" ".join(part.split()) for turn in self.exchanges for part in turn)


@dataclass(frozen=True)
class StudyExample:
    """An item on which a feature fires.

    Attributes:
        group, rank: `TOP` with 0 for the strongest, or the quarter (or other part) of the feature's firing items that
            it was drawn from, with its rank there.
        activation: the largest in the item.
        item: the item's id.
        position: where it is largest; the first of equals.
        positions: `[E]` uint16, ascending: where the feature fires, among all soft tokens and the text near
            `position`.
        levels: `[E]` uint8, activations there in 255ths of `activation`, at least 1.
    """

    group: str
    rank: int
    activation: float
    item: int
    position: int
    positions: np.ndarray
    levels: np.ndarray

    def dense_levels(self, length: int) -> np.ndarray:
        """`[length]` uint8 of all positions of the item, 0 where it does not fire or nothing was kept."""
        out = np.zeros(length, dtype=np.uint8)
        out[self.positions] = self.levels
        return out

    def activations(self, length: int) -> np.ndarray:
        """`[length]` float32 of all positions of the item, to 1/510 of the peak."""
        return self.dense_levels(length).astype(np.float32) * np.float32(self.activation / LEVELS)


@dataclass(frozen=True)
class Place:
    """What a reader sees of some neighbouring positions: one token, or all soft tokens of a picture in a row.

    Attributes:
        text: the token; `PICTURE` for soft tokens.
        kind: `TEXT`, `IMAGE` or `ANSWER`.
        activation: the largest there.
        peak: the example's peak is there.
    """

    text: str
    kind: int
    activation: float
    peak: bool


@dataclass(frozen=True)
class ExampleView:
    """An example with its item, position by position.

    Attributes:
        activations: `[T]` float32.
        levels: `[T]` uint8, the same in 255ths of the peak.
    """

    example: StudyExample
    item: StudyItem
    activations: np.ndarray
    levels: np.ndarray

    @property
    def patch_activations(self) -> np.ndarray:
        """`[S]` float32, beside `item.patch_boxes`."""
        return self.activations[self.item.kinds == IMAGE]

    def grid(self, picture: int = 0) -> np.ndarray | None:
        """`[rows, columns]` uint8 levels of one picture; None where its soft tokens are no plain grid."""
        rows, columns = self.item.grids[picture]
        return self.picture_levels(picture).reshape(rows, columns) if rows else None

    def picture_levels(self, picture: int) -> np.ndarray:
        """`[P]` uint8 levels of one picture's P soft tokens."""
        return self.levels[self.item.kinds == IMAGE][self.item.pictures == picture]

    def picture_boxes(self, picture: int) -> tuple[PatchBox, ...]:
        """The parts of one picture that its P soft tokens stand for."""
        return tuple(self.item.patch_boxes[at] for at in np.flatnonzero(self.item.pictures == picture))

    def window(self, size: int = 16) -> tuple[tuple[str, ...], np.ndarray]:
        """Text tokens within `size` of the peak, soft tokens left out, and their activations `[W]` float32."""
        text = np.flatnonzero(self.item.kinds != IMAGE)
        middle = int(np.searchsorted(text, self.example.position))
        near = text[max(0, middle - size) : middle + size + 1]
        return tuple(self.item.tokens[i] for i in near), self.activations[near]

    def places(self, size: int = 16) -> tuple[Place, ...]:
        """The text within `size` places of the peak, in which every run of a picture's soft tokens is one place."""
        kinds = self.item.kinds
        pictures = np.full(len(kinds), -1)
        pictures[kinds == IMAGE] = self.item.pictures
        alone = (kinds[1:] != IMAGE) | (pictures[1:] != pictures[:-1])
        runs = np.split(np.arange(len(kinds)), np.flatnonzero(alone) + 1)
        middle = next(n for n, run in enumerate(runs) if run[-1] >= self.example.position)
        first = max(0, middle - size)
        return tuple(self._place(run, n == middle) for n, run in enumerate(runs[first : middle + size + 1], first))

    def _place(self, run: np.ndarray, peak: bool) -> Place:
        kind = int(self.item.kinds[run[0]])
        text = PICTURE if kind == IMAGE else self.item.tokens[run[0]]
        return Place(text, kind, float(self.activations[run].max()), peak)


@dataclass(frozen=True)
class FeatureRecord:
    """What a study knows of a feature.

    Attributes:
        feature: which one.
        fired: positions at which it is active, by `KINDS`.
        items_fired: items with such a position.
        activation_sum: over all positions.
        activation_max: the largest; 0 when it never fires.
        histogram: `[3, BINS]` int64, activations by kind of position and by bin (`bin_edges`).
        quantile_values: peaks that divide the sampled firing items into the groups, weakest first.
        examples: the strongest first, then samples by group.
        top_logits, bottom_logits: tokens that it raises and lowers most; empty where the study left them out.
    """

    feature: FeatureId
    fired: dict[str, int]
    items_fired: int
    activation_sum: float
    activation_max: float
    histogram: np.ndarray
    quantile_values: tuple[float, ...]
    examples: tuple[StudyExample, ...] = ()
    top_logits: Words = ()
    bottom_logits: Words = ()

    @property
    def positions_fired(self) -> int:
        """Positions at which it is active."""
        return sum(self.fired.values())

    def group(self, name: str) -> tuple[StudyExample, ...]:
        """The examples of one group, such as `TOP` or "q1"."""
        return tuple(example for example in self.examples if example.group == name)


@dataclass(frozen=True)
class StudyInfo:
    """The head of a study folder, `study.json`.

    Attributes:
        model: its name.
        transcoders: name, activation, k and whether they are cross-layer.
        n_features: by layer.
        data: the sources' settings as they were read, with the split and the limit.
        settings: those of the study.
        items, rows: inputs of the model, and rows of the data that gave them.
        positions: of all items, by `KINDS`.
        skipped: rows that could not be used, by source.
        origin: everything that decided the study, by name (`vlmscope.core.artifacts`); empty in earlier versions.
    """

    model: str
    transcoders: dict[str, object]
    n_features: dict[int, int]
    data: dict[str, Any]
    settings: dict[str, Any]
    items: int
    rows: int
    positions: dict[str, int]
    skipped: dict[str, int] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
