"""Tables read with Hugging Face's `datasets`, their schemas as samples, and their damaged parts.

Corrupt files of a local table: left out with a count, up to a limit, each told in one line.

A Parquet file is corrupt when its footer cannot be read, an Arrow file when its record batches cannot be found: that is
what a copy or a download that stopped leaves behind. Looking costs a few reads a file. Damage inside a Parquet file
shows itself when its row group is reached, which is then left out.

Rows of the three table schemas of the paper's data (arXiv 2602.20330) as samples. Pure functions.

    hf_text          {text}                                       SmolLM2-135M-10B
    hf_image_label   {image, label} or {image, caption}           ImageNet-1k, or pictures with captions
    hf_cauldron      {images: [...], texts: [{user, assistant}]}  the Cauldron, raw, and the layouts of `.conversation`

A picture is {"bytes": ..., "path": ...}, as `datasets` stores it undecoded.

Tables read with Hugging Face's `datasets`: a folder on this machine, or the hub, streamed.

What `Dataset.save_to_disk` wrote is read by row number; Parquet files and hub data sets are streamed, nothing is copied
or cached. Corrupt files of a folder are left out up to a limit (`vlmscope.data.tables`). Streams are split with
`split_dataset_by_node`: whole files to each consumer when they come out even, else every n-th row. Pictures stay
undecoded.
"""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.core.records import Exchange, derive
from vlmscope.data.config import SourceConfig
from vlmscope.data.samples import (
    CONVERSATIONS,
    Indexed,
    Mark,
    RawSample,
    Row,
    Share,
    Source,
    exchanges_of,
    file_bytes,
    words,
)

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


Parser = Callable[[Mapping[str, Any], str], RawSample]  # (row, origin) -> sample


def columns_of(config: SourceConfig) -> list[str]:
    """The columns that a source reads."""
    if config.kind == "hf_text":
        return [config.text]
    if config.kind == "hf_cauldron":
        return [column for column in (config.images, config.texts) if column is not None]
    return [config.image, config.caption or config.label]


def parser(config: SourceConfig, names: Sequence[str] | None = None) -> Parser:
    """What makes a sample of a row; it raises a `UserError` with the row's origin when the row cannot be used.

    Args:
        config: the source.
        names: class names, when the label column holds their numbers.
    """
    if config.kind == "hf_text":
        return lambda row, origin: RawSample(text=words(row[config.text], f"{origin}: {config.text}"), origin=origin)
    if config.kind == "hf_cauldron":
        return lambda row, origin: _cauldron(config, row, origin)
    return lambda row, origin: _image_label(config, names, row, origin)


def _cauldron(config: SourceConfig, row: Mapping[str, Any], origin: str) -> RawSample:
    pictures = (row[config.images] or []) if config.images is not None else []
    if not isinstance(pictures, list):
        pictures = [pictures]
    exchanges = exchanges_of(row[config.texts], len(pictures), f"{origin}: {config.texts}")
    return RawSample(tuple(picture_bytes(one, origin, config.path) for one in pictures), exchanges, origin=origin)


def _image_label(config: SourceConfig, names: Sequence[str] | None, row: Mapping[str, Any], origin: str) -> RawSample:
    picture = picture_bytes(row[config.image], origin, config.path)
    if config.caption is not None:
        caption = words(row[config.caption], f"{origin}: {config.caption}")
    else:
        template = config.templates[derive(0, "template", origin) % len(config.templates)]
        caption = template.replace("{label}", label_name(row[config.label], names, f"{origin}: {config.label}"))
    return RawSample((picture,), (Exchange(config.request, caption),), origin=origin)


def label_name(label: Any, names: Sequence[str] | None, what: str) -> str:
    """A class by name; of WordNet's synonyms ("tench, Tinca tinca") the first.

    Raises:
        UserError: there is no such class, or a number without names.
    """
    if isinstance(label, str):
        return words(label, what).split(",")[0].strip()
    if names is None:
        raise UserError(f"{what} is {label}, and the data do not name their classes; store a ClassLabel or names")
    if label is None or not 0 <= label < len(names):
        raise UserError(f"{what} is {label}: there is no such class among {len(names)}")
    return str(names[label]).split(",")[0].strip()


def picture_bytes(picture: Any, origin: str, folder: str | None = None) -> bytes:
    """The file of a picture as `datasets` stores it, or its path, which is relative to the data's `folder`.

    Raises:
        UserError: there is none.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str) and picture:
        return file_bytes(Path(folder or ".") / picture, origin)
    if isinstance(picture, bytes) and picture:
        return picture
    raise UserError(f"{origin}: it has no picture")


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


def _told(what: str, call: Any, mend: str = "check it, or write it again") -> Any:
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
