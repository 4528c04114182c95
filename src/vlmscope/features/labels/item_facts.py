"""What can be said of the items of a study: facts that its data know (a scene's planet, its colour) and words.

Legend: N items, in the order of their hashes; P predicates.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from vlmscope.data.share import WHOLE
from vlmscope.features.labels.rules import WORDS, Part, Predicate, Rule
from vlmscope.features.study.items import StudyItems
from vlmscope.features.study.kept_pairs import item_hash

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
