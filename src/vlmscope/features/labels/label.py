"""Labels of features by contrast: rules, scores and records.

The record of a label, and the file of the labels of a study: `labels/<set>.parquet` in the study's folder.

How well a label tells the items on which a feature fires from others: detection AUROC and balanced accuracy.

AUROC is the chance that a random positive gets a higher grade than a random negative, ties counting one half. Its
variance is that of DeLong et al. (1988), its 95 % interval Wilson's with as many trials as that variance is worth; p is
Mann and Whitney's, one-sided, corrected for ties. Chance is 0.5.

Labels as rules that can be checked: what an item must be for a feature to fire, and at which positions it fires.

A predicate is a key with a value. Facts: `planet = mars`. Words: `"colour" in the question`. Places: `on the picture`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import ndtr

from vlmscope.core.records import FeatureId
from vlmscope.features.study.items import read_table, write_table
from vlmscope.metrics.causal import benjamini_hochberg

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


_Z = 1.959964


@dataclass(frozen=True)
class Detection:
    """The score of a label on `positives` and `negatives` items.

    Attributes:
        auroc, low, high: with its 95 % interval.
        balanced: balanced accuracy of "the grade is above one half".
        p: that of grades which know nothing.
        positives, negatives: how many items.
    """

    auroc: float
    low: float
    high: float
    balanced: float
    p: float
    positives: int
    negatives: int


def detection(positive: np.ndarray, negative: np.ndarray) -> Detection | None:
    """Score grades (0 to 1) of items of both sides; None when a side is empty."""
    n, m = len(positive), len(negative)
    if not n or not m:
        return None
    levels, code = np.unique(np.concatenate([positive, negative]), return_inverse=True)
    up = np.bincount(code[:n], minlength=len(levels))
    down = np.bincount(code[n:], minlength=len(levels))
    beaten = (np.cumsum(down) - 0.5 * down) / m  # by a positive of each level
    beating = (n - np.cumsum(up) + 0.5 * up) / n  # a negative of each level
    auroc = float(up @ beaten / n)
    variance = _spread(beaten, up) / n + _spread(beating, down) / m
    trials = auroc * (1 - auroc) / variance if variance > 0 else min(n, m)
    low, high = wilson(auroc, max(min(trials, n + m), 1.0))
    both = up + down
    ties = float((both.astype(float) ** 3 - both).sum())
    null = (n + m + 1 - ties / max((n + m) * (n + m - 1), 1)) / (12.0 * n * m)
    p = float(ndtr(-(auroc - 0.5) / np.sqrt(null))) if null > 1e-15 else 1.0
    balanced = 0.5 * (float((positive > 0.5).mean()) + float((negative <= 0.5).mean()))
    return Detection(auroc, low, high, balanced, p, n, m)


def wilson(share: float, trials: float) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of so many trials."""
    middle = (share + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    half = _Z / (1 + _Z**2 / trials) * np.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def discoveries(p: np.ndarray, rate: float = 0.05) -> np.ndarray:
    """`[..]` bool: what may be called better than chance so that at most `rate` of it is not (Benjamini & Hochberg).

    p-values that are no number are never.
    """
    known = np.isfinite(p)
    found = np.zeros(p.shape, dtype=bool)
    found[known] = benjamini_hochberg(p[known]) <= rate
    return found


def would_pass(p: np.ndarray, passed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Which p-values that chance gave would be called discoveries beside the real ones.

    Args:
        p: `[N]`, of the real set.
        passed: `[N]` bool, its `discoveries`.
        chance: `[M]`, where nothing is to be found; nan for none.

    Returns:
        `[M]` bool: at most the largest p that passed. The share of these, times N over the number that passed,
        estimates the false discovery rate without assuming that p is right.
    """
    cut = float(p[passed].max()) if passed.any() else -1.0
    return np.isfinite(chance) & (np.nan_to_num(chance, nan=np.inf) <= cut)


def _spread(values: np.ndarray, counts: np.ndarray) -> float:
    """The sample variance of values with multiplicities."""
    total = counts.sum()
    if total < 2:
        return 0.0
    mean = values @ counts / total
    return float((values - mean) ** 2 @ counts / (total - 1))


WORDS = ("answer", "question", "text")  # keys whose values are words: an item has many of each
_PLACES = {"token": "at", "after": "right after"}
_KINDS = {"text": "in the words of the user", "image": "on the picture", "answer": "in the answer"}
MOST_VALUES = 3  # of one key: a longer list is no label


class Predicate(NamedTuple):
    """One thing that is or is not so of an item or of a position."""

    key: str
    value: str


@dataclass(frozen=True)
class Part:
    """Any of some values of one key."""

    key: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """The part in words."""
        if self.key in WORDS:
            return f"{_quoted(self.values)} in the {self.key}"
        return f"{self.key} = {' or '.join(self.values)}"

    @property
    def place(self) -> str:
        """The part in words, of a rule about positions."""
        if self.key == "kind":
            return " or ".join(_KINDS[value] for value in self.values)
        if self.key in ("rows", "columns"):
            return f"in the {' or '.join(self.values)} of the picture"
        return f"{_PLACES[self.key]} {_quoted(self.values)}"


@dataclass(frozen=True)
class Rule:
    """One part, or two that must both hold ("and") or of which one is enough ("or")."""

    parts: tuple[Part, ...]
    joint: str = "and"

    @property
    def text(self) -> str:
        """The rule in words."""
        return f" {self.joint} ".join(part.text for part in self.parts)

    @property
    def length(self) -> int:
        """How many values a reader must keep in mind."""
        return sum(len(part.values) for part in self.parts)

    def to_json(self) -> str:
        """One line from which `from_json` makes the rule again."""
        return json.dumps([self.joint, [[part.key, *part.values] for part in self.parts]], ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Rule:
        """The inverse of `to_json`."""
        joint, parts = json.loads(line)
        return cls(tuple(Part(key, tuple(values)) for key, *values in parts), joint)


def _quoted(words: tuple[str, ...]) -> str:
    return " or ".join(f'"{word}"' for word in words)
