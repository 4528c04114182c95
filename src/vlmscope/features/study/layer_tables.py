"""The two tables of a layer, features and examples, from the arrays of all parts of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vlmscope.core.study import BINS, KINDS, TOP
from vlmscope.features.study.config import StudyConfig
from vlmscope.features.study.kept_pairs import Pairs, chosen, drawn_first, joined, ranks, strongest_first
from vlmscope.features.study.layer_study import COUNTS, UNIT
from vlmscope.features.study.schema import EXAMPLE_TABLE, FEATURE_TABLE


@dataclass(frozen=True)
class Logits:
    """What features write towards: token ids and logits [F, c] of those raised most and of those lowered most."""

    top_ids: np.ndarray
    top: np.ndarray
    bottom_ids: np.ndarray
    bottom: np.ndarray


@dataclass(frozen=True)
class LayerTables:
    """`features` and `examples` as in `schema`; `items` [I], the ids that examples refer to."""

    features: pa.Table
    examples: pa.Table
    items: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Examples in the order of the table: which pair, its group (0 top, 1 .. quantiles) and its rank there, `[R]`."""

    pair: np.ndarray
    group: np.ndarray
    rank: np.ndarray


def layer_tables(
    states: Sequence[Mapping[str, np.ndarray]],
    n_features: int,
    config: StudyConfig,
    logits: Logits | None,
    token: Callable[[int], str],
) -> LayerTables:
    """Merge the states of a layer's parts (`LayerStudy.state`) and make its tables."""
    merged = [Pairs.of(state) for state in states]
    pairs = chosen(joined(merged), n_features, config.top, config.samples).pairs
    counts = {name: np.sum([state[name] for state in states], axis=0) for name in COUNTS}
    rows, quantiles = example_rows(pairs, n_features, config)
    features = _features(pairs, counts, quantiles, logits, token)
    return LayerTables(features, _examples(pairs, rows), np.unique(pairs.item))


def example_rows(pairs: Pairs, n_features: int, config: StudyConfig) -> tuple[Rows, list[np.ndarray]]:
    """The table's rows, and for each feature the peaks at which the groups after the first begin."""
    order = strongest_first(pairs)
    rank = ranks(pairs.feature[order])
    top, top_rank = order[rank < config.top], rank[rank < config.top]
    draw = drawn_first(pairs)
    drawn = np.zeros(len(pairs), dtype=bool)
    drawn[draw[ranks(pairs.feature[draw]) < config.samples]] = True
    strong = order[drawn[order]]  # by feature, strongest first
    feature = pairs.feature[strong]
    count = np.bincount(feature, minlength=n_features)
    place = ranks(feature)
    group = (count[feature] - 1 - place) * config.quantiles // np.maximum(count[feature], 1)
    rank_in = ranks(feature.astype(np.int64) * config.quantiles + (config.quantiles - 1 - group))
    pair, groups = np.concatenate([top, strong]), np.concatenate([np.zeros_like(top), group + 1])
    all_ranks = np.concatenate([top_rank, rank_in])
    by = np.lexsort((all_ranks, groups, pairs.feature[pair]))
    return Rows(pair[by], groups[by], all_ranks[by]), _quantiles(pairs.peak[strong], count, config.quantiles)


def _quantiles(peaks: np.ndarray, count: np.ndarray, quantiles: int) -> list[np.ndarray]:
    """From sampled peaks by feature, strongest first, and how many each feature has, [F]."""
    ends, part = np.cumsum(count), np.arange(1, quantiles)
    found = []
    for end, n in zip(ends, count, strict=True):
        # Weakest first, group i + 1 begins at number ceil(i n / quantiles).
        begins = np.minimum(-(-part * n // quantiles), n - 1)
        found.append(peaks[end - 1 - begins] if n else peaks[:0])
    return found


def _examples(pairs: Pairs, rows: Rows) -> pa.Table:
    found = pairs.take(rows.pair)
    names = pa.array([TOP, *(f"q{n}" for n in range(1, int(rows.group.max(initial=0)) + 1))])
    starts = pa.array(found.starts.astype(np.int32))
    columns = [
        pa.array(found.feature),
        pa.DictionaryArray.from_arrays(pa.array(rows.group.astype(np.int32)), names).cast(pa.string()),
        pa.array(rows.rank.astype(np.int32)),
        pa.array(found.peak),
        pa.array(found.item),
        pa.array(found.position),
        pa.ListArray.from_arrays(starts, pa.array(found.positions)),
        pa.ListArray.from_arrays(starts, pa.array(found.levels)),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_TABLE)


def _features(
    pairs: Pairs,
    counts: Mapping[str, np.ndarray],
    quantiles: Sequence[np.ndarray],
    logits: Logits | None,
    token: Callable[[int], str],
) -> pa.Table:
    n_features = len(quantiles)
    histogram = counts["histogram"].reshape(n_features, len(KINDS), BINS)
    fired = histogram.sum(-1)
    largest = np.zeros(n_features, dtype=np.float32)
    np.maximum.at(largest, pairs.feature, pairs.peak)
    starts = pa.array(np.cumsum([0, *map(len, quantiles)]).astype(np.int32))
    values = np.concatenate(quantiles) if quantiles else np.zeros(0, np.float32)
    columns: list[pa.Array] = [
        pa.array(np.arange(n_features, dtype=np.int32)),
        pa.array(counts["items_fired"]),
        *(pa.array(np.ascontiguousarray(fired[:, kind])) for kind in range(len(KINDS))),
        pa.array(counts["sums"] * UNIT),
        pa.array(largest),
        *(_fixed(histogram[:, kind]) for kind in range(len(KINDS))),
        pa.ListArray.from_arrays(starts, pa.array(values.astype(np.float32))),
        *_logit_columns(logits, n_features, token),
    ]
    return pa.Table.from_arrays(columns, schema=FEATURE_TABLE)


def _fixed(numbers: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(numbers).ravel()), BINS)


def _logit_columns(logits: Logits | None, n_features: int, token: Callable[[int], str]) -> list[pa.Array]:
    if logits is None:
        empty = [[] for _ in range(n_features)]
        return [pa.array(empty, FEATURE_TABLE.field(name).type) for name in FEATURE_TABLE.names[-4:]]
    strings = {number: token(number) for number in np.unique([logits.top_ids, logits.bottom_ids]).tolist()}
    columns = []
    for ids, values in ((logits.top_ids, logits.top), (logits.bottom_ids, logits.bottom)):
        starts = pa.array(np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32))
        words = pa.array([strings[i] for i in ids.ravel().tolist()], pa.string())
        columns.append(pa.ListArray.from_arrays(starts, words))
        columns.append(pa.ListArray.from_arrays(starts, pa.array(values.astype(np.float32).ravel())))
    return columns
