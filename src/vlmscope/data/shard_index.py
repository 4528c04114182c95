"""The index of a folder of shards, and which of its files are damaged. Nothing heavy is imported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from vlmscope.core.artifacts import read_json
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
