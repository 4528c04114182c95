"""WebDataset shards with an index: byte-identical when rebuilt, and never in use half-written after a kill.

A shard is written under a temporary name, flushed, renamed, and only then entered in `index.json` (itself replaced
atomically). A consumer reads one stretch of the rows, counted over all shards in the order of their names, and opens
only the shards that contain it.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, islice
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlmscope.core.artifacts import atomic_path, read_json
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.core.launch import program
from vlmscope.data.config import SourceConfig
from vlmscope.data.samples import WHOLE, BadFiles, Mark, RawSample, Reader, Row, Share, Source

INDEX = "index.json"
_ENTRY = {"split": str, "kind": str, "samples": int, "bytes": int, "sha256": str}


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """Read and check the index that `task=build_data` wrote; messages name the configuration's `key` of the folder."""
    if not (folder / INDEX).is_file():
        raise UserError(f"no {INDEX} in {folder}: run {program()} task=build_data first, or correct {key}")
    index = read_json(folder / INDEX)
    shards = index.get("shards") if isinstance(index, dict) and isinstance(index.get("meta"), dict) else None
    if not isinstance(shards, dict) or not all(_is_entry(name, entry) for name, entry in shards.items()):
        raise UserError(f"{folder / INDEX} is not an index of shards; correct {key}, or build the folder again")
    return index


def _is_entry(name: str, entry: Any) -> bool:
    """Whether it describes a shard in the folder itself: an untrusted index must not name files elsewhere."""
    plain = PurePosixPath(name).name == name and name.endswith(".tar")
    return plain and isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in _ENTRY.items())


def open_index(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder, or a new one; raise `UserError` if it was built with another `meta`."""
    if not (folder / INDEX).is_file():
        return {"meta": meta, "shards": {}}
    index = read_index(folder, "data.path")
    if index["meta"] != json.loads(json.dumps(meta)):  # through JSON, which turns tuples into lists
        raise UserError(
            f"{folder / INDEX} describes other data than asked for: choose another folder or remove this one"
        )
    return index


def damaged_shards(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names of the shards that are missing, or whose size or SHA-256 differs from the index.

    All shards are read, at about 0.5 GB per second and core, with a progress bar when it takes long.
    """

    def is_sound(name: str) -> bool:
        path, entry = folder / name, entries[name]
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]

    with ThreadPoolExecutor(4) as threads:  # hashing and reading release the GIL
        sound = threads.map(is_sound, entries)
        checked = tqdm(zip(entries, sound, strict=True), "checking shards", len(entries), unit="shard", delay=2.0)
        return {name for name, whole in checked if not whole}


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Write WebDataset samples atomically as one file; return `samples`, `bytes` and `sha256` for the index."""
    import webdataset as wds  # it imports torch, and reading an index needs neither

    count = 0
    # A fixed modification time makes rebuilt shards byte-identical.
    with atomic_path(path) as temporary, wds.TarWriter(str(temporary), mtime=0) as writer:  # pyright: ignore[reportAttributeAccessIssue]
        for sample in samples:
            writer.write(sample)
            count += 1
    data = path.read_bytes()
    return {"samples": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def shard_files(folder: Path, split: str, kind: str) -> list[Path]:
    """The shards of a (split, kind), in order; raise `UserError` if there are none, or any is missing or damaged."""
    entries = read_index(folder, "data.path")["shards"]
    names = sorted(n for n, e in entries.items() if e["split"] == split and e["kind"] == kind)
    if not names:
        raise UserError(f"{folder} has no shards of split {split!r}, kind {kind!r}: run task=build_data with them")
    for name in sorted(damaged_shards(folder, {name: entries[name] for name in names})):
        what = "damaged" if (folder / name).is_file() else "in the index but missing"
        raise UserError(f"shard {folder / name} is {what}: run task=build_data again, which mends it")
    return [folder / name for name in names]


def read_samples(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the raw samples (`__key__`, bytes by extension) of shards in order.

    WebDataset's own reader would skip links and expand compressed or sparse files, whose content may be thousands of
    times larger than the shard; here members are read in order and refused if no build would write them.

    Raises:
        ValueError, tarfile.TarError, OSError: a shard is corrupt, or a member is not a plain file, has a path outside
            the shard, or claims more bytes than the shard has.
    """
    for path in files:
        size, sample = path.stat().st_size, {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                stem, _, extension = member.name.rpartition("/")[2].partition(".")
                key = str(name.parent / stem)
                for refused, reason in (
                    (name.is_absolute() or ".." in name.parts, "leaves the shard"),
                    (not member.isreg() or member.issparse(), "is no plain file"),
                    (not 0 <= member.size <= size, f"claims {member.size:,} bytes"),
                    (not stem or not extension, "has no ending, or nothing before it"),
                    (sample.get("__key__") == key and extension in sample, "is there twice"),
                ):
                    if refused:
                        raise ValueError(f"its member {member.name!r} {reason}")
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                content = tar.extractfile(member)
                assert content is not None, "it is a plain file"
                sample |= {"__key__": key, extension: content.read()}
        if sample:
            yield sample


def shard_source(
    name: str, config: SourceConfig, split: str, max_bad: int, parse_scene: Callable[[dict[str, Any]], RawSample]
) -> Source:
    """The samples of one stream and split that `task=build_data` wrote; a pass may skip `max_bad` corrupt shards.

    `parse_scene` converts the samples of Orrery's own shards, which hold scenes with all their questions.
    """
    folder, stream = Path(str(config.path)), config.stream or name
    index = read_index(folder, f"data.sources.{name}.path")
    entries = dict(sorted(index["shards"].items()))
    sizes = {
        file: entry["samples"]
        for file, entry in entries.items()
        if (entry["kind"], entry["split"]) == (stream, split) and entry["samples"]
    }
    if not sizes:
        streams = sorted({f"{entry['kind']} ({entry['split']})" for entry in entries.values()})
        raise UserError(
            f"data.sources.{name}: {folder} has no samples of stream {stream!r}, split {split!r}; it has "
            f"{', '.join(streams) or 'none'}"
        )
    parse = parse_scene if index["meta"].get("dataset") == "orrery" else RawSample.from_shard
    shards = [(folder / file, entries[file]["bytes"]) for file in sizes]
    ends = list(accumulate(sizes.values()))
    size = min(ends[-1], config.limit or ends[-1])

    def open_share(share: Share, mark: Mark = None) -> Reader:
        bad = BadFiles(name, max_bad, "run task=build_data again, which mends it", (mark or {}).get("bad", 0))
        stretch = share.stretch(size)
        return _ShardReader(shards, ends, parse, bad, (mark or {}).get("row", stretch.start), stretch.stop)

    return Source(name, size, open_share, lambda row: next(open_share(WHOLE, {"row": row}))())


class _ShardReader(Reader):
    """Pass over a stretch of rows; its mark is the row, counted through corrupt shards too, and the bad shards."""

    def __init__(
        self,
        shards: list[tuple[Path, int]],
        ends: list[int],
        parse: Callable[[dict[str, Any]], RawSample],
        bad: BadFiles,
        row: int,
        stop: int,
    ) -> None:
        """`shards` are (path, size in bytes), `ends` the cumulative row counts at which they end."""
        super().__init__(row)
        self.shards, self.ends, self.parse, self.bad, self.stop = shards, ends, parse, bad, stop
        self.samples: Iterator[RawSample] | None = None  # of the open shard, from the next row on

    def __next__(self) -> Row:
        while self.row < self.stop:
            number = bisect_right(self.ends, self.row)
            (file, size), start = self.shards[number], self.ends[number - 1] if number else 0
            try:
                if self.samples is None or self.row == start:
                    if (actual := file.stat().st_size) != size:
                        raise ValueError(f"it has {actual:,} bytes, the index says {size:,}")
                    self.samples = map(self.parse, islice(read_samples([file]), self.row - start, None))
                sample = next(self.samples, None)
                if sample is None:
                    raise ValueError("it ends too early")
            except Exception as error:  # a corrupt tar fails as tar, as JSON, in its names or in its sample count
                if is_out_of_memory(error):
                    raise
                self.bad.add(file, error)
                self.row, self.samples = self.ends[number], None
                continue
            self.row += 1
            return lambda: sample
        raise StopIteration

    @property
    def bad_shards(self) -> int:
        return len(self.bad)

    def mark(self) -> Mark:
        return {"row": self.row, "bad": self.bad_shards}
