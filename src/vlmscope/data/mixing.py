"""Sources mixed by tokens: shards read back, shuffled, weighted, and resumed to the sample.

Shards that `task=build_data` wrote, read back; a corrupt one is skipped with a warning and a count, up to a limit.

A consumer reads one stretch of the rows, counted over all shards in the order of their names: it opens only the shards
in which its stretch lies, however uneven they are.

Several sources as one stream in which each has its share of the TOKENS, deterministic and resumable.

The next item comes from the source that is furthest behind: that with the least tokens so far, divided by its weight.
So at any time the shares differ from the weights by an item's length at most. When a source ends the others go on, in
their own proportion.

A share of a source in a seeded order, endless if wished, whose state is a few JSON values.

Rows are taken in blocks of the buffer's size; each block is shuffled, with the seed of (source, share, epoch, block).
So the state needs no copy of a buffer: the reader's mark at the start of the block, and the place in it, are enough.

From the settings of a source to the source: one function a kind.

One row of a source again, by its number.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.core.records import Exchange, derive, generator
from vlmscope.data.config import SourceConfig, check_source
from vlmscope.data.orrery.dataset import plain_facts, scene_row
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import KINDS, SPLITS, Scene
from vlmscope.data.samples import (
    WHOLE,
    Indexed,
    Mark,
    RawSample,
    Reader,
    Row,
    Share,
    Source,
    file_bytes,
    held_out,
    record_parts,
)
from vlmscope.data.shards import encode_png, read_index, read_samples
from vlmscope.data.tables import hf_source


class ShardSource:
    """The samples of one stream and split."""

    def __init__(self, name: str, folder: Path, stream: str, split: str, limit: int | None, max_bad: int) -> None:
        """Look at the index.

        Args:
            name: the source's name, for messages.
            folder: has `index.json`.
            stream, split: which shards.
            limit: the first so many samples only.
            max_bad: how many corrupt shards a pass may skip.

        Raises:
            UserError: there is no index, no such stream, or it holds no sample.
        """
        index = read_index(folder, f"data.sources.{name}.path")
        entries = index["shards"]
        # Orrery's own shards hold scenes with all their questions.
        self.parse = scene_row if index["meta"].get("dataset") == "orrery" else RawSample.from_shard
        self.name, self.folder, self.limit, self.max_bad = name, folder, limit, max_bad
        self.entries = {
            file: one
            for file, one in sorted(entries.items())
            if one["kind"] == stream and one["split"] == split and one["samples"]
        }
        if not self.entries:
            there = sorted({f"{one['kind']} ({one['split']})" for one in entries.values()})
            raise UserError(
                f"data.sources.{name}: {folder} has no samples of stream {stream!r}, split {split!r}; it has "
                f"{', '.join(there) or 'none'}"
            )

    def size(self) -> int:
        """The number of samples that the index counts."""
        total = sum(one["samples"] for one in self.entries.values())
        return total if self.limit is None else min(total, self.limit)

    def open(self, share: Share, mark: Mark = None) -> ShardReader:
        """A pass; its mark is the next row and the number of bad shards so far."""
        return ShardReader(self, share.stretch(self.size()), mark)


class ShardReader:
    """Goes through a stretch of rows once."""

    def __init__(self, source: ShardSource, stretch: range, mark: Mark) -> None:
        self.source, self.stop = source, stretch.stop
        self.row: int = stretch.start if mark is None else mark["row"]
        self.bad_shards: int = 0 if mark is None else mark["bad"]
        self.files = list(source.entries)
        self.ends = list(accumulate(one["samples"] for one in source.entries.values()))
        self.open_file: Iterator[RawSample] | None = None
        self.end = 0  # row at which the open shard ends

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while self.row < self.stop:
            number = next(n for n, end in enumerate(self.ends) if end > self.row)
            try:
                if self.open_file is None or self.row >= self.end:
                    self.open_file = self._opened(number)
                    self.end = self.ends[number]
                sample = next(self.open_file)
            # A corrupt tar shows itself as a tar error, as JSON or names that make no sense, or as too few samples.
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._skip(number, error)
                continue
            self.row += 1
            return partial(_same, sample)
        raise StopIteration

    def _opened(self, number: int) -> Iterator[RawSample]:
        name = self.files[number]
        entry, path = self.source.entries[name], self.source.folder / name
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"it has {size:,} bytes, the index says {entry['bytes']:,}")
        before = self.row - (self.ends[number] - entry["samples"])
        return map(self.source.parse, islice(read_samples([path]), before, None))

    def _skip(self, number: int, error: Exception) -> None:
        self.bad_shards += 1
        self.row, self.open_file = self.ends[number], None
        path = self.source.folder / self.files[number]
        reason = (str(error).strip().splitlines() or ["it ends too early"])[0]
        what = f"shard {path} is corrupt ({reason})"
        if self.bad_shards > self.source.max_bad:
            raise UserError(
                f"{what}, number {self.bad_shards}, and data.max_bad_shards={self.source.max_bad}; run task=build_data "
                "again, which mends it, or raise the limit"
            ) from error
        warnings.warn(f"{what}; skipped ({self.bad_shards} of at most {self.source.max_bad})", stacklevel=2)

    def mark(self) -> dict[str, Any]:
        """The next row and the number of bad shards."""
        return {"row": self.row, "bad": self.bad_shards}

    @property
    def last(self) -> int:
        """The row that was given last, among all of the source: those of a corrupt shard count too."""
        return self.row - 1


def _same(sample: RawSample) -> RawSample:
    return sample


Item = TypeVar("Item")


class Encoder(Protocol[Item]):
    """How samples become items; it may hold something back (packing), which then is its state."""

    def add(self, sample: RawSample) -> None:
        """Take a sample in.

        Raises:
            UserError: it cannot be used; it is then counted and left out.
        """
        ...

    def pop(self) -> Item | None:
        """An item that is ready; None asks for another sample."""
        ...

    def rest(self) -> Item | None:
        """What is held back, when no sample comes any more."""
        ...

    def tokens(self, item: Item) -> int:
        """How many tokens an item has."""
        ...

    def state(self) -> Any:
        """JSON values; taken only when nothing is ready to be popped or after a pop."""
        ...

    def load(self, state: Any) -> None:
        """Go on from a state."""
        ...


class Lane(NamedTuple, Generic[Item]):
    """A source with its weight and its encoder."""

    weight: float
    samples: ShuffledSource
    encoder: Encoder[Item]


class Drawn(NamedTuple, Generic[Item]):
    """An item of the mix, whose it is and how long."""

    source: str
    item: Item
    tokens: int


class TokenMix(Generic[Item]):
    """Items of all lanes in proportion; an iterator that ends when all sources have ended."""

    def __init__(self, lanes: Mapping[str, Lane[Item]]) -> None:
        """Start at the beginning.

        Raises:
            UserError: there is no source, or a weight is not positive.
        """
        if not lanes:
            raise UserError("data.sources is empty: a mix needs at least one source")
        for name, lane in lanes.items():
            if not 0 < lane.weight < float("inf"):
                raise UserError(f"data.sources.{name}.weight={lane.weight}: a weight must be positive; correct it")
        self.lanes = dict(lanes)
        self.tokens = dict.fromkeys(self.lanes, 0)
        self.ended: list[str] = []

    def __iter__(self) -> Iterator[Drawn[Item]]:
        return self

    def __next__(self) -> Drawn[Item]:
        while len(self.ended) < len(self.lanes):
            alive = [name for name in self.lanes if name not in self.ended]
            name = min(alive, key=lambda one: self.tokens[one] / self.lanes[one].weight)
            item = _next_item(self.lanes[name])
            if item is None:
                self.ended.append(name)
                continue
            count = self.lanes[name].encoder.tokens(item)
            self.tokens[name] += count
            return Drawn(name, item, count)
        raise StopIteration

    def shares(self) -> dict[str, float]:
        """Each source's share of the tokens so far."""
        total = sum(self.tokens.values())
        return {name: count / total if total else 0.0 for name, count in self.tokens.items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which `load_state_dict` goes on with the very next item."""
        lanes = {
            name: {"samples": one.samples.state(), "held": one.encoder.state()} for name, one in self.lanes.items()
        }
        return {"tokens": dict(self.tokens), "ended": list(self.ended), "lanes": lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken, with the same sources and settings.

        Raises:
            UserError: the state is that of other sources.
        """
        if list(state["lanes"]) != list(self.lanes):
            raise UserError(
                f"the state is of {_names(state['lanes'])}, the sources are {_names(self.lanes)}; restore them"
            )
        self.tokens, self.ended = dict(state["tokens"]), list(state["ended"])
        for name, lane in self.lanes.items():
            lane.samples.load(state["lanes"][name]["samples"])
            lane.encoder.load(state["lanes"][name]["held"])


def _names(lanes: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(lanes)


def _next_item(lane: Lane[Item]) -> Item | None:
    while (item := lane.encoder.pop()) is None:
        sample = lane.samples.next()
        if sample is None:
            return lane.encoder.rest()
        try:
            lane.encoder.add(sample)
        except UserError as error:
            lane.samples.skip(error)
    return item


PATIENCE = 100  # unusable rows at the beginning before the source is given up


class ShuffledSource:
    """The samples of one consumer."""

    def __init__(
        self,
        source: Source,
        share: Share = WHOLE,
        buffer: int = 1000,
        seed: int = 0,
        repeat: bool = False,
        keep: Callable[[RawSample], bool] = lambda _sample: True,
    ) -> None:
        """Nothing is read yet.

        Args:
            source: what is read.
            share: which part of it.
            buffer: rows that are shuffled with each other; 1 keeps the order.
            seed: names the order.
            repeat: start again, in another order, when the source ends.
            keep: samples for which it is False are passed over (the others' validation samples).
        """
        self.source, self.share, self.buffer, self.seed = source, share, buffer, seed
        self.repeat, self.keep = repeat, keep
        self.epoch, self.block, self.place, self.given, self.skipped, self.ended = 0, 0, 0, 0, 0, False
        self.given_before = 0  # samples given before this epoch
        self.first_error = ""  # of a sample that cannot be used
        self.passed_over = 0  # samples that `keep` left out
        self.start: Mark = None
        self._reader: Reader | None = None
        self._rows: list[Row] = []
        self._order: list[int] = []

    def next(self) -> RawSample | None:
        """The next sample; None at the end, and from then on.

        Raises:
            UserError: the source is empty, `keep` leaves none of it, or its first `PATIENCE` rows are all unusable.
        """
        while not self.ended:
            if self._reader is None:
                self._fill(self.start)
            if self.place == len(self._rows) and not self._turn():
                self.ended = True
                break
            row = self._rows[self._order[self.place]]
            self.place += 1
            sample = self._read(row)
            if sample is None:
                continue
            if self.keep(sample):
                self.given += 1
                return sample
            self.passed_over += 1
        return None

    def state(self) -> dict[str, Any]:
        """JSON values from which `load` goes on with the very next sample."""
        names = ("epoch", "block", "place", "given", "given_before", "skipped", "ended")
        return {name: getattr(self, name) for name in names} | {"start": self.start}

    def load(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken (same source, share, buffer and seed)."""
        for name, value in state.items():
            setattr(self, name, value)
        self._reader = None

    @property
    def bad_shards(self) -> int:
        """Corrupt shards skipped in this epoch."""
        return 0 if self._reader is None else self._reader.bad_shards

    def skip(self, error: UserError) -> None:
        """Count a sample that cannot be used.

        Raises:
            UserError: that very one, when nothing else has come yet `PATIENCE` times.
        """
        self.skipped += 1
        self.first_error = self.first_error or str(error)
        if self.skipped == 1:
            warnings.warn(f"{error}; such samples of {self.source.name} are left out and counted", stacklevel=2)
        if self.skipped >= PATIENCE and self.skipped >= self.given:
            raise UserError(f"{self.skipped} samples of {self.source.name} could not be used, the last: {error}")

    def _why_nothing(self) -> str:
        if self.passed_over:
            return (
                f"its {self.passed_over} samples all fall on the same side of data.val_share, by their hash, so that "
                "training or validation has none; give more samples, another data.val_share, or a val_split"
            )
        if self.first_error:
            return f"no sample of it can be used, the first: {self.first_error}; check the data"
        return "it has no sample; check the data"

    def _read(self, row: Row) -> RawSample | None:
        try:
            return row()
        except UserError as error:
            self.skip(error)
            return None

    def _fill(self, mark: Mark) -> None:
        if self._reader is None:
            self._reader = self.source.open(self.share, mark)
        self.start = mark
        self._rows = list(islice(self._reader, self.buffer))
        rng = generator(
            self.seed, "shuffle", self.source.name, self.share.index, self.share.total, self.epoch, self.block
        )
        self._order = rng.permutation(len(self._rows)).tolist()

    def _turn(self) -> bool:
        """Go to the next block, of this epoch or of the next; False when there is none."""
        assert self._reader is not None
        if self._rows:
            self.block, self.place = self.block + 1, 0
            self._fill(self._reader.mark())
        if not self._rows and self._again():
            self._fill(None)
        return bool(self._rows)

    def _again(self) -> bool:
        """Begin the next epoch; False when there is none."""
        got = self.given - self.given_before
        if self.epoch == 0 and got == 0 and self.share.total == 1:
            raise UserError(f"data.sources.{self.source.name}: {self._why_nothing()}")
        if not self.repeat or got == 0:
            return False
        self.epoch, self.block, self.place, self.given_before = self.epoch + 1, 0, 0, self.given
        self.start, self._reader = None, None
        return True


ORRERY_SCENES = 50_000  # without a limit; scenes are made while they are used, so the number is free


def open_source(
    name: str, config: SourceConfig, split: str | None = None, max_bad_shards: int = 0, check_pictures: bool = True
) -> Source:
    """A source as its settings say.

    Args:
        name: its key in `data.sources`.
        config: its settings.
        split: instead of `config.split`.
        max_bad_shards: how many corrupt shards a pass may skip, or corrupt files of a local table be left out.
        check_pictures: of a folder, look at all pictures first; else a bad one shows itself at its row.

    Raises:
        UserError: the settings are wrong, or the data are not there, empty or of another schema.
    """
    check_source(name, config)
    split = split or config.split
    if config.kind == "orrery":
        return _orrery(name, config, split)
    if config.kind == "folder":
        return _folder(name, config, split, check_pictures)
    if config.kind == "shards":
        return ShardSource(name, Path(str(config.path)), config.stream or name, split, config.limit, max_bad_shards)
    return hf_source(name, config, split, max_bad_shards)


def keeps(config: SourceConfig, val_share: float, validation: bool):
    """Which samples of the stream belong to training, or to validation: a function of the sample alone.

    With a split of its own for validation every sample belongs; else `val_share` of them, by their digest, is held out.
    """
    if config.val_split is not None:
        return lambda _sample: True
    return lambda sample: held_out(sample, val_share) == validation


def _orrery(name: str, config: SourceConfig, split: str) -> Indexed:
    if split not in SPLITS:
        raise UserError(f"data.sources.{name}.split={split}: Orrery's scenes have {', '.join(SPLITS)}")
    kinds = ("text",) if config.stream == "text" else tuple(kind for kind in KINDS if kind != "text")

    def sample(number: int) -> RawSample:
        scene = make_scene(split, kinds[number % len(kinds)], number // len(kinds))
        return scene_sample(scene, str(config.stream))

    return Indexed(name, config.limit or ORRERY_SCENES, sample)


def scene_sample(scene: Scene, stream: str) -> RawSample:
    """A scene of Orrery as plain text, or as its picture with the caption, with one question, or with all of them.

    "questions" picks one by the scene's key, since Orrery was trained on single turns; "dialogues" asks all, caption
    apart.
    """
    facts = plain_facts(scene.kind, scene.facts)
    if scene.image is None:
        said = " ".join(f"{q.question} {q.answer}" for q in scene.questions)
        return RawSample(text=said, origin=scene.key, facts=facts)
    asked = [q for q in scene.questions if (q.group == "caption") == (stream == "captions")]
    if stream == "questions":
        asked = [asked[derive(0, "question", scene.key) % len(asked)]]
    exchanges = tuple(Exchange(q.question, q.answer) for q in asked)
    return RawSample((encode_png(scene.image),), exchanges, origin=scene.key, facts=facts)


def _folder(name: str, config: SourceConfig, split: str, check_pictures: bool) -> Indexed:
    from vlmscope.data.folder import JsonLines

    path = Path(str(config.path)) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; data.sources.{name}.path: as docs/bring_your_own.md says")
    lines = JsonLines(path, check_pictures, check_words=False)
    count = len(lines) if config.limit is None else min(len(lines), config.limit)

    def sample(number: int) -> RawSample:
        record = lines.record(number)
        origin = lines.origin(number)
        names, exchanges, text = record_parts(record, origin)
        pictures = tuple(file_bytes(lines.path.parent / image, origin) for image in names)
        given = record.get("facts")
        facts = {k: v for k, v in given.items() if isinstance(v, str | int)} if isinstance(given, dict) else {}
        return RawSample(pictures, exchanges, text, origin, facts)

    return Indexed(name, count, sample)


def fingerprint(sources: dict[str, SourceConfig]) -> str:
    """Sources in words that change when anything changes that the samples hang on."""
    import dataclasses
    import hashlib

    digest = hashlib.sha256(json.dumps({k: dataclasses.asdict(v) for k, v in sources.items()}).encode()).hexdigest()
    return f"{', '.join(f'{name} {one.weight:g}' for name, one in sources.items())} (settings {digest[:8]})"


def row_of(source: Source, row: int) -> RawSample:
    """Row number `row` of a whole pass. Streams are read up to it; folders, tables and shards go there at once.

    Raises:
        UserError: there is no such row, or it cannot be used.
    """
    if isinstance(source, Indexed) and row < source.count:
        return source.sample(row)
    if isinstance(source, ShardSource):
        found = next(source.open(WHOLE, {"row": row, "bad": 0}), None)
    else:
        found = next(islice(source.open(WHOLE), row, None), None)
    if found is None:
        raise UserError(f"{source.name} has no row {row} any more; give the data that the study was made of")
    return found()
