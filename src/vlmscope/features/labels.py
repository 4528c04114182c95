"""Labels of features: rules that can be checked, their scores, and the sets of labels in a study's folder.

A label says of a feature on which items it fires, and at which positions of them. The score is the detection AUROC, the
chance that a random item on which the feature fires gets a higher grade from the label than a random other one, ties
counting one half. Its variance is that of DeLong et al. (1988), its 95 % interval Wilson's with as many trials as that
variance is worth; p is Mann and Whitney's, one-sided, corrected for ties. Chance is 0.5.

Every set is a file `labels/<set>.parquet` in the study's folder. Hand labels come first, then of the automatic ones
that of the surest score: `Labels(StudyFolder("outputs/study/..")).of(FeatureId(5, 123)).text`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import ndtr

from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, FeatureId
from vlmscope.core.study import NO_LABELS
from vlmscope.features.study_files import StudyFolder, read_table, write_table
from vlmscope.metrics.rates import benjamini_hochberg, wilson_interval

if TYPE_CHECKING:
    from vlmscope.scope import Scope

FOLDER = "labels"
HAND = "hand.yaml"  # next to the sets; no task writes it
ABOUT = "about"  # key of what an item has to do with, whether a fact of it says so or any of its words
PICTURES = "pictures"  # key of the number of pictures
WORDS = (ABOUT, "answer", "question", "text")  # keys whose values are words: an item has many of each
# Words that say little.
SMALL = {"a", "an", "the", "of", "in", "on", "at", "is", "are", "to", "and", "or", "with", "this", "that", "what"}
MOST_VALUES = 2  # of one fact: a longer list is no label
_KINDS = {"text": "in the prompt", "image": "on the picture", "answer": "in the answer"}


def stem(word: str) -> str:
    """The word without an English plural's ending, so that "planets" finds "planet"."""
    for ending, kept in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("shes", "sh")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + kept
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class Predicate(NamedTuple):
    """One thing that is or is not so of an item (`planet = mars`, a word of its question) or of a position."""

    key: str
    value: str


@dataclass(frozen=True)
class Part:
    """Any of some values of one key."""

    key: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """The part in words, of a rule about items."""
        if self.key == ABOUT:
            return " or ".join(self.values)
        if self.key == PICTURES:
            count = " or ".join(self.values)
            return {"0": "no picture", "1": "a picture"}.get(count, f"{count} pictures")
        if self.key in WORDS:
            return f"{self.key} has {self._quoted}"
        return f"{self.key.replace('_', ' ')} {' or '.join(self.values)}"

    @property
    def place(self) -> str:
        """The part in words, of a rule about positions."""
        if self.key == "kind":
            return " or ".join(_KINDS[value] for value in self.values)
        if self.key in ("rows", "columns"):
            return f"in the {' or '.join(self.values)} of the picture"
        return f"{'at' if self.key == 'token' else 'right after'} {self._quoted}"

    @property
    def _quoted(self) -> str:
        return " or ".join(f'"{word.strip() or word}"' for word in self.values)  # many tokens begin with a space


@dataclass(frozen=True)
class Rule:
    """One part, or two that must both hold."""

    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The rule in words."""
        return " and ".join(part.text for part in self.parts)

    def phrase(self, place: Part | None = None, writes: str = "") -> str:
        """The rule in few words, with the place; `writes` is the word that the feature itself raises, if it is one.

        A feature that fires where its own word is, or is about to be, "says" it.
        """
        first, *more = self.parts
        at = place.values[0].strip().lower() if place is not None and place.key == "token" else None
        if first.key in WORDS and first.values == (at,) and not more:
            return f'the word "{at}"'
        said = [f'says "{writes}"' if _speaks_of(part, writes) else part.text for part in self.parts]
        return ", ".join(filter(None, [" and ".join(said), "" if place is None else place.place]))

    def to_json(self) -> str:
        """One line: the key and values of each part."""
        return json.dumps([[part.key, *part.values] for part in self.parts], ensure_ascii=False)


def _speaks_of(part: Part, word: str) -> bool:
    names = {word, stem(word)} if part.key == ABOUT else {word} if part.key == "answer" else set()
    return bool(word) and len(part.values) == 1 and part.values[0] in names


@dataclass(frozen=True)
class Detection:
    """The score of a label on items of both kinds, named as in `Label`."""

    score: float
    low: float
    high: float
    balanced_accuracy: float
    p: float
    positives: int
    negatives: int


def detection(positive: np.ndarray, negative: np.ndarray) -> Detection | None:
    """Score grades (0 to 1) of items of both kinds; None when there are none of one."""
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
    low, high = wilson_interval(np.array(auroc), np.array(max(min(trials, n + m), 1.0)))
    both = up + down
    ties = float((both.astype(float) ** 3 - both).sum())
    null = (n + m + 1 - ties / max((n + m) * (n + m - 1), 1)) / (12.0 * n * m)
    # Without variance all grades are equal, and nothing is told apart.
    p = float(ndtr(-(auroc - 0.5) / np.sqrt(null))) if null > 1e-15 else 1.0
    balanced = 0.5 * (float((positive > 0.5).mean()) + float((negative <= 0.5).mean()))
    return Detection(auroc, float(low), float(high), balanced, p, n, m)


def _spread(values: np.ndarray, counts: np.ndarray) -> float:
    """The sample variance of values with multiplicities."""
    total = counts.sum()
    if total < 2:
        return 0.0
    mean = values @ counts / total
    return float((values - mean) ** 2 @ counts / (total - 1))


def discoveries(p: np.ndarray, rate: float = 0.05) -> np.ndarray:
    """`[..]` bool: p-values that pass at the false discovery rate `rate` (Benjamini & Hochberg); nan never does."""
    known = np.isfinite(p)
    passed = np.zeros(p.shape, dtype=bool)
    passed[known] = benjamini_hochberg(p[known]) <= rate
    return passed


def would_pass(p: np.ndarray, passed: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """`[M]` bool: p-values `chance`, of no effect (nan for none), that would pass together with the real `p` [N].

    Those at most as large as the largest p that passed [N]. Their share, times N over the number that passed, estimates
    the false discovery rate without assuming that p is right.
    """
    cut = float(p[passed].max()) if passed.any() else -1.0
    return np.isfinite(chance) & (np.nan_to_num(chance, nan=np.inf) <= cut)


@dataclass(frozen=True)
class Label:
    """The name of a feature, and how far it can be trusted."""

    text: str
    source: str  # "hand" or "auto"
    level: str = ""  # of the score: "items" that fire the feature, "positions" within such items, or "" for none
    score: float | None = None  # detection AUROC on items that the label was not made from, and its 95 % interval
    low: float | None = None
    high: float | None = None
    balanced_accuracy: float | None = None  # of "fires" (a grade above one half) against "does not"
    p: float | None = None  # one-sided, of chance
    positives: int = 0  # items scored on; of "positions", these alone
    negatives: int = 0
    beats_chance: bool = False  # survives a false discovery rate of 5 % over all labels of the set
    strong: bool = False  # the feature fires on most items; the label says where it is strong
    top_score: float | None = None  # AUROC of its strongest items against those on which it does not fire
    rule: str = ""  # the item's part as `Rule.to_json`
    place: str = ""  # where in the item, and its AUROC
    place_score: float | None = None
    kind_score: float | None = None  # AUROC of the kind of item alone, on the same items
    kind_only: bool = False  # the rule names nothing but the kind of item

    def __str__(self) -> str:
        """The label with its score, as `mars on the picture (0.97)`."""
        if self.score is None:
            return self.text
        doubt = "" if self.beats_chance else ", no better than chance"
        doubt += ", the kind of item alone" if self.kind_only else ""
        return f"{self.text} ({self.score:.2f}{doubt})"


NONE = Label("", "")
_COLUMNS = {"str": pa.string(), "float | None": pa.float64(), "int": pa.int32(), "bool": pa.bool_()}
LABEL_TABLE = pa.schema(
    {"layer": pa.int32(), "feature": pa.int32()} | {item.name: _COLUMNS[str(item.type)] for item in fields(Label)}
)


def short_label(text: str) -> str:
    """The first thing that a label says, as a name: 'planet mars or earth, on the picture' is planet mars."""
    first = text.removeprefix("strong: ").removeprefix("says ").split(" or ")[0].split(",")[0]
    return " ".join(re.sub(r"[^\w. -]", " ", first).split())[:40].strip()


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
    """Read a set; a `UserError` when the file is missing, damaged, or of another layout."""
    rows = read_table(path, LABEL_TABLE).to_pylist()
    return {FeatureId(row.pop("layer"), row.pop("feature")): Label(**row) for row in rows}


def read_hand(path: Path, study: StudyFolder) -> dict[FeatureId, Label]:
    """Labels that a person wrote as `L<layer>/<index>: text`; a `UserError` for other lines and unknown features."""
    body = read_yaml(path)
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise UserError(f"{path}: it holds no labels; write a line such as 'L5/123: red planet' for each")
    labels = {}
    for name, text in body.items():
        try:
            feature = FeatureId.parse(str(name))
            study.check(feature)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: {name} has no text; write a line such as '{name}: red planet'")
        labels[feature] = Label(" ".join(text.split()), "hand")
    return labels


class Labels:
    """All labels of a study: every set, and those of a YAML file by hand, by default the study's own if it is there."""

    def __init__(self, study: StudyFolder, hand: str | Path | None = None) -> None:
        self.study = study
        self.automatic: dict[FeatureId, Label] = {}
        for path in sorted((study.path / FOLDER).glob("*.parquet")):
            for feature, label in read_labels(path).items():
                if _rank(label) > _rank(self.automatic.get(feature, NONE)):
                    self.automatic[feature] = label
        path = Path(hand) if hand is not None else study.path / FOLDER / HAND
        self.hand = read_hand(path, study) if hand is not None or path.is_file() else {}

    def of(self, feature: FeatureId) -> Label:
        """The label of a feature; one without text when there is none."""
        self.study.check(feature)
        return self.hand.get(feature) or self.automatic.get(feature, NONE)

    def all(self) -> dict[FeatureId, Label]:
        """Every label."""
        return {**self.automatic, **self.hand}

    def trusted(self) -> dict[FeatureId, Label]:
        """Hand labels, and those that beat chance."""
        return {key: label for key, label in self.all().items() if label.source == "hand" or label.beats_chance}

    def texts(self) -> dict[FeatureId, str]:
        """The trusted labels, each with its score."""
        return {feature: str(label) for feature, label in self.trusted().items()}


def _rank(label: Label) -> tuple[bool, float]:
    return bool(label.text), -1.0 if label.low is None else label.low


def labels_for(path: str | Path, model: str, n_features: Mapping[int, int] | None) -> Labels:
    """The labels of a study, which must have some and be of this model and transcoders (`check_same`)."""
    study = StudyFolder(path)
    check_same(study, model, n_features)
    labels = Labels(study)
    if not labels.all():
        raise UserError(f"{study.path} has no labels; run task=label study.path={path}")
    return labels


def scope_labels(scope: Scope, study: str | None = None, tower_study: str | None = None) -> dict[FeatureId, str]:
    """Trusted labels of a scope's features, of named studies or of those that are shipped with model and transcoders.

    A study named `NO_LABELS` gives none.
    """
    labels: dict[FeatureId, str] = {}
    sides = [(scope, study)] + ([(scope.at(TOWER), tower_study)] if scope.tower is not None else [])
    for side, given in sides:
        named = given or side.study
        if named is not None and NO_LABELS not in (named, study):
            labels |= labels_for(named, scope.vlm.name, side.widths).texts()
    return labels


def check_same(study: StudyFolder, model: str, n_features: Mapping[int, int] | None) -> None:
    """Refuse a study of another model, or of transcoders of other widths by layer (None where they are not known)."""

    def widths(counts: Mapping[int, int]) -> str:
        return f"{len(counts)} layers, {sum(counts.values()):,} features"

    if study.info.model != model:
        raise UserError(f"{study.path} is a study of the model {study.info.model}, not of {model}; give one of {model}")
    if n_features is not None and study.info.n_features != dict(n_features):
        raise UserError(
            f"{study.path} is a study of other transcoders ({widths(study.info.n_features)}) than these "
            f"({widths(n_features)}); run task=study with them"
        )
