"""Where in an item a feature fires: at which tokens, after which, on which part of the picture.

Within the items on which a feature fires, positions at which it does are held against those at which it does not. The
score is the AUROC of "the position is such a place": 0.5 + (share of firing positions there - share of others) / 2.

Legend: R rows of a layer, E positions of all rows together, T positions of all items together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import ndtr

from vlmscope.core.study import IMAGE, KINDS
from vlmscope.features.labels.item_facts import ItemFacts
from vlmscope.features.labels.known import KnownItems
from vlmscope.features.labels.propose import GAIN
from vlmscope.features.labels.rules import MOST_VALUES, Part
from vlmscope.features.labels.scores import wilson
from vlmscope.features.study.items import StudyItems

KEYS = ("kind", "token", "after", "rows", "columns")
_THIRDS = {
    "rows": ("upper part", "middle rows", "lower part"),
    "columns": ("left part", "middle columns", "right part"),
}
_AT_A_TIME = 1 << 22  # positions in memory


@dataclass(frozen=True)
class Places:
    """What can be said of all positions.

    Attributes:
        starts: `[N + 1]`, where each item's positions begin; items as in `ItemFacts`.
        codes: `[T, keys]` int32, which value of each of `KEYS`, -1 for none.
        values: the values by key.
        picture: `[T]` bool.
        said: `[T]` int32, text positions of the item up to here.
    """

    starts: np.ndarray
    codes: np.ndarray
    values: tuple[tuple[str, ...], ...]
    picture: np.ndarray
    said: np.ndarray


@dataclass(frozen=True)
class PlaceLabel:
    """Where a feature fires, with the score on `items` items that it was not found on.

    Positions of one item are not independent, so the interval and p count items, at the largest variance (1/4) that
    an item's own AUROC can have.
    """

    part: Part
    auroc: float
    low: float
    high: float
    p: float
    items: int


def places(items: StudyItems, facts: ItemFacts) -> Places:
    """Read the positions of all items of a study."""
    table = items.table.take(np.searchsorted(items.ids, facts.ids))
    tokens, kinds = (table[name].combine_chunks() for name in ("token_ids", "kinds"))
    starts = tokens.offsets.to_numpy().astype(np.int64)
    starts = starts - starts[0]
    token, kind = tokens.flatten().to_numpy(), kinds.flatten().to_numpy()
    known = np.array(sorted(items.words))
    code = np.searchsorted(known, token).astype(np.int32)
    picture = kind == IMAGE
    before = np.concatenate([[-1], code[:-1]]).astype(np.int32)
    before[starts[:-1]] = -1
    rows, columns = _thirds(items, table["geometry"].to_pylist())
    codes = np.full((len(token), len(KEYS)), -1, dtype=np.int32)
    codes[:, 0] = kind
    codes[:, 1] = np.where(picture, -1, code)
    codes[:, 2] = np.where(picture, -1, before)
    codes[picture, 3], codes[picture, 4] = rows, columns
    words = tuple(items.words[number] for number in known.tolist())
    said = np.cumsum(~picture).astype(np.int32)
    values = (KINDS, words, words, _THIRDS["rows"], _THIRDS["columns"])
    return Places(starts, codes, values, picture, said)


def _thirds(items: StudyItems, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    found: dict[str, Any] = {}
    for name in set(names):
        boxes = np.array([tuple(box) for box in items.geometries[name].boxes]).reshape(-1, 4)
        middle = np.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]]) / 2
        found[name] = np.minimum((middle * 3).astype(np.int32), 2)
    both = np.concatenate([found[name] for name in names], axis=1)
    return both[0], both[1]


def place_labels(
    at: Places,
    facts: ItemFacts,
    known: KnownItems,
    examples: pa.Table,
    window: int,
    rng: np.random.Generator | None = None,
) -> list[PlaceLabel | None]:
    """The best place of every feature of a layer; None where none beats `GAIN`.

    Args:
        at: all positions.
        facts: which items are for proposing, which for scoring.
        known: the layer's rows.
        examples: its table of examples.
        window: of the study: text positions around the peak that it kept.
        rng: when given, each row's positions are shuffled first, so that scores are those of chance.
    """
    found: list[PlaceLabel | None] = []
    for first, last in _chunks(at, known):
        found += _chunk(at, facts, known, examples, window, first, last, rng)
    return found


def _chunks(at: Places, known: KnownItems) -> Iterator[tuple[int, int]]:
    sizes = np.diff(at.starts)[known.item]
    total = np.concatenate([[0], np.cumsum(sizes)])[known.starts]
    first = 0
    while first < len(known.reach):
        last = int(np.searchsorted(total, total[first] + _AT_A_TIME, "right")) - 1
        last = min(max(last, first + 1), len(known.reach))
        yield first, last
        first = last


def _chunk(
    at: Places, facts: ItemFacts, known: KnownItems, examples: pa.Table, window: int, first: int, last: int,
    rng: np.random.Generator | None,
) -> list[PlaceLabel | None]:  # fmt: skip
    rows = np.arange(known.starts[first], known.starts[last])
    item = known.item[rows]
    lengths = np.diff(at.starts)[item]
    begins = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(np.arange(len(rows)), lengths)
    flat = np.arange(begins[-1]) - np.repeat(begins[:-1] - at.starts[item], lengths)
    fired = np.zeros(len(flat), dtype=bool)
    picked = examples.take(known.row[rows])
    kept = picked["positions"].combine_chunks()
    fired[kept.flatten().to_numpy() + np.repeat(begins[:-1], np.diff(kept.offsets.to_numpy()))] = True
    peak = at.starts[item] + picked["position"].to_numpy()
    near = at.picture[flat] | (np.abs(at.said[flat] - np.repeat(at.said[peak], lengths)) <= window)
    row, flat, fired = row[near], flat[near], fired[near]
    if rng is not None:
        fired = fired[np.lexsort((rng.random(len(row)), row))]
    feature = np.repeat(np.arange(last - first), np.diff(known.starts[first : last + 1]))
    scoring = facts.half[item]
    # Scored on the random draw alone; the strongest help to propose.
    use = np.where(scoring, known.drawn[rows], True)[row]
    row, flat, fired = row[use], flat[use], fired[use]
    items = np.bincount(feature[scoring & known.drawn[rows]], minlength=last - first)
    group = feature[row] * 4 + scoring[row] * 2 + fired  # [features, half, fired]
    return _best(at, flat, group, items, last - first)


def _best(at: Places, flat: np.ndarray, group: np.ndarray, items: np.ndarray, count: int) -> list[PlaceLabel | None]:
    totals = np.bincount(group, minlength=4 * count).reshape(count, 2, 2)
    best: list[PlaceLabel | None] = [None] * count
    value = np.full(count, GAIN)
    features = np.arange(count)
    for number, key in enumerate(KEYS):
        code, size = at.codes[flat, number], len(at.values[number])
        has = code >= 0
        counts = np.bincount(group[has] * size + code[has], minlength=4 * count * size).reshape(count, 2, 2, size)
        share = (counts + 0.5 / size) / (totals[..., None] + 1)
        contrast = share[:, 0, 1] - share[:, 0, 0]
        most = np.argsort(-contrast, axis=1, kind="stable")[:, : min(MOST_VALUES, size - 1)]
        gains = np.take_along_axis(contrast, most, 1)
        chosen = gains > np.where(np.arange(most.shape[1]) == 0, 0, GAIN)
        score = (gains * chosen).sum(1) - GAIN * (chosen.sum(1) - 1)
        better = features[(score > value) & chosen[:, 0] & (totals[:, 1] > 0).all(1)]
        value[better] = score[better]
        for one in better.tolist():
            picks = most[one][chosen[one]]
            rates = counts[one, 1][:, picks].sum(1) / totals[one, 1]
            auroc = 0.5 + 0.5 * float(rates[1] - rates[0])
            part = Part(key, tuple(at.values[number][pick] for pick in picks.tolist()))
            n = float(max(items[one], 1))
            best[one] = PlaceLabel(part, auroc, *wilson(auroc, n), float(ndtr(-(auroc - 0.5) * 2 * n**0.5)), int(n))
    return best
