"""WebDataset shards with an index: always the same bytes, and a kill never leaves a half-written shard in use.

A shard is filled under a temporary name, flushed, renamed, and only then entered in `index.json` (itself replaced
atomically). Which samples a shard holds depends only on its number, so a build that was cut short goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlmscope.core.artifacts import atomic_path, read_json, write_json
from vlmscope.core.errors import UserError

INDEX = "index.json"


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """What `task=build_data` wrote about its shards.

    Args:
        folder: of the shards.
        key: of the configuration, by which the folder was named.

    Raises:
        UserError: there is no index, or it is none of ours.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"no {INDEX} in {folder}: run python run.py task=build_data first, or correct {key}")
    index = read_json(folder / INDEX)
    shards = index.get("shards") if isinstance(index, dict) and isinstance(index.get("meta"), dict) else None
    if not isinstance(shards, dict) or not all(_is_entry(name, entry) for name, entry in shards.items()):
        raise UserError(f"{folder / INDEX} is no index of shards; correct {key}, or build the folder again")
    return index


_ENTRY = {"split": str, "kind": str, "samples": int, "bytes": int, "sha256": str}


def _is_entry(name: str, entry: Any) -> bool:
    """Whether it describes a shard in the folder itself: an index of unknown origin must not name other files."""
    plain = PurePosixPath(name).name == name and name.endswith(".tar")
    return plain and isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in _ENTRY.items())


def damaged_shards(folder: Path, entries: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The names of the shards that are missing, or whose size or SHA-256 is not the index's.

    Everything is read: about 0.5 GB a second and core, with a bar when it takes long.

    Args:
        folder: of the shards.
        entries: of the index, by name.
    """
    with ThreadPoolExecutor(4) as threads:  # hashing and reading release the lock
        sound = threads.map(lambda name: _is_sound(folder / name, entries[name]), entries)
        checked = tqdm(zip(entries, sound, strict=True), "checking shards", len(entries), unit="shard", delay=2.0)
        return {name for name, is_sound in checked if not is_sound}


def _is_sound(path: Path, entry: Mapping[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its file name and the samples [start, stop) of a (split, kind) stream."""

    name: str
    split: str
    kind: str
    start: int
    stop: int


def plan_shards(counts: dict[str, dict[str, int]], shard_size: int) -> list[ShardPlan]:
    """Cut `counts[split][kind]` samples into shards of at most `shard_size`, named so that sorting keeps their
    order.
    """
    plans = []
    for split, kinds in counts.items():
        for kind, count in kinds.items():
            for number, start in enumerate(range(0, count, shard_size)):
                stop = min(start + shard_size, count)
                plans.append(ShardPlan(f"{split}-{kind}-{number:04d}.tar", split, kind, start, stop))
    return plans


def write_shards(
    folder: Path,
    plans: list[ShardPlan],
    make_sample: Callable[[str, str, int], dict[str, Any]],
    meta: dict[str, Any],
    on_shard: Callable[[ShardPlan], None] = lambda _plan: None,
) -> int:
    """Write the shards that `folder` still lacks, and those that are damaged; return how many were written.

    Args:
        folder: where shards and index live.
        plans: all shards of the dataset.
        make_sample: (split, kind, index) -> WebDataset sample with `__key__` and bytes by extension.
        meta: what the data depend on (seed, version, licence ...), stored in the index.
        on_shard: called after each shard, for a progress bar.

    Raises:
        UserError: the folder holds shards of another `meta`, or cannot be written.
    """
    index = open_index(folder, meta)
    damaged = damaged_shards(folder, index["shards"])
    written = 0
    for plan in plans:
        if plan.name not in index["shards"] or plan.name in damaged:
            index["shards"][plan.name] = _write_shard(folder / plan.name, plan, make_sample)
            write_json(folder / INDEX, index)
            written += 1
        on_shard(plan)
    return written


def open_index(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder, or a new one.

    Raises:
        UserError: it describes data of another `meta`.
    """
    if not (folder / INDEX).is_file():
        return {"meta": meta, "shards": {}}
    index = read_index(folder, "data.path")
    if index["meta"] != json.loads(json.dumps(meta)):
        raise UserError(
            f"{folder / INDEX} describes other data than asked for: choose another folder or remove this one"
        )
    return index


def _write_shard(path: Path, plan: ShardPlan, make_sample: Callable[[str, str, int], dict[str, Any]]) -> dict[str, Any]:
    import webdataset as wds  # it imports torch, and reading an index needs neither

    with atomic_path(path) as temporary, wds.TarWriter(str(temporary), mtime=0) as writer:  # pyright: ignore[reportAttributeAccessIssue]
        for i in range(plan.start, plan.stop):
            writer.write(make_sample(plan.split, plan.kind, i))
    data = path.read_bytes()
    return {
        "split": plan.split,
        "kind": plan.kind,
        "samples": plan.stop - plan.start,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def shard_files(folder: Path, split: str, kind: str) -> list[Path]:
    """The finished shards of a (split, kind), in order.

    Raises:
        UserError: there is no index, or it lists none for this split and kind, or a listed file is missing or damaged.
    """
    entries = read_index(folder, "data.path")["shards"]
    names = sorted(n for n, e in entries.items() if e["split"] == split and e["kind"] == kind)
    if not names:
        raise UserError(f"{folder} has no shards of split {split!r}, kind {kind!r}: run task=build_data with them")
    damaged = damaged_shards(folder, {name: entries[name] for name in names})
    for name in sorted(damaged):
        what = "damaged" if (folder / name).is_file() else "in the index but missing"
        raise UserError(f"shard {folder / name} is {what}: run task=build_data again, which mends it")
    return [folder / n for n in names]


def read_samples(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the raw samples (`__key__`, bytes by extension) of shards in order.

    Members are read one after another and never unpacked. WebDataset's own reader would pass over links, and unpack
    compressed or sparse files, whose content may be thousands of times larger than the shard.

    Raises:
        ValueError, tarfile.TarError, OSError: a shard is corrupt, or holds what no build writes: members that
            are no plain files, whose names lead elsewhere, or that are larger than the shard.
    """
    for path in files:
        size, sample = path.stat().st_size, {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key, _, extension = member.name.rpartition("/")[2].partition(".")
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError(f"its member {member.name!r} leaves the shard")
                if not member.isreg() or member.issparse():
                    raise ValueError(f"its member {member.name!r} is no plain file")
                if not 0 <= member.size <= size:
                    raise ValueError(f"its member {member.name!r} claims {member.size:,} bytes")
                if not key or not extension:
                    raise ValueError(f"its member {member.name!r} has no ending, or nothing before it")
                key = str(name.parent / key)
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                if extension in sample:
                    raise ValueError(f"its member {member.name!r} is there twice")
                content = tar.extractfile(member)
                assert content is not None, "it is a plain file"
                sample |= {"__key__": key, extension: content.read()}
        if sample:
            yield sample


def encode_png(image: Any) -> bytes:
    """PNG bytes of a uint8 [H, W, 3] array."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()
