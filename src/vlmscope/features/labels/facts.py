"""Facts about a study's items, by which features are labelled.

What can be said of the items of a study: facts that its data know (a scene's planet, its colour) and words.

Legend: N items, in the order of their hashes; P predicates.

Facts and words of a study's items, kept in the study folder: reading them goes through all the data again.

On which items a feature is known to fire, and on which not, without running the model again.

A study keeps, of every feature, the m items of smallest hash on which it fires. So of all items up to the last of these
(of all items, when there are fewer than m), those that are kept fire it and the others do not: exactly.

Legend: F features of a layer, R rows (a feature with an item on which it fires), N items in the order of their hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from vlmscope.core.artifacts import load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.study import MANIFEST, TOP
from vlmscope.data.samples import WHOLE
from vlmscope.features.labels.label import WORDS, Part, Predicate, Rule
from vlmscope.features.study.items import StudyItems
from vlmscope.features.study.records import StudyFolder
from vlmscope.features.study.tables import item_hash

MOST_WORDS = 2000
_FEWEST = 3  # items that must have a predicate
_LOOK = 20  # rows after which a source without facts is left
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class ItemFacts:
    """All predicates of all items.

    Attributes:
        ids: `[N]` int64, items of the study in the order of their hashes, in which studies draw their samples.
        half: `[N]` bool: items on which labels are scored; on the others they are proposed.
        names: P predicates, facts first.
        matrix: `[N, P]` float32, 0 or 1.
    """

    ids: np.ndarray
    half: np.ndarray
    names: tuple[Predicate, ...]
    matrix: np.ndarray

    @cached_property
    def columns(self) -> dict[Predicate, int]:
        """The column of each predicate."""
        return {name: column for column, name in enumerate(self.names)}

    @cached_property
    def keys(self) -> dict[str, np.ndarray]:
        """The columns of each fact of which an item has one value, so that values can be joined."""
        found: dict[str, list[int]] = {}
        for column, (key, _) in enumerate(self.names):
            if key not in WORDS:
                found.setdefault(key, []).append(column)
        return {key: np.array(columns) for key, columns in found.items() if len(columns) > 1}

    @cached_property
    def proposing(self) -> np.ndarray:
        """`[N + 1, P]` int32: how many of the first n items are for proposing and have each predicate."""
        return _counted(np.where(self.half[:, None], np.float32(0), self.matrix))

    @cached_property
    def _held(self) -> np.ndarray:
        """`[P, N]` bool, `matrix` by predicate: quicker to pick from."""
        return np.ascontiguousarray(self.matrix.T.astype(bool))

    @cached_property
    def order(self) -> np.ndarray:
        """`[N]`, places in `ids` by id."""
        return np.argsort(self.ids)

    def places(self, items: np.ndarray) -> np.ndarray:
        """Where items (ids) stand in `ids`."""
        return self.order[np.searchsorted(self.ids, items, sorter=self.order)]

    def holds(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """`[rows]` bool: items of which a part of a rule is true; a predicate that no item has is true of none."""
        found = np.zeros(len(rows), dtype=bool)
        for value in part.values:
            column = self.columns.get(Predicate(part.key, value))
            if column is not None:
                found |= self._held[column][rows]
        return found

    def grades(self, rule: Rule, rows: np.ndarray) -> np.ndarray:
        """`[rows]` float64, how well items match: 1, or 0; of two parts that must both hold, 0.5 for one of them."""
        held = np.stack([self.holds(part, rows) for part in rule.parts])
        return held.any(0).astype(float) if rule.joint == "or" else held.mean(0)


def item_facts(items: StudyItems, most_words: int = MOST_WORDS) -> ItemFacts:
    """Read facts and words of all items of a study.

    Raises:
        UserError: the data are gone, or are others than the study saw.
    """
    order = np.argsort(item_hash(items.ids), kind="stable")
    ids = items.ids[order]
    table = items.table.select(["source", "users", "assistants", "text", "n_pictures"]).take(order).to_pylist()
    facts = _facts(items)
    several = len({row["source"] for row in table}) > 1
    found: list[list[Predicate]] = []
    for item, row in zip(ids.tolist(), table, strict=True):
        known = {**facts.get(item, {}), "pictures": row["n_pictures"]}
        if several:
            known["source"] = row["source"]
        found.append([*(Predicate(key, str(value)) for key, value in known.items()), *_words(row)])
    names = _kept(found, most_words)
    matrix = _matrix(found, names)
    keep = _distinct(matrix)
    return ItemFacts(
        ids, scoring_half(ids), tuple(names[column] for column in keep), np.ascontiguousarray(matrix[:, keep])
    )


def scoring_half(ids: np.ndarray) -> np.ndarray:
    """`[N]` bool, the items on which labels are scored."""
    # Another bit of the hash than those that order the items.
    return (item_hash(ids) & 1).astype(bool)


def words_of(text: str) -> list[str]:
    """The words of a text in small letters."""
    return _WORD.findall(text.lower())


def _words(row: Mapping[str, Any]) -> Iterator[Predicate]:
    for key, texts in (("answer", row["assistants"]), ("question", row["users"]), ("text", [row["text"]])):
        for word in sorted({word for text in texts for word in words_of(text)}):
            yield Predicate(key, word)


def _kept(found: list[list[Predicate]], most_words: int) -> list[Predicate]:
    """Predicates that some, but not all items have: facts as they come, then the most frequent words."""
    counts = Counter(name for names in found for name in names)
    useful = [name for name, count in counts.items() if _FEWEST <= count < len(found)]
    facts = [name for name in useful if name.key not in WORDS]
    words = sorted((n for n in useful if n.key in WORDS), key=lambda n: (-counts[n], n))[:most_words]
    return facts + sorted(words, key=lambda name: WORDS.index(name.key))


def _matrix(found: list[list[Predicate]], names: list[Predicate]) -> np.ndarray:
    column = {name: number for number, name in enumerate(names)}
    rows = [(row, column[name]) for row, have in enumerate(found) for name in have if name in column]
    at = np.array(rows, dtype=np.int64).reshape(-1, 2).T
    shape = (len(found), len(names))
    return sparse.csr_array((np.ones(at.shape[1], np.float32), (at[0], at[1])), shape).toarray()


def _distinct(matrix: np.ndarray) -> np.ndarray:
    """The columns that no earlier one equals."""
    packed = np.packbits(matrix.astype(bool), axis=0).T
    _, first = np.unique(packed, axis=0, return_index=True)
    return np.sort(first)


def _counted(matrix: np.ndarray) -> np.ndarray:
    out = np.zeros((len(matrix) + 1, matrix.shape[1]), dtype=np.int32)
    np.cumsum(matrix, axis=0, out=out[1:])
    return out


def _facts(items: StudyItems) -> dict[int, Mapping[str, str | int]]:
    """Facts by item, of the sources that have any: each is gone through once, and only rows of items are read."""
    table = items.table.select(["item", "source", "row"]).to_pylist()
    wanted: dict[str, dict[int, list[int]]] = {}
    for row in table:
        wanted.setdefault(row["source"], {}).setdefault(row["row"], []).append(row["item"])
    found: dict[int, Mapping[str, str | int]] = {}
    for name, rows in wanted.items():
        reader, read = items.source(name).open(WHOLE), 0
        for row in reader:
            if reader.last in rows:
                facts, read = row().facts, read + 1
                found |= {item: facts for item in rows[reader.last] if facts}
                if read == len(rows) or (read == _LOOK and not any(i in found for n in rows.values() for i in n)):
                    break
    return found


FOLDER = "index"  # in the study folder; may be deleted
_VERSION = "1"
_LOG = logging.getLogger(__name__)


def study_facts(study: StudyFolder, most_words: int = MOST_WORDS) -> ItemFacts:
    """`item_facts` of a study, read from `index/` in it when they were read before.

    Raises:
        UserError: as `item_facts`, when they are read for the first time.
    """
    path = study.path / FOLDER / f"item_facts_{most_words}.safetensors"
    mark = {"version": _VERSION, "study": hashlib.sha256((study.path / MANIFEST).read_bytes()).hexdigest()}
    found = _read(path, mark) if path.is_file() else None
    if found is None:
        found = item_facts(study.items, most_words)
        _write(path, mark, found)
    return found


def _read(path: Path, mark: dict[str, str]) -> ItemFacts | None:
    """What was kept; None when it is damaged or of another study."""
    try:
        arrays, head = load_tensors(path)
        if any(head.get(key) != value for key, value in mark.items()):
            return None
        names = tuple(Predicate(*pair) for pair in json.loads(head["names"]))
        ids = arrays["ids"]
        bits = np.unpackbits(arrays["matrix"], axis=1, count=len(names))
        return ItemFacts(ids, scoring_half(ids), names, np.ascontiguousarray(bits.astype(np.float32)))
    except (UserError, KeyError, ValueError, TypeError):
        return None


def _write(path: Path, mark: dict[str, str], found: ItemFacts) -> None:
    arrays = {"ids": found.ids, "matrix": np.packbits(found.matrix.astype(bool), axis=1)}
    try:
        save_tensors(path, arrays, {**mark, "names": json.dumps([list(name) for name in found.names])})
    except UserError as error:  # a study that others own can be read all the same
        _LOG.warning("facts of the items are read anew each time: %s", error)


MOST_FIRING = 0.5  # of the items; a feature that fires on more is labelled by the items on which it is strong


@dataclass(frozen=True)
class KnownItems:
    """The rows of a layer, by feature.

    Attributes:
        item: `[R]` int64, place in `ItemFacts.ids`.
        peak: `[R]` float32.
        drawn: `[R]` bool: one of the feature's random draw; else only among its strongest.
        top: `[R]` bool: among its strongest.
        positive: `[R]` bool: what a label must tell from other items: where the feature fires; or, if it does so on
            more than half of the items, where its peak is at least the median of those drawn.
        row: `[R]` int64, in the table of examples.
        starts: `[F + 1]`, where each feature's rows begin.
        reach: `[F]`: of so many first items it is known whether the feature fires.
        strong: `[F]` bool: the second meaning of `positive`.
    """

    item: np.ndarray
    peak: np.ndarray
    drawn: np.ndarray
    top: np.ndarray
    positive: np.ndarray
    row: np.ndarray
    starts: np.ndarray
    reach: np.ndarray
    strong: np.ndarray

    def rows(self, feature: int) -> slice:
        """The rows of one feature."""
        return slice(self.starts[feature], self.starts[feature + 1])

    def shuffled(self, rng: np.random.Generator, n_items: int) -> KnownItems:
        """The same activations on random items: each feature's draw among its first `reach`, its other rows anywhere.

        What is left to find is chance, so that the scores of labels of the outcome are those of no meaning.
        """
        item = self.item.copy()
        for feature, reach in enumerate(self.reach.tolist()):
            rows = np.arange(self.starts[feature], self.starts[feature + 1])
            drawn = rows[self.drawn[rows]]
            item[drawn] = rng.permutation(reach)[: len(drawn)]
            others = rows[~self.drawn[rows]]
            item[others] = reach + rng.permutation(n_items - reach)[: len(others)]
        return KnownItems(**{**vars(self), "item": item})


def known_items(study: StudyFolder, layer: int, examples: pa.Table, facts: ItemFacts) -> KnownItems:
    """Read the rows of a layer off its table of examples."""
    n_features = study.info.n_features[layer]
    feature = examples["feature"].to_numpy().astype(np.int64)
    top = examples["group"].to_numpy() == TOP
    item = facts.places(examples["item"].to_numpy())
    # An item may be among the strongest and drawn: then it is one row, which comes as drawn (last).
    order = np.lexsort((~top, item, feature))
    key = feature[order] * len(facts.ids) + item[order]
    last = np.append(np.diff(key) != 0, True)
    first = np.append(True, last[:-1])
    rows, any_top = order[last], top[order[first]]
    found, drawn = feature[rows], ~top[rows]
    starts = np.searchsorted(found, np.arange(n_features + 1))
    peak = examples["activation"].to_numpy()[rows]
    drawn_count = np.bincount(found[drawn], minlength=n_features)
    reach = np.full(n_features, len(facts.ids))
    full = drawn_count >= int(str(study.info.settings["samples"]))
    latest = np.zeros(n_features, dtype=np.int64)
    np.maximum.at(latest, found[drawn], item[rows][drawn] + 1)
    reach[full] = latest[full]
    strong = study.layer(layer).items_fired > MOST_FIRING * study.info.items
    positive = np.ones(len(rows), dtype=bool)
    for one in np.flatnonzero(strong).tolist():
        span = slice(starts[one], starts[one + 1])
        own = peak[span]
        positive[span] = own >= np.median(own[drawn[span]]) if drawn[span].any() else True
    return KnownItems(item[rows], peak, drawn, any_top, positive, rows, starts, reach, strong)
