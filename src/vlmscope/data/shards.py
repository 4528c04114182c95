"""WebDataset shards with an index: byte-identical when rebuilt, and never in use half-written after a kill.

A shard is written under a temporary name, flushed, renamed, and only then entered in `index.json` (itself replaced
atomically). Its SHA-256 there is compared before it is read.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlmscope.core.artifacts import atomic_path, read_json
from vlmscope.core.errors import UserError
from vlmscope.core.launch import program
from vlmscope.data.config import SourceConfig
from vlmscope.data.samples import RawSample, Source, indexed

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
    """Yield the raw samples (`__key__`, bytes by extension) of shards whose content has been checked, in order."""
    for path in files:
        sample: dict[str, Any] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None, f"{member.name} of {path} is no plain file"
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample |= {"__key__": key, extension: content.read()}
        if sample:
            yield sample


def shard_source(name: str, config: SourceConfig, split: str, parse: Callable[[dict[str, Any]], RawSample]) -> Source:
    """The scenes of one kind and split that `task=build_data` wrote; `parse` converts the samples of a shard.

    They are read into memory, compressed, at the first access to one.
    """
    folder, stream = Path(str(config.path)), config.stream or name
    index = read_index(folder, f"data.sources.{name}.path")
    entries = index["shards"].values()
    size = sum(entry["samples"] for entry in entries if (entry["kind"], entry["split"]) == (stream, split))
    if not size:
        streams = sorted({f"{entry['kind']} ({entry['split']})" for entry in entries})
        raise UserError(
            f"data.sources.{name}: {folder} has no samples of stream {stream!r}, split {split!r}; it has "
            f"{', '.join(streams) or 'none'}"
        )

    @cache
    def stored() -> list[dict[str, Any]]:
        return list(read_samples(shard_files(folder, split, stream)))

    return indexed(name, min(size, config.limit or size), lambda row: parse(stored()[row]))
