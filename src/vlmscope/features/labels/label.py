"""The record of a label, and the file of the labels of a study: `labels/<set>.parquet` in the study's folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import pyarrow as pa

from vlmscope.core.ids import FeatureId
from vlmscope.features.study.schema import read_table, write_table

FOLDER = "labels"
LABEL_TABLE = pa.schema(
    [
        ("layer", pa.int32()),
        ("feature", pa.int32()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("level", pa.string()),
        ("score", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("balanced_accuracy", pa.float64()),
        ("p", pa.float64()),
        ("positives", pa.int32()),
        ("negatives", pa.int32()),
        ("beats_chance", pa.bool_()),
        ("strong", pa.bool_()),
        ("top_score", pa.float64()),
        ("rule", pa.string()),
        ("place", pa.string()),
        ("place_score", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Label:
    """What a feature is called, and how far that can be trusted.

    Attributes:
        text: the label.
        source: "hand", "auto", or what an outside explainer is called.
        level: what the score is about: "items" (does the feature fire on this item), "positions" (at which positions
            of an item does it fire), or "" for no score.
        score, low, high: detection AUROC on items that the label was not found on, with its 95 % interval.
        balanced_accuracy: of "fires" against "does not".
        p: one-sided, of chance.
        positives, negatives: items scored on; of "positions", `positives` alone.
        beats_chance: survives a false discovery rate of 5 % over all labels of the set.
        strong: the feature fires on most items; the label says where it is strong.
        top_score: AUROC of the feature's strongest items against those on which it does not fire.
        rule: the item's part as `Rule.to_json`; "" for none.
        place, place_score: where in the item, and its AUROC.
    """

    text: str
    source: str
    level: str = ""
    score: float | None = None
    low: float | None = None
    high: float | None = None
    balanced_accuracy: float | None = None
    p: float | None = None
    positives: int = 0
    negatives: int = 0
    beats_chance: bool = False
    strong: bool = False
    top_score: float | None = None
    rule: str = ""
    place: str = ""
    place_score: float | None = None

    def __str__(self) -> str:
        """The label with its score, as `mars on the picture (0.97)`."""
        if self.score is None:
            return self.text
        doubt = "" if self.beats_chance else ", no better than chance"
        return f"{self.text} ({self.score:.2f}{doubt})"


NONE = Label("", "")


def set_path(study: Path, name: str) -> Path:
    """The file of a set of labels."""
    return study / FOLDER / f"{name}.parquet"


def write_labels(path: Path, labels: Sequence[tuple[FeatureId, Label]]) -> None:
    """Write a set; features without a label are left out."""
    rows = [
        {"layer": feature.layer, "feature": feature.index, **asdict(label)} for feature, label in labels if label.text
    ]
    write_table(path, pa.Table.from_pylist(rows, schema=LABEL_TABLE))


def read_labels(path: Path) -> dict[FeatureId, Label]:
    """Read a set.

    Raises:
        UserError: the file is missing, damaged, or of another layout.
    """
    names = [item.name for item in fields(Label)]
    table = read_table(path, LABEL_TABLE)
    return {
        FeatureId(row["layer"], row["feature"]): Label(**{name: row[name] for name in names})
        for row in table.to_pylist()
    }


def short_label(text: str) -> str:
    """The first thing that a label says, in words that can be a name: 'planet = mars or scene = hands, ..' is planet
    mars.
    """
    first = text.removeprefix("strong: ").split(" or ")[0].split(",")[0]
    return " ".join(re.sub(r"[^\w. -]", " ", first).split())[:40].strip()
