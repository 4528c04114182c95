"""One part of a source written as shards: what a process of `vlmscope.data.build` does, chunk after chunk.

A chunk is `shard_size` rows. Its digests go to the builder, which answers which of them are new; those are written, the
training and the validation samples into a tar each, and the builder enters the chunk in the index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import webdataset as wds

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError
from vlmscope.data.raw import RawSample, held_out
from vlmscope.data.readers import Mark, Row
from vlmscope.data.share import Share
from vlmscope.data.source_config import SourceConfig
from vlmscope.data.sources import open_source

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class PartJob:
    """Which rows a process goes through, and from where on.

    Attributes:
        name, config: the source.
        split: the split of the source that is read.
        role: the split of the shards: "train", "val", or None to hold `val_share` of the samples out.
        part: which part of how many.
        mark, chunk: where the part goes on: the reader's mark and the chunk's number.
        alone: write this chunk alone, since its files are damaged.
    """

    name: str
    config: SourceConfig
    split: str
    role: str | None
    part: Share
    folder: Path
    shard_size: int
    val_share: float
    max_bad_shards: int
    mark: Mark = None
    chunk: int = 0
    alone: bool = False

    @property
    def key(self) -> str:
        """Its name in the index and in file names."""
        return f"{self.name}-{self.role or 'all'}-{self.part.index:03d}"


@dataclass
class Chunk:
    """What became of a chunk: index entries of its shards, by file name, and counts.

    Attributes:
        start: the reader's mark before it.
        stop: the reader's mark after it.
        rows, duplicates, unusable: how many rows it had, and how many of them were left out.
        digests: of the samples written, joined.
    """

    start: Mark
    stop: Mark
    rows: int
    duplicates: int
    unusable: int
    digests: bytes
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)


Written = tuple[RawSample, bytes, dict[str, Any]]  # a sample, its digest, and what goes into the tar


def chunks_of(job: PartJob) -> Generator[list[bytes] | Chunk, list[bool] | None, None]:
    """Yield the digests of a chunk, be sent which are new, yield the `Chunk`; again until the part ends.

    Raises:
        UserError: the source cannot be read, too many shards are corrupt, or a chunk has no usable row.
    """
    source = open_source(job.name, job.config, job.split, job.max_bad_shards)
    reader, number = source.open(job.part, job.mark), job.chunk
    while True:
        start = reader.mark()
        rows = list(islice(reader, job.shard_size))
        if not rows and not job.alone:
            return
        samples = _usable(job, rows, number)
        new = yield [digest for _, digest, _ in samples]
        assert new is not None
        kept = [one for one, is_new in zip(samples, new, strict=True) if is_new]
        chunk = Chunk(
            start, reader.mark(), len(rows), len(samples) - len(kept), len(rows) - len(samples),
            b"".join(digest for _, digest, _ in kept),
        )  # fmt: skip
        for split in (TRAIN, VAL):
            mine = [body for sample, _, body in kept if _split(job, sample) == split]
            if mine:
                name = f"{split}-{job.key}-{number:05d}.tar"
                chunk.shards[name] = {"split": split, "kind": job.name} | write_tar(job.folder / name, mine)
        yield chunk
        if job.alone:
            return
        number += 1


def _usable(job: PartJob, rows: list[Row], number: int) -> list[Written]:
    found: list[Written] = []
    error: UserError | None = None
    for place, row in enumerate(rows):
        try:
            sample = row()
            key = f"{job.key}-{number:05d}-{place:05d}"
            found.append((sample, sample.digest(), sample.to_shard(key)))
        except UserError as wrong:
            error = wrong
    if error is not None and not found:
        raise UserError(f"none of {len(rows)} rows of data.sources.{job.name} can be used; the last: {error}")
    return found


def _split(job: PartJob, sample: RawSample) -> str:
    return job.role or (VAL if held_out(sample, job.val_share) else TRAIN)


def write_tar(path: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Write WebDataset samples in one atomic file.

    Returns:
        samples, bytes and sha256 for the index.
    """
    with atomic_path(path) as temporary, wds.TarWriter(str(temporary), mtime=0) as writer:  # pyright: ignore[reportAttributeAccessIssue]
        for sample in samples:
            writer.write(sample)
    data = path.read_bytes()
    return {"samples": len(samples), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
