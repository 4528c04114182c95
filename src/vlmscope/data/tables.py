"""Data in tables and JSONL folders: Hugging Face `datasets`, local or streamed from the hub, and the user's own files.

    hf_text          {text}                                       SmolLM2-135M-10B
    hf_image_label   {image, label} or {image, caption}           ImageNet-1k, or pictures with captions
    hf_cauldron      {images: [...], texts: [{user, assistant}]}  the Cauldron, raw, and other layouts of conversations

These are the schemas of the paper's data (arXiv 2602.20330). A picture is {"bytes": ..., "path": ...}, as `datasets`
stores it undecoded. Output of `Dataset.save_to_disk` is read by row number; Parquet files and hub data sets are
streamed, and nothing is copied or cached. `split_dataset_by_node` splits streams: whole files per consumer if their
number is divisible, else every n-th row.

A damaged file ends a run in one line that names it: a Parquet file's footer is read at the start, its row groups when
they are reached.

A folder of the user's own data holds `train.jsonl`, optionally `val.jsonl`, and the pictures that they name: one JSON
object per line (layouts: `vlmscope.data.samples`), paths relative to the folder. The files are read once at the start,
to find mistakes before any long work and to record where each line begins; lines and pictures are then read on access.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from vlmscope.core import records
from vlmscope.core.artifacts import parse_json, read_json
from vlmscope.core.errors import UserError, first_line, is_out_of_memory
from vlmscope.core.hub import is_commit
from vlmscope.data import samples
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import check_image, open_image

MAX_ROW_BYTES = 2**30  # average per row group; the largest picture allowed takes a third of it, uncompressed
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
# File names of a split on the hub, whose name has no hyphen, and the split names that `load_dataset` recognises.
_HUB_FILE = re.compile(r"([\w.]+)-\d{5}-of-\d{5}")
_SPLITS = "train|training|validation|valid|val|dev|testing|test|evaluation|eval"
_TAKE_TURNS = "all_exhausted_without_replacement"  # until every table has ended, without repeating any
_LOG = logging.getLogger(__name__)

Parser = Callable[[Mapping[str, Any], str], samples.RawSample]  # (row, origin) -> sample


def hf_source(name: str, config: SourceConfig, split: str) -> samples.Source:
    """The samples of one split."""
    from datasets import IterableDataset, interleave_datasets

    tables = [_undecoded(_table(name, config, subset, split)) for subset in config.subsets or [None]]
    for table in tables:
        _check_columns(name, config, table)
    parse = row_parser(config, getattr((tables[0].features or {}).get(config.label), "names", None))
    streamed = isinstance(tables[0], IterableDataset)
    counts: list[int | None] = []
    for table in tables:
        splits = table.info.splits or {}
        known = splits[table.split].num_examples if table.split in splits else None
        counts.append(known if streamed else len(table))
    count = None if None in counts else sum(filter(None, counts))
    if count == 0:
        raise UserError(f"data.sources.{name}: {config.path or config.hub} is empty; give data with samples")
    table = tables[0] if len(tables) == 1 else interleave_datasets(tables, stopping_strategy=_TAKE_TURNS)
    size = min((number for number in (count, config.limit) if number is not None), default=None)
    if not streamed:
        return samples.indexed(name, size or 0, lambda row: parse(table[row], f"{name} row {row}"))
    columns = table.select_columns(columns_of(config))

    def open_share(share: samples.Share, mark: samples.Mark = None) -> samples.Reader:
        return _StreamReader(name, columns, parse, config.limit, share, mark)

    return samples.Source(name, size, open_share)


def columns_of(config: SourceConfig) -> list[str]:
    """Names of the columns that a source reads."""
    if config.kind == "hf_text":
        return [config.text]
    if config.kind == "hf_cauldron":
        return [column for column in (config.images, config.texts) if column is not None]
    return [config.image, config.caption or config.label]


def row_parser(config: SourceConfig, names: Sequence[str] | None = None) -> Parser:
    """Function from (row, origin) to a sample, which raises `UserError` with the origin for an unusable row.

    `names` are the class names, if the label column holds class numbers.
    """

    def text(row: Mapping[str, Any], origin: str) -> samples.RawSample:
        return samples.RawSample(text=samples.nonempty(row[config.text], f"{origin}: {config.text}"), origin=origin)

    def conversation(row: Mapping[str, Any], origin: str) -> samples.RawSample:
        stored = (row[config.images] or []) if config.images is not None else []
        stored = stored if isinstance(stored, list) else [stored]
        exchanges = samples.exchanges_of(row[config.texts], len(stored), f"{origin}: {config.texts}")
        return samples.RawSample(
            tuple(_picture(image, origin, config.path) for image in stored), exchanges, origin=origin
        )

    def picture(row: Mapping[str, Any], origin: str) -> samples.RawSample:
        image = _picture(row[config.image], origin, config.path)
        if config.caption is not None:
            caption = samples.nonempty(row[config.caption], f"{origin}: {config.caption}")
        else:
            # By the origin, so that a row has the same caption in every pass and on every rank.
            template = config.templates[records.derive(0, "template", origin) % len(config.templates)]
            caption = template.replace("{label}", _class_name(row[config.label], names, f"{origin}: {config.label}"))
        return samples.RawSample((image,), (records.Exchange(config.request, caption),), origin=origin)

    return {"hf_text": text, "hf_cauldron": conversation, "hf_image_label": picture}[config.kind]


def _class_name(label: Any, names: Sequence[str] | None, what: str) -> str:
    """Name of a class: the first of WordNet's synonyms ("tench, Tinca tinca")."""
    if not isinstance(label, str):
        if names is None:
            raise UserError(f"{what} is {label}, and the data do not name their classes; store a ClassLabel or names")
        if label is None or not 0 <= label < len(names):
            raise UserError(f"{what} is {label}: there is no such class among {len(names)}")
        label = str(names[label])
    return samples.nonempty(label, what).split(",")[0].strip()


def _picture(picture: Any, origin: str, folder: str | None) -> bytes:
    """The bytes of a picture that `datasets` stores undecoded or as a path, relative to the data's `folder`."""
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str) and picture:
        return samples.file_bytes(Path(folder or ".") / picture, origin)
    if isinstance(picture, bytes) and picture:
        return picture
    raise UserError(f"{origin}: it has no picture")


def _table(name: str, config: SourceConfig, subset: str | None, split: str) -> Any:
    if config.path is None:
        return _from_hub(name, config, subset, split)
    folder = Path(config.path) / subset if subset else Path(config.path)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}; data.sources.{name}.path must hold save_to_disk's output or Parquet files"
        )
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _saved(name, folder, split)
    return _parquet(name, folder, split)


def _from_hub(name: str, config: SourceConfig, subset: str | None, split: str) -> Any:
    from datasets import load_dataset
    from huggingface_hub import constants

    key, hub, revision = f"data.sources.{name}", str(config.hub), config.revision
    pin = f"{key}.revision=<commit, 40 hex digits> (its page lists them under Files, History)"
    if revision is None:
        _LOG.warning("%s: the revision of %s is not pinned: another run may be given other data; add %s", key, hub, pin)
    elif not is_commit(revision):
        raise UserError(
            f"{key}: the hub data set {hub} is requested at {revision!r}, which may change: add {pin}, or "
            f"{key}.path=/your/copy"
        )
    option = f" --revision {revision}" if revision is not None else ""
    mend = f"run `hf download {hub} --repo-type dataset{option} --local-dir DIR`, then {key}.path=DIR"
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{key}: HF_HUB_OFFLINE forbids to stream {hub} from the hub; where a network is, {mend}")
    with _in_one_line(f"{key}: cannot stream {hub} from the hub", mend):
        return load_dataset(hub, subset, split=split, revision=revision, streaming=True)


def _saved(name: str, folder: Path, split: str) -> Any:
    """Output of `save_to_disk`: the folder of one split, or a folder with one folder per split."""
    from datasets import load_from_disk

    part = folder
    with _in_one_line(f"cannot read {folder}"):
        if (folder / "dataset_dict.json").is_file():
            _check_split(name, folder, split, read_json(folder / "dataset_dict.json")["splits"])
            part = folder / split
        else:
            saved = read_json(folder / "state.json").get("_split")
            _check_split(name, folder, split, re.findall(r"^\w+", saved or "train"))  # such as "test[:10%]"
        if not read_json(part / "state.json")["_data_files"]:  # `load_from_disk` fails on a table without rows
            raise UserError(f"data.sources.{name}: {part} is empty; give data with samples")
        return load_from_disk(str(part))


def _parquet(name: str, folder: Path, split: str) -> Any:
    """Parquet files, streamed."""
    from datasets import load_dataset

    files = sorted(folder.rglob("*.parquet"))
    if not files:
        raise UserError(
            f"{folder} holds neither save_to_disk's output nor Parquet files; check data.sources.{name}.path"
        )
    chosen = _of_split(name, folder, files, split)
    for file in chosen:
        _check_groups(file)
    with _in_one_line(f"cannot read {folder}"):
        return load_dataset("parquet", data_files=list(map(str, chosen)), split="train", streaming=True)


def _check_groups(file: Path) -> None:
    """Refuse a Parquet file whose footer is damaged, or with a row group, which is read whole, that memory cannot hold.

    From the metadata, before anything is read.
    """
    from pyarrow.parquet import read_metadata

    with _in_one_line(f"{file} is corrupt", "copy it again"):
        metadata = read_metadata(file)
    for number in range(metadata.num_row_groups):
        size, rows = metadata.row_group(number).total_byte_size, metadata.row_group(number).num_rows
        if size > MAX_ROW_BYTES * rows:
            each = f"rows of {size // max(1, rows):,} bytes"
            raise UserError(f"{file} has {each} in its row group {number}, at most {MAX_ROW_BYTES:,}; leave it out")
        if size > MEMORY:
            raise UserError(f"{file}: its row group {number} takes {size:,} bytes, more than the machine's memory")


def _of_split(name: str, folder: Path, files: list[Path], split: str) -> list[Path]:
    """The files whose name or folder contains the split's name; each file belongs to one split at most.

    If no file names a split, all files belong to "train", as for `load_dataset`, or to the split that the folder is
    named after.
    """
    word = re.compile(rf"(?<![^\W\d_])({re.escape(split)}|{_SPLITS})(?![^\W\d_])")  # no letter before or after it

    def split_of(file: Path) -> str | None:
        if hub := _HUB_FILE.match(file.name):
            return hub[1]
        parts = (file.stem, *reversed(file.relative_to(folder).parent.parts))
        return next((match[1] for part in parts if (match := word.search(part))), None)

    splits = [split_of(file) for file in files]
    names = sorted({named for named in splits if named is not None})
    if len(names) == 1 and None not in splits and names[0] != split and not word.search(names[0]):
        names = []  # part-00000-of-00002: a prefix that all files share, not a split
    if not names and split not in ("train", folder.name):
        raise UserError(
            f"{folder} has no split {split!r}: its files name no split, so that all of them are 'train'; correct "
            f"split or val_split of data.sources.{name}"
        )
    if not names:
        return files
    _check_split(name, folder, split, names)
    return [file for file, named in zip(files, splits, strict=True) if named == split]


def _check_split(name: str, folder: Path, split: str, splits: list[str]) -> None:
    if split not in splits:
        choices = ", ".join(splits)
        raise UserError(
            f"{folder} has no split {split!r}; split (or val_split) of data.sources.{name} is one of {choices}"
        )


@contextmanager
def _in_one_line(what: str, mend: str = "check it, or write it again") -> Iterator[None]:
    """Turn any exception that `datasets`, the network or a file format raises into a one-line `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what} ({type(error).__name__}: {first_line(error)}); {mend}") from error


def _undecoded(table: Any) -> Any:
    """The table with pictures as file bytes."""
    from datasets import Image, List

    for column, feature in (table.features or {}).items():
        if isinstance(feature, Image):
            table = table.cast_column(column, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(column, List(Image(decode=False)))
    return table


def _check_columns(name: str, config: SourceConfig, table: Any) -> None:
    needed = columns_of(config)
    # Some streams have no schema, so their first row gives the columns.
    columns = list(table.features or next(iter(table), needed))
    missing = [column for column in needed if column not in columns]
    if missing:
        raise UserError(
            f"data.sources.{name}: no column {missing[0]!r}; the columns are {', '.join(columns)} (the keys of "
            f"{config.kind} that name columns, and images=null for none: docs/data.md)"
        )


class _StreamReader(samples.Reader):
    """Pass over a stream; its mark is `datasets`' state (file and row) and the rows read."""

    def __init__(
        self, name: str, table: Any, parse: Parser, limit: int | None, share: samples.Share, mark: samples.Mark
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        super().__init__(0 if mark is None else mark["done"])
        # A deep copy per pass, since tables hold the state of their iteration and shallow copies share it.
        self.table = copy.deepcopy(table)
        if share.total > 1:
            self.table = split_dataset_by_node(self.table, share.index, share.total)
        if mark is not None:
            self.table.load_state_dict(mark["state"])
        self.name, self.parse, self.rows = name, parse, iter(self.table)
        self.stop = None if limit is None else len(share.rows(limit))
        self.part = f" of part {share.index}" if share.total > 1 else ""

    def __next__(self) -> samples.Row:
        if self.row == self.stop:
            raise StopIteration
        row = None
        with _in_one_line(f"data.sources.{self.name}: reading its row {self.row} failed"):
            row = next(self.rows, None)
        if row is None:
            raise StopIteration
        self.row += 1
        return partial(self.parse, row, f"{self.name} row {self.row - 1}{self.part}")

    def mark(self) -> samples.Mark:
        return {"done": self.row, "state": self.table.state_dict()} if self.row else None


T = TypeVar("T")


class Line(NamedTuple):
    """Position of an example in its file."""

    offset: int  # in bytes
    number: int  # from 1
    n_images: int


class JsonLines(Sequence[records.Sample]):
    """The examples of one file, or a subset; the layout of all lines is checked at the start.

    With `check` so are pictures and characters; without it, bad ones raise `UserError` on access.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        self.path = path
        self.lines = list(self._checked(check))
        if not self.lines:
            raise UserError(f"{path} holds no example; write one JSON object a line (docs/bring_your_own.md)")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        """The example at `index` with its pictures opened, or a slice as a `JsonLines`."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        origin = self.origin(index)
        names, exchanges, text = samples.record_parts(self.record(index), origin)
        if not exchanges:
            return records.Document(text, origin)
        return records.Conversation(tuple(self._picture(open_image, name, origin) for name in names), exchanges, origin)

    def record(self, index: int) -> dict[str, Any]:
        """The JSON object of an example (layouts: `vlmscope.data.samples`)."""
        with self.path.open("rb") as file:
            file.seek(self.lines[index].offset)
            return _record(file.readline(), self.origin(index))

    def origin(self, index: int) -> str:
        """File and line of an example, for messages."""
        return f"{self.path} line {self.lines[index].number}"

    def subset(self, rows: Sequence[int]) -> JsonLines:
        """The examples of these rows, in this order."""
        part = JsonLines.__new__(JsonLines)  # not __init__, which reads the file
        part.path, part.lines = self.path, [self.lines[row] for row in rows]
        return part

    def contents(self) -> list[str]:
        """A key of each example by its words (`normalised`) and its pictures' bytes: equal for equal examples.

        Only pictures of one size in bytes, beside the same words, are read.
        """
        keys, names_of = [], []
        for row in range(len(self)):
            names, exchanges, text = samples.record_parts(self.record(row), self.origin(row))
            paths = [self.path.parent / name for name in names]
            names_of.append(paths)
            words = [records.normalised(words) for words in (text, *chain(*exchanges))]
            keys.append(json.dumps([words, [path.stat().st_size for path in paths]]))
        often = Counter(keys)
        for row, (key, paths) in enumerate(zip(keys, names_of, strict=True)):
            if paths and often[key] > 1:
                digests = [hashlib.sha256(samples.file_bytes(path, self.origin(row))).hexdigest() for path in paths]
                keys[row] = " ".join([key, *digests])
        return keys

    def _checked(self, check: bool) -> Iterator[Line]:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; check data.path") from error
        offset, seen = 0, set()
        with file, tqdm(desc=f"checking {self.path.name}", unit="line", delay=2.0) as bar:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    origin = f"{self.path} line {number}"
                    names, exchanges, text = samples.record_parts(_record(line, origin), origin)
                    if check:
                        for words in (text, *chain(*exchanges)):
                            records.check_characters(words, f"{origin}: {words[:30]!r}")
                        for name in set(names) - seen:
                            self._picture(check_image, name, origin)
                        seen.update(names)
                    yield Line(offset, number, len(names))
                offset += len(line)
                bar.update()

    def _picture(self, read: Callable[[Path], T], name: str, origin: str) -> T:
        """`read(path)` of a picture; its `UserError` names the line too."""
        try:
            return read(self.path.parent / name)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error


def _record(line: bytes, origin: str) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 text; save the file as UTF-8") from error


def folder_source(name: str, config: SourceConfig, split: str) -> samples.Source:
    """The examples of `<split>.jsonl` as a source, with those of their `facts` that are words or whole numbers."""
    path = Path(str(config.path)) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; data.sources.{name}.path: as docs/bring_your_own.md says")
    lines = JsonLines(path, check=False)

    def sample(row: int) -> samples.RawSample:
        record, origin = lines.record(row), lines.origin(row)
        names, exchanges, text = samples.record_parts(record, origin)
        pictures = tuple(samples.file_bytes(path.parent / image, origin) for image in names)
        facts = record.get("facts")
        facts = {k: v for k, v in facts.items() if isinstance(v, str | int)} if isinstance(facts, dict) else {}
        return samples.RawSample(pictures, exchanges, text, origin, facts)

    return samples.indexed(name, min(len(lines), config.limit or len(lines)), sample)


def load_folder(folder: str | Path, val_share: float, seed: int) -> tuple[JsonLines, JsonLines]:
    """Load the training and validation examples of a folder.

    Without `val.jsonl`, `val_share` of the training examples, at least one, is held out, chosen by `seed`; examples of
    equal content go together.
    """
    folder = Path(folder)
    if not (folder / "train.jsonl").is_file():
        raise UserError(f"no train.jsonl in {folder}; data.path must be a folder laid out as in docs/bring_your_own.md")
    train = JsonLines(folder / "train.jsonl")
    if (folder / "val.jsonl").is_file():
        return train, JsonLines(folder / "val.jsonl")
    held_out = max(1, round(val_share * len(train)))
    if held_out >= len(train):
        raise UserError(
            f"{train.path} holds {len(train)} examples, too few to hold {held_out} out for validation; "
            "give more, or a val.jsonl"
        )
    alike: dict[str, list[int]] = {}
    contents = train.contents()
    for row, content in enumerate(contents):
        alike.setdefault(content, []).append(row)
    val: set[int] = set()
    for row in records.generator(seed, "validation").permutation(len(train)).tolist():
        if len(val) < held_out:
            val.update(alike[contents[row]])
    if len(val) == len(train):
        raise UserError(f"{train.path}: its examples are all the same, so none can be held out; give a val.jsonl")
    return train.subset([row for row in range(len(train)) if row not in val]), train.subset(sorted(val))
