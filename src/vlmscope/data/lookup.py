"""One row of a source again, by its number."""

from __future__ import annotations

from itertools import islice

from vlmscope.core.errors import UserError
from vlmscope.data.raw import RawSample
from vlmscope.data.readers import Indexed, Source
from vlmscope.data.shard_rows import ShardSource
from vlmscope.data.share import WHOLE


def row_of(source: Source, row: int) -> RawSample:
    """Row number `row` of a whole pass. Streams are read up to it; folders, tables and shards go there at once.

    Raises:
        UserError: there is no such row, or it cannot be used.
    """
    if isinstance(source, Indexed) and row < source.count:
        return source.sample(row)
    if isinstance(source, ShardSource):
        found = next(source.open(WHOLE, {"row": row, "bad": 0}), None)
    else:
        found = next(islice(source.open(WHOLE), row, None), None)
    if found is None:
        raise UserError(f"{source.name} has no row {row} any more; give the data that the study was made of")
    return found()
