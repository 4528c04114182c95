"""Sources mixed by tokens: opened from their settings, shuffled, weighted, numbered, and resumed to the sample.

Weights are shares of the tokens of a mix. The next item comes from the source that is furthest behind, the one with the
fewest tokens so far divided by its weight, so the shares never differ from the weights by more than one item's length.
When a source ends, the others continue in their own proportion. A study applies the same rule to rows, each read once
and numbered.

Rows are shuffled in blocks of the buffer's size, seeded by (source, share, epoch, block). The state therefore needs no
copy of a buffer, only the reader's mark at the start of the block and the position in the block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.config import SourceConfig, check_source
from vlmscope.data.orrery.dataset import rendered_sample, row_of_scene, row_of_shard
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import COUNTS, PICTURED, SPLITS
from vlmscope.data.samples import WHOLE, Mark, RawSample, Reader, Row, Share, Source, held_out, indexed
from vlmscope.data.shards import shard_source
from vlmscope.data.tables import folder_source, hf_source

ORRERY_SCENES = 50_000  # per source without a limit; scenes are rendered on demand, so any number works
PATIENCE = 100  # unusable rows, when most are unusable, after which a source is refused


def open_source(name: str, config: SourceConfig, split: str | None = None, max_bad_shards: int = 0) -> Source:
    """Open a source from its settings.

    `name` is its key in `data.sources`; `split` replaces `config.split`. A pass may skip up to `max_bad_shards` corrupt
    shards.

    Raises:
        UserError: the settings are wrong, or the data are missing, empty or of another schema.
    """
    check_source(name, config)
    split = split or config.split
    if config.kind == "folder":
        return folder_source(name, config, split)
    if config.kind == "shards":
        return shard_source(name, config, split, max_bad_shards, row_of_shard)
    if config.kind.startswith("hf_"):
        return hf_source(name, config, split)
    if split not in SPLITS:
        raise UserError(f"data.sources.{name}.split={split}: Orrery's scenes have {', '.join(SPLITS)}")
    if config.kind == "scenes":
        kind = str(config.stream)
        count = min(COUNTS[split][kind], config.limit or COUNTS[split][kind])
        return indexed(name, count, lambda row: row_of_shard(rendered_sample(split, kind, row)))
    kinds = ("text",) if config.stream == "text" else PICTURED

    def scene(row: int) -> RawSample:
        return row_of_scene(make_scene(split, kinds[row % len(kinds)], row // len(kinds)), str(config.stream))

    return indexed(name, config.limit or ORRERY_SCENES, scene)


def keeps(config: SourceConfig, val_share: float, validation: bool) -> Callable[[RawSample], bool]:
    """Predicate for the samples that belong to training, or to validation.

    With a separate validation split every sample belongs; otherwise `val_share` of them, by digest, is held out.
    """
    if config.val_split is not None:
        return lambda _sample: True
    return lambda sample: held_out(sample, val_share) == validation


def fingerprint(sources: dict[str, SourceConfig]) -> str:
    """Names and weights of the sources, with a digest of every setting that the samples depend on."""
    digest = hashlib.sha256(json.dumps({k: dataclasses.asdict(v) for k, v in sources.items()}).encode()).hexdigest()
    return f"{', '.join(f'{name} {source.weight:g}' for name, source in sources.items())} (settings {digest[:8]})"


def row_of(source: Source, row: int) -> RawSample:
    """Row number `row` of a whole pass; streams are read up to it, folders, tables and shards seek."""
    if source.sample is not None and row < (source.size or 0):
        return source.sample(row)
    read = next(islice(source.open(WHOLE), row, None), None)
    if read is None:
        raise UserError(f"{source.name} has no row {row} any more; give the data that the study was made of")
    return read()


class ShuffledSource:
    """The samples of one consumer in a seeded order, optionally endless, with a small JSON state."""

    def __init__(
        self,
        source: Source,
        share: Share = WHOLE,
        buffer: int = 1000,
        seed: int = 0,
        repeat: bool = False,
        keep: Callable[[RawSample], bool] = lambda _sample: True,
    ) -> None:
        """Prepare a pass over `share` of the source, without reading.

        `buffer` rows are shuffled with each other (1 keeps the order), seeded by `seed`. With `repeat` the source
        starts again, in another order, when it ends. Samples for which `keep` is False are left out.
        """
        self.source, self.share, self.buffer, self.seed = source, share, buffer, seed
        self.repeat, self.keep = repeat, keep
        self.epoch, self.block, self.place, self.given, self.skipped, self.ended = 0, 0, 0, 0, 0, False
        self.given_before = 0  # samples given before this epoch
        self.first_error = ""  # of a sample that cannot be used
        self.passed_over = 0  # samples for which `keep` was False
        self.start: Mark = None
        self._reader: Reader | None = None

    def next(self) -> RawSample | None:
        """The next sample, or None from the end on; a source without any usable sample raises `UserError`."""
        while not self.ended:
            if self._reader is None:
                self._fill(self.start)
            if self.place == len(self._rows) and not self._turn():
                self.ended = True
                break
            row = self._rows[self._order[self.place]]
            self.place += 1
            try:
                sample = row()
            except UserError as error:
                self.skip(error)
                continue
            if self.keep(sample):
                self.given += 1
                return sample
            self.passed_over += 1
        return None

    def state(self) -> dict[str, Any]:
        """JSON values from which `load` resumes with the next sample."""
        names = ("epoch", "block", "place", "given", "given_before", "skipped", "ended", "start")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Resume where `state` was taken (same source, share, buffer and seed)."""
        for name, value in state.items():
            setattr(self, name, value)
        self._reader = None

    @property
    def bad_shards(self) -> int:
        """Corrupt shards skipped in this epoch."""
        return 0 if self._reader is None else self._reader.bad_shards

    def skip(self, error: UserError) -> None:
        """Count an unusable sample; raise once there are `PATIENCE` of them and no more usable ones than that."""
        self.skipped += 1
        self.first_error = self.first_error or str(error)
        if self.skipped == 1:
            warnings.warn(f"{error}; such samples of {self.source.name} are left out and counted", stacklevel=2)
        if self.skipped >= PATIENCE and self.skipped >= self.given:
            raise UserError(f"{self.skipped} samples of {self.source.name} could not be used, the last: {error}")

    def _fill(self, mark: Mark) -> None:
        """Read and shuffle the block that starts at `mark`."""
        if self._reader is None:
            self._reader = self.source.open(self.share, mark)
        self.start = mark
        self._rows = list(islice(self._reader, self.buffer))
        names = (self.source.name, self.share.index, self.share.total, self.epoch, self.block)
        self._order = generator(self.seed, "shuffle", *names).permutation(len(self._rows)).tolist()

    def _turn(self) -> bool:
        """Advance to the next block, of this epoch or the next; False when there is none."""
        assert self._reader is not None
        if self._rows:
            self.block, self.place = self.block + 1, 0
            self._fill(self._reader.mark())
        if not self._rows:
            samples = self.given - self.given_before
            if self.epoch == 0 and samples == 0 and self.share.total == 1:  # one of several shares may be empty
                raise UserError(f"data.sources.{self.source.name}: {self._why_nothing()}")
            if not self.repeat or samples == 0:  # an epoch without samples would repeat forever
                return False
            self.epoch, self.block, self.place, self.given_before = self.epoch + 1, 0, 0, self.given
            self._reader = None
            self._fill(None)
        return bool(self._rows)

    def _why_nothing(self) -> str:
        if self.passed_over:
            return (
                f"its {self.passed_over} samples all fall on the same side of data.val_share, by their hash, so that "
                "training or validation has none; give more samples, another data.val_share, or a val_split"
            )
        if self.first_error:
            return f"no sample of it can be used, the first: {self.first_error}; check the data"
        return "it has no sample; check the data"


class Lane(NamedTuple):
    """A source with its weight and its encoder, which turns samples into items (`training.batches.SampleEncoder`).

    `add` takes a sample, or raises `UserError` for one that cannot be used. `pop` returns a finished item, or None if
    it needs another sample. `rest` returns what is held back after the last sample. `tokens` is the length of an item.
    `state` is JSON, taken only after a pop or when no item is ready.
    """

    weight: float
    samples: ShuffledSource
    encoder: Any

    def next(self) -> Any | None:
        """The next item; None at the end."""
        while (item := self.encoder.pop()) is None:
            sample = self.samples.next()
            if sample is None:
                return self.encoder.rest()
            try:
                self.encoder.add(sample)
            except UserError as error:
                self.samples.skip(error)
        return item


class Drawn(NamedTuple):
    """An item of the mix, with its source and length."""

    source: str
    item: Any
    tokens: int


class TokenMix:
    """Iterator over the items of all lanes in proportion to their weights, until all sources have ended."""

    def __init__(self, lanes: Mapping[str, Lane]) -> None:
        if not lanes:
            raise UserError("data.sources is empty: a mix needs at least one source")
        self.lanes = dict(lanes)
        self.tokens = dict.fromkeys(self.lanes, 0)
        self.ended: list[str] = []

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        weights = {name: lane.weight for name, lane in self.lanes.items()}
        while (name := _furthest_behind(self.tokens, weights, self.ended)) is not None:
            item = self.lanes[name].next()
            if item is None:
                self.ended.append(name)
                continue
            count = self.lanes[name].encoder.tokens(item)
            self.tokens[name] += count
            return Drawn(name, item, count)
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` resumes with the next item."""
        lanes = {
            name: {"samples": lane.samples.state(), "held": lane.encoder.state()} for name, lane in self.lanes.items()
        }
        return {"tokens": dict(self.tokens), "ended": list(self.ended), "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where the state was taken, with the same sources and settings."""
        if list(state["lanes"]) != list(self.lanes):
            raise UserError(
                f"the state is of {', '.join(state['lanes'])}, the sources are {', '.join(self.lanes)}; restore them"
            )
        self.tokens, self.ended = dict(state["tokens"]), list(state["ended"])
        for name, lane in self.lanes.items():
            lane.samples.load(state["lanes"][name]["samples"])
            lane.encoder.load(state["lanes"][name]["held"])


def _furthest_behind(taken: Mapping[str, int], weights: Mapping[str, float], ended: list[str]) -> str | None:
    """The unfinished source with the smallest `taken / weight`; None when all have ended."""
    # `min` keeps the first of equals, so the order of the sources decides ties on every machine.
    return min((n for n in taken if n not in ended), key=lambda n: taken[n] / weights[n], default=None)


class NumberedRow(NamedTuple):
    """A row that has not been read yet."""

    number: int  # among the rows of all sources
    source: str
    source_row: int  # number in the source
    read: Row


class NumberedRows:
    """Rows of several sources, each once, numbered and divided into batches for several processes.

    Numbers and batches do not depend on the number of processes: every process iterates over all rows but reads
    (`Row()`) only its own batches. Batch n belongs to part n modulo `share.total`.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[float, Source]],
        batch_size: int,
        share: Share = WHOLE,
        limit: int | None = None,
    ) -> None:
        """Start at the first rows; `sources` maps names to (weight, source), `limit` bounds the rows in total."""
        self.sources = {name: source for name, (_, source) in sources.items()}
        self.weights = {name: weight for name, (weight, _) in sources.items()}
        self.batch_size, self.share, self.limit = batch_size, share, limit
        self.taken = dict.fromkeys(self.sources, 0)
        self.ended: list[str] = []
        self.readers: dict[str, Reader] = {name: source.open(WHOLE) for name, source in self.sources.items()}

    def size(self) -> int | None:
        """Rows in total; None if unknown before reading."""
        sizes = [source.size for source in self.sources.values()]
        known = None if None in sizes else sum(size for size in sizes if size is not None)
        return min((size for size in (known, self.limit) if size is not None), default=None)

    @property
    def done(self) -> int:
        """Rows passed so far, whichever process reads them."""
        return sum(self.taken.values())

    @property
    def bad_shards(self) -> int:
        """Corrupt files that were left out."""
        return sum(reader.bad_shards for reader in self.readers.values())

    def __iter__(self) -> Iterator[list[NumberedRow]]:
        while True:
            number = self.done // self.batch_size
            batch = list(islice(self._rows(), self.batch_size))
            if not batch:
                return
            if number % self.share.total == self.share.index:
                yield batch

    def state(self) -> dict[str, Any]:
        """JSON values from which `load` resumes; to be taken between two batches."""
        marks = {name: reader.mark() if self.taken[name] else None for name, reader in self.readers.items()}
        return {"taken": dict(self.taken), "ended": list(self.ended), "marks": marks}

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume where a state was taken, with the same settings."""
        self.taken, self.ended = dict(state["taken"]), list(state["ended"])
        self.readers = {name: source.open(WHOLE, state["marks"][name]) for name, source in self.sources.items()}

    def _rows(self) -> Iterator[NumberedRow]:
        while self.limit is None or self.done < self.limit:
            name = _furthest_behind(self.taken, self.weights, self.ended)
            if name is None:
                return
            reader, number = self.readers[name], self.done
            read = next(reader, None)
            if read is None:
                self.ended.append(name)
                continue
            self.taken[name] += 1
            yield NumberedRow(number, name, reader.row - 1, read)
