"""A mix written as shards by several processes: what each part does, the pool, and the whole.

One part of a source written as shards: what a process of `vlmscope.data.build` does, chunk after chunk.

A chunk is `shard_size` rows. Its digests go to the builder, which answers which of them are new; those are written, the
training and the validation samples into a tar each, and the builder enters the chunk in the index.

Runs parts of a build in this process, or in several that ask this one which samples are new.

Processes are started afresh (`spawn`): the libraries beneath keep threads, which a fork would break.

All sources of a mix written as shards: by several processes, each sample once, and going on after a kill.

The builder alone writes the index and alone knows which samples are there already; processes ask it (`build_part`). A
chunk counts when it is in the index, so whatever a kill leaves behind is written again. A chunk whose files are damaged
is written again alone: its rows are read from its mark, and it keeps the samples that were its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, cast

import webdataset as wds

from vlmscope.core.artifacts import atomic_path, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.origin import folder_digest, refuse_other
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import fingerprint, open_source
from vlmscope.data.samples import DIGEST_BYTES, Mark, RawSample, Row, Share, held_out
from vlmscope.data.shards import INDEX, damaged_shards, open_index, read_index

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


Claim = Callable[[PartJob, list[bytes]], list[bool]]
Enter = Callable[[PartJob, Chunk], None]
Finish = Callable[[PartJob], None]


class _Fault(NamedTuple):
    """The traceback of a fault of the program in another process."""

    text: str


def run_jobs(
    jobs: list[PartJob],
    processes: int,
    claim: Claim,
    enter: Enter,
    finish: Finish,
) -> None:
    """Go through all parts.

    Args:
        jobs: the parts.
        processes: how many at the same time.
        claim: which digests are new.
        enter: told each chunk that is on the disk.
        finish: told each part that is done.

    Raises:
        UserError: that of any part, or its process was ended from outside.
        RuntimeError: a fault of the program in another process, with its traceback.
    """
    if processes == 1 or len(jobs) == 1:
        for job in jobs:
            _here(job, claim, enter)
            finish(job)
    elif jobs:
        _there(jobs, min(processes, len(jobs)), claim, enter, finish)


def _here(job: PartJob, claim: Claim, enter: Enter) -> None:
    steps = chunks_of(job)
    said = next(steps, None)
    while said is not None:
        if isinstance(said, Chunk):
            enter(job, said)
            said = next(steps, None)
        else:
            said = steps.send(claim(job, said))


def _there(
    jobs: list[PartJob],
    processes: int,
    claim: Claim,
    enter: Enter,
    finish: Finish,
) -> None:
    context = multiprocessing.get_context("spawn")
    waiting, working, started = list(jobs), dict[Connection, PartJob](), []
    try:
        for _ in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            _start(process)
            theirs.close()
            started.append((process, mine))
            _hand_over(cast(Connection, mine), waiting, working)
        while working:
            for ready in wait(list(working)):
                connection = cast(Connection, ready)
                job = working[connection]
                match _received(connection, job):
                    case Chunk() as chunk:
                        enter(job, chunk)
                    case list() as digests:
                        connection.send(claim(job, digests))
                    case str() as error:
                        raise UserError(error)
                    case _Fault(text):
                        raise RuntimeError(f"part {job.part.index} of {job.name} failed in its process:\n{text}")
                    case None:
                        finish(job)
                        del working[connection]
                        _hand_over(connection, waiting, working)
    finally:
        for _, connection in started:
            connection.close()
        for process, _ in started:
            process.join(20)  # a process ends when it next asks or tells; it removes what it was writing
            if process.is_alive():
                process.kill()  # SIGTERM does not reach it


def _start(process: Any) -> None:
    """Start a process that Ctrl-C and SIGTERM do not reach, not even while it imports: it is the builder's to end."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be set
        process.start()
        return
    # A new process inherits it.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process.start()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hand_over(connection: Connection, waiting: list[PartJob], working: dict[Connection, PartJob]) -> None:
    job = waiting.pop(0) if waiting else None
    connection.send(job)
    if job is not None:
        working[connection] = job


def _received(connection: Connection, job: PartJob) -> Any:
    try:
        return connection.recv()
    except EOFError as error:
        raise UserError(
            f"the process that wrote part {job.part.index} of {job.name} was ended from outside (out of memory?); run "
            "the same again, with fewer task.workers"
        ) from error


def _work(connection: Connection) -> None:
    """A process: parts until it is told None, or the builder is gone."""
    try:
        while (job := connection.recv()) is not None:
            try:
                steps = chunks_of(job)
                said = next(steps, None)
                while said is not None:
                    connection.send(said)
                    said = next(steps, None) if isinstance(said, Chunk) else steps.send(connection.recv())
                connection.send(None)
            except UserError as error:
                connection.send(str(error))
            except (EOFError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception:
                connection.send(_Fault(traceback.format_exc()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


_LOG = logging.getLogger(__name__)
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
        """Open the folder and look for chunks whose files are damaged.

        Raises:
            UserError: the folder holds shards of other sources or settings, or the sources' files have changed.
        """
        self.sources, self.settings = dict(sources), settings
        meta = {
            "dataset": "mix", "version": VERSION, "sources": fingerprint(self.sources), "parts": settings.parts,
            "shard_size": settings.shard_size, "val_share": settings.val_share,
        }  # fmt: skip
        self.index = open_index(settings.folder, meta)
        # A source that is gone may stay so when the shards are finished.
        there = {name: one.path for name, one in self.sources.items() if one.path and Path(one.path).exists()}
        files = {f"data.sources.{name}": folder_digest(path) for name, path in there.items()}
        before = self.index.setdefault("files", files)
        known = {name: before.get(name) for name in files}
        refuse_other(str(settings.folder / INDEX), known, files, "choose another data.path")
        self.parts: dict[str, dict[str, Any]] = self.index.setdefault("parts", {})
        self.seen: set[bytes] = set()
        self.own: dict[tuple[str, int], set[bytes]] = {}  # damaged chunks and, where they are known, their samples
        sound = self.index["shards"].keys() - damaged_shards(settings.folder, self.index["shards"])
        for key, part in self.parts.items():
            for number, chunk in enumerate(part["chunks"]):
                digests = self._read_digests(key, number, chunk)
                self.seen |= digests or set()
                if digests is None or not sound.issuperset(chunk["shards"]):
                    self.own[key, number] = digests or set()

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
                chunks = part["chunks"]
                found += [
                    dataclasses.replace(job, mark=chunks[number]["start"], chunk=number, alone=True)
                    for key, number in self.own
                    if key == job.key
                ]
                if not part["done"]:
                    mark = chunks[-1]["stop"] if chunks else None
                    found.append(dataclasses.replace(job, mark=mark, chunk=len(chunks)))
        return found

    def claim(self, job: PartJob, digests: list[bytes]) -> list[bool]:
        """Which samples are new; they are not, from now on. To a damaged chunk its own samples are new."""
        own = self.own.get((job.key, job.chunk), set()).copy() if job.alone else set()
        new = []
        for digest in digests:
            new.append(digest in own or digest not in self.seen)
            own.discard(digest)
            self.seen.add(digest)
        return new

    def enter(self, job: PartJob, chunk: Chunk) -> None:
        """Note a chunk whose shards are on the disk.

        Raises:
            UserError: a damaged chunk has another number of rows now.
        """
        chunks = self.parts[job.key]["chunks"]
        record = {name: getattr(chunk, name) for name in ("start", "stop", "rows", "duplicates", "unusable")}
        number = job.chunk if job.alone else len(chunks)
        record |= {"shards": list(chunk.shards), "digests": hashlib.sha256(chunk.digests).hexdigest()}
        if job.alone:
            self._check_same(job, chunks[number], chunk)
            for name in chunks[number]["shards"]:
                self.index["shards"].pop(name, None)
        with atomic_path(self._digests(job.key, number)) as temporary:
            temporary.write_bytes(chunk.digests)
        chunks[number : number + 1] = [record]  # or one more
        self.index["shards"] |= chunk.shards
        self._save()

    def _check_same(self, job: PartJob, old: dict[str, Any], new: Chunk) -> None:
        if new.rows != old["rows"]:
            raise UserError(
                f"data.sources.{job.name} gives {new.rows} rows where it gave {old['rows']} when "
                f"{self.settings.folder} was built, so its damaged shards cannot be mended; choose another folder"
            )
        for name in {*old["shards"], *new.shards}:
            if self.index["shards"].get(name, {}).get("sha256") != new.shards.get(name, {}).get("sha256"):
                _LOG.warning("%s differs from what was written first: data.sources.%s has changed", name, job.name)

    def finish(self, job: PartJob) -> None:
        """Note that a part has been gone through."""
        if not job.alone:
            self.parts[job.key]["done"] = True
            self._save()

    def total(self, count: str) -> int:
        """The sum of a count ("rows", "duplicates", "unusable") over all chunks."""
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
        # Folders of earlier versions have no hash of it.
        if len(data) != kept * DIGEST_BYTES or chunk.get("digests", "") not in ("", hashlib.sha256(data).hexdigest()):
            return None
        return {data[at : at + DIGEST_BYTES] for at in range(0, len(data), DIGEST_BYTES)}


def build_mix(
    sources: Mapping[str, SourceConfig],
    settings: BuildSettings,
    processes: int = 1,
    on_rows: Callable[[int], None] = lambda _rows: None,
) -> dict[str, float]:
    """Write what `settings.folder` still lacks, and again what is damaged (`damaged_shards`).

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

    def enter(job: PartJob, chunk: Chunk) -> None:
        nonlocal written
        builder.enter(job, chunk)
        written += len(chunk.shards)
        on_rows(0 if job.alone else chunk.rows)

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
    parts = read_index(folder, "data.path").get("parts", {})
    return sum(chunk["rows"] for part in parts.values() for chunk in part["chunks"])
