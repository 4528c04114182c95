"""Corrupt files of a local table: left out with a count, up to a limit, each told in one line.

A Parquet file is corrupt when its footer cannot be read, an Arrow file when its record batches cannot be found: that is
what a copy or a download that stopped leaves behind. Looking costs a few reads a file. Damage inside a Parquet file
shows itself when its row group is reached, which is then left out.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vlmscope.core.errors import UserError, is_out_of_memory

MAX_ROW_BYTES = 2**30  # on average; the largest picture that is opened takes a third of it, uncompressed
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
_LOG = logging.getLogger(__name__)


class BadFiles:
    """The corrupt files of a source: those left out when it was opened, and those found so far in one pass."""

    def __init__(self, name: str, most: int) -> None:
        """`name` of the source, for messages; `most`: how many there may be (`data.max_bad_shards`)."""
        self.name, self.most = name, most
        self.left_out: list[str] = []
        self.inside: list[str] = []

    def __len__(self) -> int:
        return len(self.left_out) + len(self.inside)

    def does_not_open(self, file: Path, error: Exception) -> None:
        """Note a file that is left out.

        Raises:
            UserError: it is one too many.
        """
        self.left_out.append(f"{file} ({_first_line(error)})")
        self._check(file, error)

    def damaged(self, file: str, error: Exception) -> None:
        """Note a file that lacks rows; one that a pass meets again counts once.

        Raises:
            UserError: it is one too many.
        """
        if file in self.inside:
            return
        self.inside.append(file)
        self._check(file, error)
        _LOG.warning(
            "data.sources.%s: %s is damaged inside (%s); row groups of it are left out (%d of at most %d files)",
            self.name, file, _first_line(error), len(self), self.most,
        )  # fmt: skip

    def _check(self, file: Path | str, error: Exception) -> None:
        if len(self) > self.most:
            raise UserError(
                f"data.sources.{self.name}: cannot read {file} ({_first_line(error)}), corrupt file number "
                f"{len(self)}, and data.max_bad_shards={self.most}; copy it anew, or raise the limit"
            ) from error


def readable_files(files: Iterable[Path], opens: Callable[[Path], object], bad: BadFiles) -> list[Path]:
    """The files that can be opened, in order.

    Args:
        files: of a local table.
        opens: opens one, or raises.
        bad: where others are noted.

    Raises:
        UserError: too many are corrupt, or all of them.
    """
    good: list[Path] = []
    before = len(bad)
    for file in files:
        try:
            opens(file)
        except Exception as error:  # pyarrow, the disk and zlib each have their own
            if is_out_of_memory(error):
                raise
            bad.does_not_open(file, error)
        else:
            good.append(file)
    found = bad.left_out[before:]
    if found and not good:
        raise UserError(f"data.sources.{bad.name}: cannot read any file, first {found[0]}; copy them anew")
    if found:
        _LOG.warning(
            "data.sources.%s: %d of %d files are corrupt and left out, first %s; data.max_bad_shards=%d",
            bad.name, len(found), len(found) + len(good), found[0], bad.most,
        )  # fmt: skip
    return good


class SoundGroups:
    """What `datasets` reads a Parquet file's tables by, one row group at a time, without those that cannot be read.

    Of a whole file pyarrow reads ahead, and how many rows come before an error is left to chance; of a row group all or
    none come, so that a pass can go on from a mark.
    """

    def __init__(self, generate: Callable[..., Iterator[Any]], bad: BadFiles) -> None:
        self.generate, self.bad = generate, bad

    def __call__(self, files: list[str], row_groups_list: list[Any]) -> Iterator[Any]:
        """The tables of some files, each with its key."""
        from pyarrow.parquet import read_metadata

        for file, given in zip(files, row_groups_list, strict=True):
            metadata = read_metadata(file)
            groups = range(metadata.num_row_groups) if given is None else given
            for group in groups:
                try:
                    _check_size(metadata.row_group(group), group)
                    yield from self.generate([file], [(group,)])
                except Exception as error:  # pyarrow raises its own, OSError and ValueError
                    if is_out_of_memory(error):
                        raise
                    self.bad.damaged(file, error)


def _check_size(group: Any, number: int) -> None:
    """Refuse a row group by its metadata, before it is read: all of it must fit into memory.

    Raises:
        ValueError: it does not, or its rows are larger than any sample.
    """
    size, rows = group.total_byte_size, group.num_rows
    if size > MAX_ROW_BYTES * rows:
        raise ValueError(f"rows of {size // max(1, rows):,} bytes in its row group {number}, at most {MAX_ROW_BYTES:,}")
    if size > MEMORY:
        raise ValueError(f"its row group {number} takes {size:,} bytes, more than this machine's memory")


def _first_line(error: Exception) -> str:
    return "".join(filter(str.isprintable, (str(error).strip().splitlines() or [type(error).__name__])[0]))[:200]
