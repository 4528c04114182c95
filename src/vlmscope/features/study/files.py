"""The files of a study from its finished parts: the same bytes however the data were divided."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmscope.core.artifacts import write_json
from vlmscope.core.study import MANIFEST, StudyInfo
from vlmscope.features.study.config import StudyConfig
from vlmscope.features.study.layer_tables import LayerTables, Logits, layer_tables
from vlmscope.features.study.part import StudyPart
from vlmscope.features.study.schema import (
    EXAMPLES,
    FEATURES,
    GEOMETRY,
    GEOMETRY_TABLE,
    ITEM_TABLE,
    ITEMS,
    NAME,
    ROWS_A_GROUP,
    VERSION,
    VOCABULARY,
    VOCABULARY_TABLE,
    table_writer,
    write_table,
)

_ITEMS_A_GROUP = 1024


def write_study(
    study: Path,
    parts: Sequence[StudyPart],
    info: StudyInfo,
    config: StudyConfig,
    logits: Callable[[int], Logits | None],
    token: Callable[[int], str],
) -> None:
    """Write all tables, `study.json` last, and remove the parts.

    Args:
        study: the folder.
        parts: all of them, finished.
        info: the head.
        config: what was kept.
        logits: of a layer's features; None to leave them out.
        token: the string of an id.
    """
    items: set[int] = set()
    for layer, width in sorted(info.n_features.items()):
        found: LayerTables = layer_tables([part.layer(layer) for part in parts], width, config, logits(layer), token)
        write_table(study / FEATURES.format(layer), found.features)
        write_table(study / EXAMPLES.format(layer), found.examples, ROWS_A_GROUP)
        items.update(found.items.tolist())
    _write_items(study, parts, np.array(sorted(items), dtype=np.int64), token)
    write_json(study / MANIFEST, {"format": NAME, "version": VERSION, **json.loads(json.dumps(asdict(info)))})
    shutil.rmtree(study / "parts")


def _write_items(study: Path, parts: Sequence[StudyPart], wanted: np.ndarray, token: Callable[[int], str]) -> None:
    """Items that examples refer to, with their geometries and tokens."""
    known, ids = pa.array(wanted), set()
    shapes: set[str] = set()
    with table_writer(study / ITEMS, ITEM_TABLE) as writer:
        tables = [_chosen(part.items(), "item", known) for part in parts]
        for table in _regrouped(_in_order(tables), writer):
            ids.update(pc.unique(pc.list_flatten(table["token_ids"])).to_pylist())  # pyright: ignore[reportAttributeAccessIssue]
            shapes.update(table["geometry"].to_pylist())
    rows = {}
    for part in parts:
        for table in _chosen(part.geometries(), "geometry", pa.array(sorted(shapes), pa.string())):
            rows |= {row["geometry"]: row for row in table.to_pylist()}
    write_table(study / GEOMETRY, pa.Table.from_pylist([rows[key] for key in sorted(rows)], GEOMETRY_TABLE))
    words = [{"id": number, "token": token(number)} for number in sorted(ids)]
    write_table(study / VOCABULARY, pa.Table.from_pylist(words, VOCABULARY_TABLE))


def _chosen(tables: Iterable[pa.Table], column: str, values: pa.Array) -> Iterator[pa.Table]:
    for table in tables:
        yield table.filter(pc.is_in(table[column], value_set=values))  # pyright: ignore[reportAttributeAccessIssue]


def _in_order(streams: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """Rows of several streams of tables, each by id, as one by id; of each no more than a table is in memory."""
    held: list[pa.Table | None] = [_next(stream) for stream in streams]
    while any(table is not None for table in held):
        # What comes later has larger ids than this.
        bound = min(table["item"][-1].as_py() for table in held if table is not None)
        ready = []
        for place, table in enumerate(held):
            if table is None:
                continue
            count = int(np.searchsorted(table["item"].to_numpy(), bound, side="right"))
            ready.append(table.slice(0, count))
            held[place] = table.slice(count) if count < len(table) else _next(streams[place])
        yield pa.concat_tables(ready).sort_by("item")


def _next(stream: Iterator[pa.Table]) -> pa.Table | None:
    return next((table for table in stream if len(table)), None)


def _regrouped(tables: Iterator[pa.Table], writer: pq.ParquetWriter) -> Iterator[pa.Table]:
    """Write tables in groups of one size, whatever theirs is, so that files are the same; each group is yielded."""
    rest: list[pa.Table] = []

    def write(table: pa.Table) -> pa.Table:
        whole = table.combine_chunks()
        writer.write_table(whole, _ITEMS_A_GROUP)
        return whole

    for one in tables:
        table = pa.concat_tables([*rest, one])
        full = len(table) // _ITEMS_A_GROUP * _ITEMS_A_GROUP
        for start in range(0, full, _ITEMS_A_GROUP):
            yield write(table.slice(start, _ITEMS_A_GROUP))
        rest = [table.slice(full)]
    if rest and len(rest[0]):
        yield write(rest[0])


def totals(parts: Sequence[StudyPart]) -> dict[str, Any]:
    """What all parts together went through: items, rows, positions by kind and skipped rows by source."""
    states = [part.state for part in parts if part.state is not None]
    skipped: dict[str, int] = {}
    for state in states:
        for name, count in state["skipped"].items():
            skipped[name] = skipped.get(name, 0) + count
    positions = np.sum([state["positions"] for state in states], axis=0).tolist()
    rows = sum(states[0]["rows"]["taken"].values())  # every part counts all
    return {
        "items": sum(state["items"] for state in states),
        "rows": rows,
        "positions": positions,
        "skipped": dict(sorted(skipped.items())),
        "bad_shards": states[0]["bad_shards"],
    }
