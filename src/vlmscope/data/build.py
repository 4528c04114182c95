"""Write all sources of a mix as shards: in several processes, without duplicates, resumable after a kill.

Each source is cut into parts, each part into chunks of `shard_size` rows. Other processes read the parts; only this
process removes duplicates, writes the training and validation tars of a chunk, and then the index. A chunk counts once
it is in the index, so whatever a kill leaves behind is written again; so are a part's chunks from a damaged one on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from vlmscope.core.artifacts import atomic_path, folder_digest, refuse_other, write_json
from vlmscope.core.errors import UserError
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import fingerprint, open_source
from vlmscope.data.samples import DIGEST_BYTES, Mark, Share, held_out
from vlmscope.data.shards import INDEX, damaged_shards, open_index, write_tar

TRAIN, VAL = "train", "val"
VERSION = 1  # raise when the layout of shards or index changes: old folders are then refused


@dataclass(frozen=True)
class BuildSettings:
    """Layout of the shards: folder, rows per shard, parts per source, share held out for validation."""

    folder: Path
    shard_size: int = 1000
    parts: int = 4
    val_share: float = 0.05


@dataclass(frozen=True)
class Part:
    """The rows of a source that one process reads, and the row at which it starts."""

    settings: BuildSettings
    name: str
    config: SourceConfig
    split: str  # of the source
    role: str | None  # split of the shards; None holds out `val_share` of the samples
    share: Share
    mark: Mark = None  # the reader's position before the first chunk to read
    chunk: int = 0  # number of that chunk

    @property
    def key(self) -> str:
        """Name of the part in the index and in file names."""
        return f"{self.name}-{self.role or 'all'}-{self.share.index:03d}"


class Chunk(NamedTuple):
    """Consecutive rows of a part, with the reader's mark after them."""

    stop: Mark
    rows: int
    samples: list[tuple[bytes, str, dict[str, Any]]]  # of usable rows: digest, split, WebDataset sample


def chunks_of(part: Part) -> Iterator[Chunk]:
    """Read a part chunk by chunk; raise `UserError` when no row of a chunk can be used."""
    reader = open_source(part.name, part.config, part.split).open(part.share, part.mark)
    number = part.chunk
    while rows := list(islice(reader, part.settings.shard_size)):
        samples, error = [], None
        for position, row in enumerate(rows):
            try:
                sample = row()
                split = part.role or (VAL if held_out(sample, part.settings.val_share) else TRAIN)
                samples.append((sample.digest(), split, sample.to_shard(f"{part.key}-{number:05d}-{position:05d}")))
            except UserError as unusable:
                error = unusable
        if error is not None and not samples:
            raise UserError(f"none of {len(rows)} rows of data.sources.{part.name} can be used; the last: {error}")
        yield Chunk(reader.mark(), len(rows), samples)
        number += 1


class _Parts(IterableDataset):
    """The chunks of the parts, each part followed by None; worker w of n reads every n-th part from w on."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[tuple[Part, Chunk | None] | UserError]:
        worker = get_worker_info()
        try:
            for part in self.parts if worker is None else self.parts[worker.id :: worker.num_workers]:
                for chunk in chunks_of(part):
                    yield part, chunk
                yield part, None
        except UserError as error:  # as a value: the loader adds the worker's traceback to what is raised
            yield error


def read_parts(parts: list[Part], processes: int) -> Iterator[tuple[Part, Chunk | None]]:
    """Yield the chunks of all parts, each part followed by None, read in `processes` processes."""
    workers = min(processes, len(parts)) if processes > 1 else 0
    # A fork would break the threads that `datasets` and pyarrow keep. A separate generator, since a loader without one
    # draws its base seed from torch's global stream.
    options: Any = {"multiprocessing_context": "spawn", "prefetch_factor": 1} if workers else {}
    loader = DataLoader(
        _Parts(parts), None, num_workers=workers, collate_fn=_identity, generator=torch.Generator(), **options
    )
    try:
        for item in loader:
            if isinstance(item, UserError):
                raise item
            yield item
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise UserError(
            "a process that read the data was ended from outside (out of memory?); run the same again, with fewer "
            "task.workers"
        ) from error


def _identity(item: Any) -> Any:  # the default would turn values into tensors; a lambda cannot be pickled
    return item


class Builder:
    """The index of a build, and the digests of all samples in it by which duplicates are recognised."""

    def __init__(self, sources: Mapping[str, SourceConfig], settings: BuildSettings) -> None:
        """Open the folder and forget damaged chunks; refuse a folder of other sources, files or settings."""
        self.sources, self.settings = dict(sources), settings
        meta = {
            "dataset": "mix", "version": VERSION, "sources": fingerprint(self.sources), "parts": settings.parts,
            "shard_size": settings.shard_size, "val_share": settings.val_share,
        }  # fmt: skip
        self.index = open_index(settings.folder, meta)
        # A source may be deleted once its shards are written, so only those that exist are compared.
        paths = {name: source.path for name, source in self.sources.items() if source.path}
        files = {f"data.sources.{name}": folder_digest(path) for name, path in paths.items() if Path(path).exists()}
        recorded = self.index.setdefault("files", files)
        known = {name: recorded.get(name) for name in files}
        refuse_other(str(settings.folder / INDEX), known, files, "choose another data.path")
        self.parts: dict[str, dict[str, Any]] = self.index.setdefault("parts", {})
        self.seen: set[bytes] = set()
        sound = self.index["shards"].keys() - damaged_shards(settings.folder, self.index["shards"])
        for key, part in self.parts.items():
            chunks = part["chunks"]
            for number, chunk in enumerate(chunks):
                digests = self._read_digests(key, number, chunk)
                if digests is None or not sound.issuperset(chunk["shards"]):
                    for name in (name for lost in chunks[number:] for name in lost["shards"]):
                        self.index["shards"].pop(name, None)
                    part |= {"done": False, "chunks": chunks[:number]}
                    break
                self.seen |= digests

    def left(self) -> list[Part]:
        """The parts that are still to be read."""
        left = []
        for name, config in self.sources.items():
            separate = [(config.split, TRAIN), (config.val_split, VAL)]
            for split, role in [(config.split, None)] if config.val_split is None else separate:
                for index in range(self.settings.parts):
                    part = Part(self.settings, name, config, split, role, Share(index, self.settings.parts))
                    known = self.parts.setdefault(part.key, {"done": False, "chunks": []})
                    chunks = known["chunks"]
                    if not known["done"]:
                        left.append(replace(part, mark=chunks[-1]["stop"] if chunks else None, chunk=len(chunks)))
        return left

    def write(self, part: Part, chunk: Chunk) -> int:
        """Write the new samples of a chunk and enter it in the index; return the number of shards written."""
        chunks = self.parts[part.key]["chunks"]
        number, kept = len(chunks), []
        for sample in chunk.samples:
            if sample[0] not in self.seen:
                kept.append(sample)
                self.seen.add(sample[0])
        shards = {}
        for split in (TRAIN, VAL):
            if bodies := [body for _, sample_split, body in kept if sample_split == split]:
                name = f"{split}-{part.key}-{number:05d}.tar"
                entry = {"split": split, "kind": part.name}
                shards[name] = entry | write_tar(self.settings.folder / name, bodies)
        digests = b"".join(digest for digest, _, _ in kept)
        with atomic_path(self._digests(part.key, number)) as temporary:
            temporary.write_bytes(digests)
        record = {
            "stop": chunk.stop, "rows": chunk.rows,
            "duplicates": len(chunk.samples) - len(kept), "unusable": chunk.rows - len(chunk.samples),
            "shards": list(shards), "digests": hashlib.sha256(digests).hexdigest(),
        }  # fmt: skip
        chunks.append(record)
        self.index["shards"] |= shards  # after the files, so that a kill leaves no entry without its file
        self._save()
        return len(shards)

    def finish(self, part: Part) -> None:
        """Record that a part has been read completely."""
        self.parts[part.key]["done"] = True
        self._save()

    def total(self, count: str) -> int:
        """Sum of a count ("rows", "duplicates" or "unusable") over all chunks."""
        return sum(chunk[count] for part in self.parts.values() for chunk in part["chunks"])

    def _save(self) -> None:
        self.index["duplicates"], self.index["unusable"] = self.total("duplicates"), self.total("unusable")
        write_json(self.settings.folder / INDEX, self.index, indent=None)

    def _digests(self, key: str, number: int) -> Path:
        return self.settings.folder / "digests" / f"{key}-{number:05d}.bin"

    def _read_digests(self, key: str, number: int, chunk: dict[str, Any]) -> set[bytes] | None:
        """The digests of a chunk's samples; None when their file is missing or damaged."""
        path = self._digests(key, number)
        data = path.read_bytes() if path.is_file() else b""
        kept = chunk["rows"] - chunk["duplicates"] - chunk["unusable"]
        # Indexes of earlier versions hold no hash of the digests.
        if len(data) != kept * DIGEST_BYTES or chunk.get("digests", "") not in ("", hashlib.sha256(data).hexdigest()):
            return None
        return {data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES)}


def build_mix(sources: Mapping[str, SourceConfig], settings: BuildSettings, processes: int = 1) -> dict[str, float]:
    """Write the shards that `settings.folder` lacks; the sources' weights are not used.

    Returns `data/shards`, `data/samples`, `data/bytes`, `data/rows`, `data/duplicates`, `data/unusable`, and
    `data/shards_written` by this call. Chunks that were finished before an error stay.
    """
    if settings.shard_size < 1 or settings.parts < 1 or processes < 1:
        raise UserError("task.shard_size, task.parts and task.workers must be at least 1; correct them")
    builder = Builder(sources, settings)
    written = 0
    with tqdm(initial=builder.total("rows"), unit="row", desc="shards") as bar:
        for part, chunk in read_parts(builder.left(), processes):
            if chunk is None:
                builder.finish(part)
                continue
            written += builder.write(part, chunk)
            bar.update(chunk.rows)
    shards = builder.index["shards"].values()
    figures = {
        "shards": len(shards), "samples": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards), "shards_written": written,
    }  # fmt: skip
    figures |= {count: builder.total(count) for count in ("rows", "duplicates", "unusable")}
    return {f"data/{name}": float(value) for name, value in figures.items()}
