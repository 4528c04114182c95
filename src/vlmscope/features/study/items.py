"""The items of a study and the tables that lead back to them.

The Parquet tables of a study folder (docs/study.md), written atomically and always with the same bytes.

The items that a study's examples refer to, and their pictures, which stay where the data are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox
from vlmscope.core.study import BINS, StudyItem
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import decode_image
from vlmscope.data.mixing import open_source, row_of
from vlmscope.data.samples import Source

NAME, VERSION = "vlmscope-study", 1
FEATURES, EXAMPLES = "features/layer_{:02d}.parquet", "examples/layer_{:02d}.parquet"
ITEMS, GEOMETRY, VOCABULARY = "items.parquet", "geometry.parquet", "vocabulary.parquet"
ROWS_A_GROUP = 2048  # of examples: about what some dozens of features have, so that one feature is read quickly

_STRINGS, _FLOATS = pa.list_(pa.string()), pa.list_(pa.float32())
_HISTOGRAM = pa.list_(pa.int64(), BINS)

FEATURE_TABLE = pa.schema(
    [
        ("feature", pa.int32()),
        ("items_fired", pa.int64()),
        ("fired_text", pa.int64()),
        ("fired_image", pa.int64()),
        ("fired_answer", pa.int64()),
        ("activation_sum", pa.float64()),
        ("activation_max", pa.float32()),
        ("histogram_text", _HISTOGRAM),
        ("histogram_image", _HISTOGRAM),
        ("histogram_answer", _HISTOGRAM),
        ("quantile_values", _FLOATS),
        ("top_tokens", _STRINGS),
        ("top_logits", _FLOATS),
        ("bottom_tokens", _STRINGS),
        ("bottom_logits", _FLOATS),
    ]
)
EXAMPLE_TABLE = pa.schema(
    [
        ("feature", pa.int32()),
        ("group", pa.string()),
        ("rank", pa.int32()),
        ("activation", pa.float32()),
        ("item", pa.int64()),
        ("position", pa.int32()),
        ("positions", pa.list_(pa.uint16())),
        ("levels", pa.list_(pa.uint8())),
    ]
)
ITEM_TABLE = pa.schema(
    [
        ("item", pa.int64()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("part", pa.int32()),
        ("origin", pa.string()),
        ("digest", pa.string()),
        ("users", _STRINGS),
        ("assistants", _STRINGS),
        ("text", pa.string()),
        ("n_pictures", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("kinds", pa.list_(pa.uint8())),
        ("geometry", pa.string()),
    ]
)
GEOMETRY_TABLE = pa.schema(
    [
        ("geometry", pa.string()),
        ("pictures", pa.list_(pa.int32())),
        ("boxes", pa.list_(pa.float64())),
        ("rows", pa.list_(pa.int32())),
        ("columns", pa.list_(pa.int32())),
    ]
)
VOCABULARY_TABLE = pa.schema([("id", pa.int32()), ("token", pa.string())])


def write_table(path: Path, table: pa.Table, rows_a_group: int | None = None) -> None:
    """Write a whole table."""
    with table_writer(path, table.schema) as writer:
        writer.write_table(table, rows_a_group)


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A table written piece by piece; the file is there when all of it is."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        yield writer


def read_table(path: Path, schema: pa.Schema, filters: list | None = None) -> pa.Table:
    """Read a table, or the rows that filters leave.

    Raises:
        UserError: it is missing, no Parquet, or of another layout.
    """
    if not path.is_file():
        raise UserError(f"no {path}; the study is not complete: run task=study again with trainer.resume=true")
    try:
        table = pq.ParquetFile(path).read() if filters is None else pq.read_table(path, filters=filters)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}; run task=study again") from error
    if table.schema.names != schema.names:
        raise UserError(
            f"{path} has the columns {', '.join(table.schema.names)}; it is not of a study of version {VERSION}"
        )
    return table


class StudyItems:
    """`items[id]`, and the pictures of one. Tables are read once, pictures whenever they are asked for."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        """Read the tables.

        Args:
            folder: of the study.
            data: `StudyInfo.data`, which says how to read pictures.

        Raises:
            UserError: a table is missing or damaged.
        """
        self.folder, self.data = folder, data
        self.table = read_table(folder / ITEMS, ITEM_TABLE)
        self.ids = self.table["item"].to_numpy()
        words = read_table(folder / VOCABULARY, VOCABULARY_TABLE)
        self.words: dict[int, str] = dict(zip(words["id"].to_pylist(), words["token"].to_pylist(), strict=True))
        rows = read_table(folder / GEOMETRY, GEOMETRY_TABLE).to_pylist()
        self.geometries = {row["geometry"]: _Geometry(row) for row in rows}
        self._sources: dict[str, Source] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, item: int) -> StudyItem:
        place = int(np.searchsorted(self.ids, item))
        if place == len(self.ids) or self.ids[place] != item:
            raise UserError(f"{self.folder / ITEMS} has no item {item}; the files are not of one study, run it again")
        row = self.table.slice(place, 1).to_pylist()[0]
        geometry = self.geometries[row["geometry"]]
        turns = tuple(Exchange(*turn) for turn in zip(row["users"], row["assistants"], strict=True))
        return StudyItem(
            row["item"], row["source"], row["row"], row["part"], row["origin"], row["digest"], turns, row["text"],
            row["n_pictures"],
            np.array(row["token_ids"], dtype=np.int64),
            tuple(self.words[token] for token in row["token_ids"]),
            np.array(row["kinds"], dtype=np.uint8),
            geometry.pictures, geometry.boxes, geometry.grids,
        )  # fmt: skip

    def pictures(self, item: StudyItem) -> tuple[Any, ...]:
        """PIL pictures of an item; see `StudyFolder.pictures`."""
        if not item.n_pictures:
            return ()
        sample = row_of(self.source(item.source), item.row)
        if sample.digest().hex() != item.digest:
            raise UserError(f"{item.origin}: not what the study saw; give the data that it was made of")
        return tuple(decode_image(data, f"{item.origin}: picture {n}") for n, data in enumerate(sample.images, start=1))

    def source(self, name: str) -> Source:
        """One of the study's sources, opened again."""
        if name not in self._sources:
            config = SourceConfig(**self.data["sources"][name])
            self._sources[name] = open_source(name, config, max_bad_shards=self.data["max_bad_shards"])
        return self._sources[name]


class _Geometry:
    """Where the soft tokens of an item's pictures lie; many items share one."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.pictures = np.array(row["pictures"], dtype=np.int64)
        numbers = row["boxes"]
        self.boxes = tuple(PatchBox(*numbers[i : i + 4]) for i in range(0, len(numbers), 4))
        self.grids = tuple(zip(row["rows"], row["columns"], strict=True))


def geometry_row(key: str, boxes: list[list[PatchBox]]) -> dict[str, Any]:
    """A row of `GEOMETRY_TABLE` from the boxes of each picture's soft tokens."""
    grids = [_grid(found) for found in boxes]
    return {
        "geometry": key,
        "pictures": [number for number, found in enumerate(boxes) for _ in found],
        "boxes": [number for found in boxes for box in found for number in box],
        "rows": [rows for rows, _ in grids],
        "columns": [columns for _, columns in grids],
    }


def _grid(boxes: list[PatchBox]) -> tuple[int, int]:
    """Rows and columns, when the boxes go through a grid row by row, else (0, 0)."""
    tops = list(dict.fromkeys(box.top for box in boxes))
    lefts = list(dict.fromkeys(box.left for box in boxes))
    plain = [(box.top, box.left) for box in boxes] == [(top, left) for top in tops for left in lefts]
    return (len(tops), len(lefts)) if plain else (0, 0)
