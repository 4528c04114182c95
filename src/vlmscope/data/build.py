"""All sources of a mix written as shards: by several processes, each sample once, and going on after a kill.

The builder alone writes the index and alone knows which samples are there already; processes ask it (`build_part`). A
chunk counts when it is in the index, so whatever a kill leaves behind is written again.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import atomic_path, read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.data.build_part import TRAIN, VAL, Chunk, PartJob
from vlmscope.data.build_pool import run_jobs
from vlmscope.data.raw import DIGEST_BYTES
from vlmscope.data.shards import INDEX, open_index
from vlmscope.data.share import Share
from vlmscope.data.source_config import SourceConfig
from vlmscope.data.sources import fingerprint, open_source

VERSION = 1  # raise when the layout of shards or index changes: old folders are then refused
PROBES = 32  # samples from which the mean size is taken


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """How a mix is written: into what, in how many parts a source, with how many rows a shard."""

    folder: Path
    shard_size: int = 1000
    parts: int = 4
    val_share: float = 0.05
    max_bad_shards: int = 0


class Builder:
    """The index of a build and the digests of all samples in it."""

    def __init__(self, sources: Mapping[str, SourceConfig], settings: BuildSettings) -> None:
        """Open the folder; chunks whose files are not whole are forgotten, with those after them.

        Raises:
            UserError: the folder holds shards of other sources or settings.
        """
        self.sources, self.settings = dict(sources), settings
        meta = {
            "dataset": "mix", "version": VERSION, "sources": fingerprint(self.sources), "parts": settings.parts,
            "shard_size": settings.shard_size, "val_share": settings.val_share,
        }  # fmt: skip
        self.index = open_index(settings.folder, meta)
        self.parts: dict[str, dict[str, Any]] = self.index.setdefault("parts", {})
        self.seen: set[bytes] = set()
        for key, part in self.parts.items():
            self._check(key, part)

    def jobs(self) -> list[PartJob]:
        """What is still to be done."""
        found = []
        for name, config in self.sources.items():
            passes = (
                [(config.split, None)] if config.val_split is None else [(config.split, TRAIN), (config.val_split, VAL)]
            )
            for (split, role), index in ((one, n) for one in passes for n in range(self.settings.parts)):
                job = PartJob(
                    name, config, split, role, Share(index, self.settings.parts), self.settings.folder,
                    self.settings.shard_size, self.settings.val_share, self.settings.max_bad_shards,
                )  # fmt: skip
                part = self.parts.setdefault(job.key, {"done": False, "chunks": []})
                if not part["done"]:
                    chunks = part["chunks"]
                    mark = chunks[-1]["stop"] if chunks else None
                    found.append(dataclasses.replace(job, mark=mark, chunk=len(chunks)))
        return found

    def claim(self, digests: list[bytes]) -> list[bool]:
        """Which samples are new; they are not, from now on."""
        new = []
        for digest in digests:
            new.append(digest not in self.seen)
            self.seen.add(digest)
        return new

    def enter(self, key: str, chunk: Chunk) -> None:
        """Note a chunk whose shards are on the disk."""
        chunks = self.parts[key]["chunks"]
        with atomic_path(self._digests(key, len(chunks))) as temporary:
            temporary.write_bytes(chunk.digests)
        counts = {name: getattr(chunk, name) for name in ("start", "stop", "rows", "duplicates", "unusable")}
        chunks.append(counts | {"shards": list(chunk.shards)})
        self.index["shards"] |= chunk.shards
        self._save()

    def finish(self, key: str) -> None:
        """Note that a part has been gone through."""
        self.parts[key]["done"] = True
        self._save()

    def total(self, count: str) -> int:
        """The sum of a count ("rows", "duplicates", "unusable") over all chunks."""
        return sum(chunk[count] for part in self.parts.values() for chunk in part["chunks"])

    def _save(self) -> None:
        self.index["duplicates"], self.index["unusable"] = self.total("duplicates"), self.total("unusable")
        write_json(self.settings.folder / INDEX, self.index, indent=None)

    def _digests(self, key: str, number: int) -> Path:
        return self.settings.folder / "digests" / f"{key}-{number:05d}.bin"

    def _check(self, key: str, part: dict[str, Any]) -> None:
        for number, chunk in enumerate(part["chunks"]):
            digests = self._digests(key, number)
            if not digests.is_file() or not all(self._is_whole(name) for name in chunk["shards"]):
                for late in part["chunks"][number:]:
                    for name in late["shards"]:
                        self.index["shards"].pop(name, None)
                part["chunks"], part["done"] = part["chunks"][:number], False
                return
            data = digests.read_bytes()
            self.seen.update(data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES))

    def _is_whole(self, name: str) -> bool:
        path = self.settings.folder / name
        return path.is_file() and path.stat().st_size == self.index["shards"][name]["bytes"]


def build_mix(
    sources: Mapping[str, SourceConfig],
    settings: BuildSettings,
    processes: int = 1,
    on_rows: Callable[[int], None] = lambda _rows: None,
) -> dict[str, float]:
    """Write what `settings.folder` still lacks.

    Args:
        sources: the mix; weights do not matter here.
        settings: how it is written.
        processes: how many work at the same time; 1 works in this one.
        on_rows: told the rows of each chunk done, for a progress bar.

    Returns:
        `data/shards`, `data/samples`, `data/bytes`, `data/rows`, `data/duplicates`, `data/unusable`, and
        `data/shards_written` by this call.

    Raises:
        UserError: a source or the folder is wrong, or the disk too small; chunks done before stay.
    """
    if settings.shard_size < 1 or settings.parts < 1 or processes < 1:
        raise UserError("task.shard_size, task.parts and task.workers must be at least 1; correct them")
    builder = Builder(sources, settings)
    jobs = builder.jobs()
    check_disk(jobs, settings.folder, sum(one["bytes"] for one in builder.index["shards"].values()))
    written = 0

    def enter(key: str, chunk: Chunk) -> None:
        nonlocal written
        builder.enter(key, chunk)
        written += len(chunk.shards)
        on_rows(chunk.rows)

    run_jobs(jobs, processes, builder.claim, enter, builder.finish)
    shards = builder.index["shards"].values()
    figures = {
        "shards": len(shards), "samples": sum(one["samples"] for one in shards),
        "bytes": sum(one["bytes"] for one in shards), "shards_written": written,
    }  # fmt: skip
    figures |= {count: builder.total(count) for count in ("rows", "duplicates", "unusable")}
    return {f"data/{name}": float(value) for name, value in figures.items()}


def check_disk(jobs: list[PartJob], folder: Path, there: int) -> None:
    """Refuse a build that does not fit the disk, by the mean size of each source's first samples.

    A source that does not know its size counts as nothing.

    Raises:
        UserError: with the estimate and the free space.
    """
    need = 0.0
    for job in {(job.name, job.split): job for job in jobs}.values():
        source = open_source(job.name, job.config, job.split, job.max_bad_shards)
        count = source.size()
        if count is not None:
            need += count * _mean_size(source)
    parent = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(parent).free
    if need - there > free:
        raise UserError(
            f"the shards need about {(need - there) / 1e9:.3g} GB, {parent} has {free / 1e9:.3g} GB free; choose "
            "another folder with data.path=, or set data.sources.NAME.limit"
        )


def _mean_size(source: Any) -> float:
    sizes = []
    for row in islice(source.open(Share()), PROBES):
        try:
            sizes.append(row().nbytes())
        except UserError:
            continue  # counted when it is built
    return sum(sizes) / max(1, len(sizes))


def processes_for(workers: int | None) -> int:
    """How many processes to use: as asked for, else one a core, four at most."""
    return workers if workers is not None else min(4, os.cpu_count() or 1)


def known_rows(folder: Path) -> int:
    """How many rows the index of a folder says are done; 0 without one."""
    if not (folder / INDEX).is_file():
        return 0
    parts = read_json(folder / INDEX).get("parts", {})
    return sum(chunk["rows"] for part in parts.values() for chunk in part["chunks"])
