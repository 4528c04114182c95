"""The Parquet tables of a study folder (docs/study.md), written atomically and always with the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.core.study import BINS

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
