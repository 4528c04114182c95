"""Predicates of a study's items, by which features are labelled and found, and the items known to fire each feature.

Facts are those of the data (a scene's planet, its colour); words are those of question, answer or plain text.

A study keeps, of every feature, the m items of smallest hash on which it fires. So of all items up to the last of these
(of all items, when there are fewer than m), those that are kept fire it and the others do not. This is exact, and the
model need not run again (`KnownItems`).

*Search.* A word matches a label that has it, or predicates that hold of a feature's strongest items more often than of
all items (facts of their scenes, words of question and answer). By activations, active features are ranked by how
rarely they are so strong in the study.

Legend: N items, in the order of their hashes; P predicates; F features of a layer; R rows (a feature with an item on
which it fires).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from vlmscope.core.artifacts import load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId, normalised
from vlmscope.core.study import MANIFEST, TOP, item_hash
from vlmscope.data.samples import WHOLE
from vlmscope.features.labels import ABOUT, PICTURES, SMALL, WORDS, Labels, Part, Predicate, Rule, stem
from vlmscope.features.study_files import StudyFolder, StudyItems

_LOG = logging.getLogger(__name__)
MOST_WORDS = 2000  # the most frequent ones become predicates
MOST_FIRING = 0.5  # of the items; a feature that fires on more is labelled by the items on which it is strong
CACHE = f"index/item_facts_{MOST_WORDS}.safetensors"  # in the study folder; may be deleted
_VERSION = "4"  # of the cache
_FEWEST = 3  # items that must have a predicate
_LOOK = 20  # rows after which a source without facts is left
_ORDER = (*(key for key in WORDS if key != ABOUT), ABOUT)  # of words that hold of the same items the first is named
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def content_of(row: Mapping[str, Any]) -> str:
    """What an item of a study is, whatever its number: its words (`normalised`), or its sample's digest if it has
    pictures.
    """
    if row["n_pictures"]:
        return row["digest"]
    return json.dumps(
        [[normalised(text) for text in texts] for texts in (row["users"], row["assistants"], [row["text"]])]
    )


def content_halves(contents: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """`[N]` bool twice: the half that each content belongs to, by its hash, so that no content is in both; and items
    whose content came before.
    """
    half = np.array([hashlib.sha256(content.encode()).digest()[0] & 1 for content in contents], dtype=bool)
    repeats = np.ones(len(contents), dtype=bool)
    repeats[np.unique(np.array(contents, dtype=object), return_index=True)[1]] = False
    return half, repeats


def words_of(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class ItemFacts:
    """All predicates of all items."""

    ids: np.ndarray  # `[N]` int64, in the order of their hashes, in which studies draw their samples
    half: np.ndarray  # `[N]` bool: items on which labels are scored; on the others they are proposed
    names: tuple[Predicate, ...]  # P, facts first
    matrix: np.ndarray  # `[N, P]` float32, 0 or 1
    repeats: np.ndarray | None = None  # `[N]` bool: items of the same content as an earlier one, which score nothing

    @classmethod
    def without_predicates(cls, items: StudyItems) -> ItemFacts:
        """The items in the order of their hashes, and their halves."""
        order = np.argsort(item_hash(items.ids), kind="stable")
        columns = items.table.select(["users", "assistants", "text", "n_pictures", "digest"]).take(order)
        half, repeats = content_halves([content_of(row) for row in columns.to_pylist()])
        return cls(items.ids[order], half, (), np.zeros((len(order), 0), dtype=np.float32), repeats)

    @cached_property
    def scoring(self) -> np.ndarray:
        """`[N]` bool: items on which labels are scored, each content once."""
        return self.half if self.repeats is None else self.half & ~self.repeats

    @cached_property
    def columns(self) -> dict[Predicate, int]:
        """The column of each predicate."""
        return {name: column for column, name in enumerate(self.names)}

    @cached_property
    def keys(self) -> dict[str, np.ndarray]:
        """The columns of each fact of which an item has one value, so that values can be joined."""
        columns: dict[str, list[int]] = {}
        for column, (key, _) in enumerate(self.names):
            if key not in WORDS:
                columns.setdefault(key, []).append(column)
        return {key: np.array(numbers) for key, numbers in columns.items() if len(numbers) > 1}

    @cached_property
    def proposing(self) -> np.ndarray:
        """`[N + 1, P]` int32: how many of the first n items are for proposing and have each predicate."""
        out = np.zeros((len(self.matrix) + 1, self.matrix.shape[1]), dtype=np.int32)
        np.cumsum(np.where(self.half[:, None], np.float32(0), self.matrix), axis=0, out=out[1:])
        return out

    @cached_property
    def _by_predicate(self) -> np.ndarray:
        """`[P, N]` bool, `matrix` transposed, of which rows are read faster."""
        return np.ascontiguousarray(self.matrix.T.astype(bool))

    @cached_property
    def _by_id(self) -> np.ndarray:
        return np.argsort(self.ids)

    def places(self, items: np.ndarray) -> np.ndarray:
        """The places of items (ids) in `ids`."""
        return self._by_id[np.searchsorted(self.ids, items, sorter=self._by_id)]

    def holds(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """`[rows]` bool: items of which a part of a rule is true; a predicate that no item has is true of none."""
        true = np.zeros(len(rows), dtype=bool)
        for value in part.values:
            column = self.columns.get(Predicate(part.key, value))
            if column is not None:
                true |= self._by_predicate[column][rows]
        return true

    def grades(self, rule: Rule, rows: np.ndarray) -> np.ndarray:
        """`[rows]` float64, how well items match: 1, or 0; of two parts that must both hold, 0.5 for one of them."""
        return np.stack([self.holds(part, rows) for part in rule.parts]).mean(0)


def item_facts(items: StudyItems) -> ItemFacts:
    """Read facts and words of all items of a study; a `UserError` when its data are gone or have changed."""
    bare = ItemFacts.without_predicates(items)
    table = items.table.select(["source", "users", "assistants", "text", "n_pictures"])
    rows = table.take(np.searchsorted(items.ids, bare.ids)).to_pylist()
    facts = _facts(items)
    several = len({row["source"] for row in rows}) > 1
    predicates: list[list[Predicate]] = []
    for item, row in zip(bare.ids.tolist(), rows, strict=True):
        known = {**facts.get(item, {}), PICTURES: row["n_pictures"]} | ({"source": row["source"]} if several else {})
        held = [Predicate(key, str(value)) for key, value in known.items()]
        for key, texts in (("answer", row["assistants"]), ("question", row["users"]), ("text", [row["text"]])):
            held += [Predicate(key, word) for word in sorted({word for text in texts for word in words_of(text)})]
        predicates.append(held)
    keys_of: dict[str, set[str]] = {}
    all_names = {name for held in predicates for name in held}
    known_values = {value for _, value in all_names}
    # A plural counts as its singular if that occurs: "stars", but not "mars".
    idea = {value: stem(value) if stem(value) in known_values else value for value in known_values}
    for key, value in all_names:
        keys_of.setdefault(idea[value], set()).add(key)
    for held in predicates:  # a planet that is shown, asked for or answered: one idea, which no single key has
        values = {idea[value] for _, value in held}
        held += [Predicate(ABOUT, value) for value in sorted(values - SMALL) if len(keys_of[value]) > 1]
    # Predicates that some, but not all items have: facts as they come, then the most frequent words.
    counts = Counter(name for held in predicates for name in held)
    useful = [name for name, count in counts.items() if _FEWEST <= count < len(predicates)]
    words = sorted((n for n in useful if n.key in WORDS), key=lambda n: (-counts[n], n))[:MOST_WORDS]
    names = [name for name in useful if name.key not in WORDS] + sorted(words, key=lambda n: _ORDER.index(n.key))
    column = {name: number for number, name in enumerate(names)}
    entries = [(row, column[name]) for row, held in enumerate(predicates) for name in held if name in column]
    cells = np.array(entries, dtype=np.int64).reshape(-1, 2).T
    ones = np.ones(cells.shape[1], np.float32)
    matrix = sparse.csr_array((ones, (cells[0], cells[1])), (len(predicates), len(names))).toarray()
    # Predicates that hold of the same items cannot be told apart: the first one stands for all.
    _, first = np.unique(np.packbits(matrix.astype(bool), axis=0).T, axis=0, return_index=True)
    keep = np.sort(first)
    return replace(bare, names=tuple(names[n] for n in keep), matrix=np.ascontiguousarray(matrix[:, keep]))


def _facts(items: StudyItems) -> dict[int, Mapping[str, str | int]]:
    """Facts by item, of the sources that have any: one pass over each, which opens the rows of items only."""
    items_of_rows: dict[str, dict[int, list[int]]] = {}
    for row in items.table.select(["item", "source", "row"]).to_pylist():
        items_of_rows.setdefault(row["source"], {}).setdefault(row["row"], []).append(row["item"])
    known: dict[int, Mapping[str, str | int]] = {}
    for name, rows in items_of_rows.items():
        reader, read, has_facts = items.source(name).open(WHOLE), 0, False
        for row in reader:
            number = reader.row - 1  # the reader stands at the next one
            if number in rows:
                facts, read = row().facts, read + 1
                known |= {item: facts for item in rows[number] if facts}
                has_facts |= bool(facts)
                if read == len(rows) or (read == _LOOK and not has_facts):
                    break
    return known


def study_facts(study: StudyFolder) -> ItemFacts:
    """`item_facts` of a study, read from `index/` in it when they were read before."""
    path = study.path / CACHE
    mark = {"version": _VERSION, "study": hashlib.sha256((study.path / MANIFEST).read_bytes()).hexdigest()}
    with suppress(UserError, KeyError, ValueError, TypeError):  # none was kept, or it is damaged
        arrays, head = load_tensors(path)
        if mark.items() <= head.items():
            names = tuple(Predicate(*pair) for pair in json.loads(head["names"]))
            bits = np.unpackbits(arrays["matrix"], axis=1, count=len(names))
            bare = ItemFacts.without_predicates(study.items)
            return replace(bare, names=names, matrix=np.ascontiguousarray(bits.astype(np.float32)))
    facts = item_facts(study.items)
    arrays = {"matrix": np.packbits(facts.matrix.astype(bool), axis=1)}
    try:
        save_tensors(path, arrays, {**mark, "names": json.dumps([list(name) for name in facts.names])})
    except UserError as error:  # the study may be in a folder that is read-only here
        _LOG.warning("facts of the items are read anew each time: %s", error)
    return facts


@dataclass(frozen=True)
class KnownItems:
    """The rows of a layer, by feature.

    `positive` is what a label must tell from other items: where the feature fires; or, if it does so on more than half
    of the items (`strong`), where its peak is at least the median of those drawn.
    """

    item: np.ndarray  # `[R]` int64, place in `ItemFacts.ids`
    drawn: np.ndarray  # `[R]` bool: one of the feature's random draw; else only among its strongest
    top: np.ndarray  # `[R]` bool: among its strongest
    positive: np.ndarray  # `[R]` bool
    peak: np.ndarray  # `[R]` float32, largest activation
    row: np.ndarray  # `[R]` int64, in the table of examples
    starts: np.ndarray  # `[F + 1]`, where each feature's rows begin
    reach: np.ndarray  # `[F]`: the number of first items of which it is known whether they fire the feature
    strong: np.ndarray  # `[F]` bool

    def rows(self, feature: int) -> slice:
        """The rows of one feature."""
        return slice(self.starts[feature], self.starts[feature + 1])

    def shuffled(self, rng: np.random.Generator, n_items: int) -> KnownItems:
        """The same activations on random items: each feature's draw among its first `reach`, its other rows anywhere.

        Labels of the outcome have the scores of chance, since nothing is left to find.
        """
        item = self.item.copy()
        for feature, reach in enumerate(self.reach.tolist()):
            rows = np.arange(self.starts[feature], self.starts[feature + 1])
            drawn, others = rows[self.drawn[rows]], rows[~self.drawn[rows]]
            item[drawn] = rng.permutation(reach)[: len(drawn)]
            item[others] = reach + rng.permutation(n_items - reach)[: len(others)]
        return replace(self, item=item)


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
    feature, item, drawn = feature[rows], item[rows], ~top[rows]
    starts = np.searchsorted(feature, np.arange(n_features + 1))
    peak = examples["activation"].to_numpy()[rows]
    latest = np.zeros(n_features, dtype=np.int64)
    np.maximum.at(latest, feature[drawn], item[drawn] + 1)
    full = np.bincount(feature[drawn], minlength=n_features) >= int(study.info.settings["samples"])
    reach = np.where(full, latest, len(facts.ids))
    strong = study.layer(layer).items_fired > MOST_FIRING * study.info.items
    positive = np.ones(len(rows), dtype=bool)
    for index in np.flatnonzero(strong).tolist():
        span = slice(starts[index], starts[index + 1])
        if drawn[span].any():
            positive[span] = peak[span] >= np.median(peak[span][drawn[span]])
    return KnownItems(item, drawn, any_top, positive, peak, rows, starts, reach, strong)


_OF_LABEL = 0.5  # of a word's match; the other half is that of the examples
_LEAST = 0.05  # relevance, and match of a word, that is worth reporting


@dataclass(frozen=True)
class Match:
    """One result of a search."""

    feature: FeatureId
    relevance: float  # by words from 0 to 1; by activations in bits: how rarely it is so strong in an item
    why: str  # what matched, in words
    activation: float | None = None  # in the user's input; None by words


def stems(text: str) -> set[str]:
    """The words of a text, without plurals."""
    return {stem(word) for word in words_of(text)}


def find_by_words(study: StudyFolder, facts: ItemFacts, labels: Labels, query: str, count: int = 12) -> list[Match]:
    """The features that a query describes, best first: those that match more of its words, and more surely.

    A `UserError` when the query has no word, or no feature has to do with any of them.
    """
    words = list(dict.fromkeys(stem(word) for word in words_of(query)))
    keywords = [word for word in words if word not in SMALL] or words
    if not keywords:
        raise UserError(f"query={query}: it has no word; write for example 'query=red planet'")
    columns: dict[str, list[int]] = {}  # the predicates that speak of each word
    for column, (key, value) in enumerate(facts.names):
        for word in stems(value if key in WORDS else f"{key.replace('_', ' ')} {value}"):
            columns.setdefault(word, []).append(column)
    named = {feature: stems(label.text) for feature, label in labels.all().items()}
    matches: list[Match] = []
    for layer in study.layers:
        lifts = _lifts(study, layer, facts)  # [F, P]
        by_examples, reason = np.zeros((len(lifts), len(keywords))), np.full((len(lifts), len(keywords)), -1)
        for number, word in enumerate(keywords):
            if word in columns:
                lift = lifts[:, columns[word]]
                by_examples[:, number] = (1 - _OF_LABEL) * np.maximum(lift.max(1), 0)
                reason[:, number] = np.array(columns[word])[lift.argmax(1)]
        by_label = np.zeros_like(by_examples)
        for feature, known in named.items():
            if feature.layer == layer and known.intersection(keywords):
                label = labels.of(feature)
                # A label counts as far as it can be trusted: at chance, nothing.
                trust = 1.0 if label.source == "hand" else max(0.0, 2 * (label.low or 0.5) - 1) * label.beats_chance
                by_label[feature.index] = [_OF_LABEL * trust * (word in known) for word in keywords]
        total = (by_examples + by_label).mean(1)
        for index in np.argsort(-total, kind="stable")[:count].tolist():
            if total[index] > _LEAST:
                why = ["the label"] if by_label[index].any() else []
                why += [_reason(facts, column) for column in reason[index][by_examples[index] > _LEAST]]
                matches.append(Match(FeatureId(layer, index), float(total[index]), "; ".join(dict.fromkeys(why))))
    if not matches:
        known = sorted(set(columns) | set().union(*named.values()))
        near = [hit for word in keywords for hit in get_close_matches(word, known, n=2)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"words that occur: {', '.join(known[:12])} ..."
        raise UserError(f"query={query}: no feature of {study.path} matches; {hint}")
    return sorted(matches, key=lambda match: (-match.relevance, match.feature))[:count]


def _reason(facts: ItemFacts, column: int) -> str:
    key, value = facts.names[column]
    if key == ABOUT:
        return value
    return f'"{value}" in the {key}' if key in WORDS else f"{key} = {value}"


def _lifts(study: StudyFolder, layer: int, facts: ItemFacts) -> np.ndarray:
    """`[F, P]`: how much more often predicates hold of the strongest items than of all; from -1 to 1."""
    feature, items = study.example_items(layer, top=True)
    matrix = facts.matrix[facts.places(items)]
    n_features = study.info.n_features[layer]
    sums = np.zeros((n_features, matrix.shape[1]), dtype=np.float32)
    if len(feature):
        first = np.flatnonzero(np.diff(feature, prepend=-1))
        sums[feature[first]] = np.add.reduceat(matrix, first, axis=0)
    totals = np.bincount(feature, minlength=n_features)
    # One example shows nothing: two items of the background are added to each feature's.
    mean = facts.matrix.mean(0)
    return (sums + 2 * mean) / (totals[:, None] + 2) - mean


def find_by_activations(study: StudyFolder, peaks: Mapping[int, np.ndarray], count: int = 12) -> list[Match]:
    """The features that are active and rarely so strong, rarest first, from `peaks`: by layer [F], of the input.

    How rare: the share of the study's items that fire the feature, times the share of its drawn items that reach the
    activation, with half an item added to both, in bits.
    """
    ranked: list[tuple[float, float, Match]] = []
    for layer, activations in peaks.items():
        table, counts = study.examples(layer), study.layer(layer)
        drawn = table["group"].to_numpy() != TOP
        feature, peak = table["feature"].to_numpy()[drawn], table["activation"].to_numpy()[drawn]
        total = np.bincount(feature, minlength=len(activations))
        reached = np.bincount(feature[peak >= activations[feature]], minlength=len(activations))
        firing = (counts.items_fired + 0.5) / (study.info.items + 1)
        share = firing * (reached + 0.5) / (total + 1)
        for index in np.flatnonzero(activations > 0).tolist():
            bits = -math.log2(float(share[index]))
            largest = float(counts.activation_max[index])
            relative = float(activations[index]) / largest if largest > 0 else math.inf
            why = f"fires on {100 * firing[index]:.1f} % of items; {relative:.2f} of its largest activation"
            why = why if largest > 0 else "never fired in the study"
            ranked.append((-bits, -relative, Match(FeatureId(layer, index), bits, why, float(activations[index]))))
    if not ranked:
        raise UserError(f"no feature of {study.path} is active on this input; give another picture or prompt")
    return [match for _, _, match in sorted(ranked, key=lambda row: row[:2])[:count]]
