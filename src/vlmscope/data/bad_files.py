"""Corrupt files of a local table: left out with a count, up to a limit, and told in one line.

A Parquet file is corrupt when its footer cannot be read, an Arrow file when its record batches cannot be found: that is
what a copy or a download that stopped leaves behind. Looking costs a few reads a file.
"""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path

from vlmscope.core.errors import UserError

_LOG = logging.getLogger(__name__)


def readable_files(name: str, files: Iterable[Path], opens: Callable[[Path], object], most: int) -> list[Path]:
    """The files that can be opened, in order.

    Args:
        name: the source's name, for messages.
        files: of a local table.
        opens: opens one, or raises.
        most: how many corrupt ones may be left out (`data.max_bad_shards`).

    Raises:
        UserError: more are corrupt, or all of them.
    """
    good: list[Path] = []
    bad: list[str] = []
    for file in files:
        try:
            opens(file)
        except Exception as error:  # pyarrow, the disk and zlib each have their own
            bad.append(f"{file} ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})")
            if len(bad) > most:
                raise UserError(
                    f"data.sources.{name}: cannot read {bad[-1]}, corrupt file number {len(bad)}, and "
                    f"data.max_bad_shards={most}; copy it anew, or raise the limit"
                ) from error
        else:
            good.append(file)
    if bad and not good:
        raise UserError(f"data.sources.{name}: cannot read any file, first {bad[0]}; copy them anew")
    if bad:
        _LOG.warning(
            "data.sources.%s: %d of %d files are corrupt and left out, first %s; data.max_bad_shards=%d",
            name, len(bad), len(bad) + len(good), bad[0], most,
        )  # fmt: skip
    return good
