"""Tables read with Hugging Face's `datasets`: a folder on this machine, or the hub, streamed.

What `Dataset.save_to_disk` wrote is read by row number; Parquet files and hub data sets are streamed, nothing is copied
or cached. Corrupt files of a folder are left out up to a limit (`vlmscope.data.bad_files`). Streams are split with
`split_dataset_by_node`: whole files to each consumer when they come out even, else every n-th row. Pictures stay
undecoded.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.data.bad_files import BadFiles, SoundGroups, readable_files
from vlmscope.data.columns import Parser, columns_of, parser
from vlmscope.data.conversation import CONVERSATIONS
from vlmscope.data.readers import Indexed, Mark, Row, Source
from vlmscope.data.share import Share
from vlmscope.data.source_config import SourceConfig

_LOG = logging.getLogger(__name__)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILE = re.compile(
    r"([\w.]+)-\d{5}-of-\d{5}"
)  # as the hub names the files of a split; a split's name has no hyphen
_SPLITS = "train|training|validation|valid|val|dev|testing|test|evaluation|eval"  # those that `load_dataset` knows


def hf_source(name: str, config: SourceConfig, split: str, max_bad: int = 0) -> Source:
    """The samples of one split, without `max_bad` corrupt files of a folder at most.

    Raises:
        UserError: it is not there or cannot be reached, has no such split or column, is empty, or too much is corrupt.
    """
    bad = BadFiles(name, max_bad)
    tables = [undecoded(_table(name, config, subset, split, bad)) for subset in config.subsets or [None]]
    for table in tables:
        _check_columns(name, config, table)
    parse = parser(config, _class_names(config, tables[0]))
    make = _streamed if _streams(tables[0]) else _by_number
    return make(name, config, tables, parse, bad)


def _streams(table: Any) -> bool:
    from datasets import IterableDataset

    return isinstance(table, IterableDataset)


def _table(name: str, config: SourceConfig, subset: str | None, split: str, bad: BadFiles) -> Any:
    if config.path is None:
        return _from_hub(name, config, subset, split)
    folder = Path(config.path) / subset if subset else Path(config.path)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}; data.sources.{name}.path must hold save_to_disk's output or Parquet files"
        )
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(name, folder, split, bad)
    return _parquet(name, folder, split, bad)


def _saved(name: str, folder: Path, split: str, bad: BadFiles) -> Any:
    """What `save_to_disk` wrote: a split's folder, or one with a folder for each split."""
    from datasets import Dataset, concatenate_datasets, load_from_disk

    part = folder
    if (folder / "dataset_dict.json").is_file():
        there = _told(f"cannot read {folder}", lambda: read_json(folder / "dataset_dict.json")["splits"])
        _check_split(name, folder, split, there)
        part = folder / split
    else:
        given = _told(f"cannot read {folder}", lambda: read_json(folder / "state.json").get("_split"))
        _check_split(name, folder, split, re.findall(r"^\w+", given or "train"))  # such as "test[:10%]"
    if _is_empty(part):
        raise UserError(f"data.sources.{name}: {part} is empty; give data with samples")
    listed = _told(f"cannot read {part}", lambda: read_json(part / "state.json")["_data_files"])
    files = [part / one["filename"] for one in listed]
    good = readable_files(files, lambda file: Dataset.from_file(str(file)), bad)
    if len(good) == len(files):
        return _told(f"cannot read {part}", lambda: load_from_disk(str(part)))
    return concatenate_datasets([Dataset.from_file(str(file)) for file in good])


def _parquet(name: str, folder: Path, split: str, bad: BadFiles) -> Any:
    """Parquet files, streamed, without damaged row groups."""
    from datasets import load_dataset_builder
    from pyarrow.parquet import read_metadata

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(
            f"{folder} holds neither save_to_disk's output nor Parquet files; check data.sources.{name}.path"
        )
    chosen = [str(file) for file in readable_files(_of_split(name, folder, files, split), read_metadata, bad)]

    def opened() -> Any:
        builder: Any = load_dataset_builder("parquet", data_files=chosen)
        builder._generate_tables = SoundGroups(builder._generate_tables, bad)
        return builder.as_streaming_dataset(split="train")

    return _told(f"cannot read {folder}", opened)


def _of_split(name: str, folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files that carry the name of a split; each file carries one at most, so that no two splits share a file.

    Files of which none carries a name are all of the split "train", as for `load_dataset`, or of the one that the
    folder itself is called.

    Raises:
        UserError: no file is of that split.
    """
    word = re.compile(rf"(?<![^\W\d_])({re.escape(split)}|{_SPLITS})(?![^\W\d_])")  # between signs and digits

    def carried(file: Path) -> str | None:
        if hub := _HUB_FILE.match(file.name):
            return hub[1]
        for part in (file.stem, *reversed(file.relative_to(folder).parent.parts)):
            if found := word.search(part):
                return found[1]
        return None

    owners = [carried(file) for file in files]
    names = sorted({owner for owner in owners if owner is not None})
    if len(names) == 1 and None not in owners and names[0] != split and not word.search(names[0]):
        names = []  # part-00000-of-00002: a name that all files share, and no split's
    if not names and split not in ("train", folder.name):
        raise UserError(
            f"{folder} has no split {split!r}: its files name no split, so that all of them are 'train'; correct "
            f"split or val_split of data.sources.{name}"
        )
    if not names:
        return files
    _check_split(name, folder, split, names)
    return [file for file, owner in zip(files, owners, strict=True) if owner == split]


def _check_split(name: str, folder: Path, split: str, there: list[str]) -> None:
    if split not in there:
        raise UserError(
            f"{folder} has no split {split!r}; split (or val_split) of data.sources.{name} is one of {', '.join(there)}"
        )


def _from_hub(name: str, config: SourceConfig, subset: str | None, split: str) -> Any:
    from datasets import load_dataset

    key, hub, revision = f"data.sources.{name}", str(config.hub), config.revision
    pin = f"{key}.revision=<commit, 40 hex digits> (its page lists them under Files, History)"
    if revision is None:
        _LOG.warning("%s: the revision of %s is not pinned: another run may be given other data; add %s", key, hub, pin)
    elif not _COMMIT.fullmatch(revision):
        raise UserError(
            f"{key}: the hub data set {hub} is asked for at {revision!r}, which may move: add {pin}, or "
            f"{key}.path=/your/copy"
        )
    from huggingface_hub import constants

    at = f" --revision {revision}" if revision is not None else ""
    mend = f"run `hf download {hub} --repo-type dataset{at} --local-dir DIR`, then {key}.path=DIR"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: HF_HUB_OFFLINE forbids to stream {hub} from the hub; where a network is, {mend}")
    return _told(
        f"{key}: cannot stream {hub} from the hub",
        lambda: load_dataset(hub, subset, split=split, revision=revision, streaming=True),
        mend,
    )


def _is_empty(folder: Path) -> bool:
    """`load_from_disk` fails on a table that was saved without rows."""
    state = read_json(folder / "state.json") if (folder / "state.json").is_file() else None
    return state is not None and not state.get("_data_files")


def _told(what: str, call: Any, mend: str = "check it, or write it anew") -> Any:
    """The result of `call`; whatever `datasets`, the network or a file format raises becomes one line."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # the libraries beneath raise dozens of unrelated classes
        if is_out_of_memory(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"{what} ({type(error).__name__}: {first}); {mend}") from error


def undecoded(table: Any) -> Any:
    """The table with pictures as the bytes of their files."""
    from datasets import Image, List

    for column, feature in (table.features or {}).items():
        if isinstance(feature, Image):
            table = table.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(column, List(Image(decode=False)))
    return table


def _check_columns(name: str, config: SourceConfig, table: Any) -> None:
    if table.features is None:  # a stream that says nothing about itself: its first row does
        first = next(iter(table), None)
        there = list(first) if first is not None else columns_of(config)
    else:
        there = list(table.features)
    missing = [column for column in columns_of(config) if column not in there]
    if missing:
        key, usual = ("texts", CONVERSATIONS) if missing[0] == config.texts else ("images", ("image",))
        hint = ""
        if config.kind == "hf_cauldron":
            other = next((column for column in usual if column in there), None)
            hint = f"; data.sources.{name}.{key}={other} reads that one" if other else hint
            hint = hint or (f"; data.sources.{name}.images=null if there are no pictures" if key == "images" else "")
        raise UserError(
            f"data.sources.{name}: no column {missing[0]!r}; the columns are {', '.join(there)} (the keys of "
            f"{config.kind} that name columns: docs/data.md){hint}"
        )


def _class_names(config: SourceConfig, table: Any) -> list[str] | None:
    feature = (table.features or {}).get(config.label)
    return getattr(feature, "names", None)


def _by_number(name: str, config: SourceConfig, tables: list[Any], parse: Parser, bad: BadFiles) -> Indexed:
    from datasets import interleave_datasets

    table = tables[0] if len(tables) == 1 else interleave_datasets(tables, stopping_strategy=_ALL_ONCE)
    count = len(table) if config.limit is None else min(len(table), config.limit)
    if count == 0:
        raise UserError(f"data.sources.{name}: {config.path} is empty; give data with samples")
    return Indexed(name, count, lambda row: parse(table[row], f"{name} row {row}"), len(bad))


_ALL_ONCE = "all_exhausted_without_replacement"  # take turns, and go on until every table has ended


def _streamed(name: str, config: SourceConfig, tables: list[Any], parse: Parser, bad: BadFiles) -> Stream:
    from datasets import interleave_datasets

    count = _known_size(tables)
    if count == 0:
        raise UserError(f"data.sources.{name}: {config.path or config.hub} is empty; give data with samples")
    table = tables[0] if len(tables) == 1 else interleave_datasets(tables, stopping_strategy=_ALL_ONCE)
    return Stream(name, table.select_columns(columns_of(config)), parse, config.limit, count, bad)


def _known_size(tables: list[Any]) -> int | None:
    counts = []
    for table in tables:
        splits = table.info.splits or {}
        counts.append(splits[table.split].num_examples if table.split in splits else None)
    return None if None in counts else sum(counts)


class Stream:
    """An `IterableDataset` as a source."""

    def __init__(
        self, name: str, table: Any, parse: Parser, limit: int | None, count: int | None, bad: BadFiles
    ) -> None:
        self.name, self.table, self.parse, self.limit, self.count = name, table, parse, limit, count
        self.bad = bad  # files that were left out; each pass adds those that it finds damaged

    def size(self) -> int | None:
        """What the data set says of itself, or the limit."""
        known = [number for number in (self.count, self.limit) if number is not None]
        return min(known) if known else None

    def open(self, share: Share, mark: Mark = None) -> StreamReader:
        """A pass; its mark is `datasets`' own state with the number of rows done."""
        from datasets.distributed import split_dataset_by_node

        # A deep copy for each pass: a table keeps the state of its iteration, and shallow ones share it. In one go, so
        # that the table's copy notes damage where the reader looks.
        table, bad = copy.deepcopy((self.table, self.bad))
        if share.total > 1:
            table = split_dataset_by_node(table, share.index, share.total)
        most = None if self.limit is None else len(share.rows(self.limit))
        return StreamReader(self.name, table, self.parse, most, share, mark, bad)


class StreamReader:
    """Goes through a stream once."""

    def __init__(
        self, name: str, table: Any, parse: Parser, most: int | None, share: Share, mark: Mark, bad: BadFiles
    ) -> None:
        self.name, self.table, self.parse, self.most, self.share, self.bad = name, table, parse, most, share, bad
        self.done: int = 0
        if mark is not None:
            self.done = mark["done"]
            bad.inside += mark.get("damaged", [])  # marks of earlier versions knew of none
            table.load_state_dict(mark["state"])
        self.rows = iter(table)

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.most is not None and self.done >= self.most:
            raise StopIteration
        row = _told(f"data.sources.{self.name}: reading its row {self.done} failed", self._next)
        if row is None:
            raise StopIteration
        part = f" of part {self.share.index}" if self.share.total > 1 else ""
        origin = f"{self.name} row {self.done}{part}"
        self.done += 1
        return lambda: self.parse(row, origin)

    @property
    def bad_shards(self) -> int:
        """Files left out, and those found damaged so far."""
        return len(self.bad)

    def _next(self) -> Any:
        return next(self.rows, None)

    def mark(self) -> Mark:
        """`datasets`' state, which names file and row, and the files that are damaged."""
        if self.done == 0:
            return None
        return {"done": self.done, "state": self.table.state_dict(), "damaged": list(self.bad.inside)}

    @property
    def last(self) -> int:
        """As `Reader.last`."""
        return self.done - 1
