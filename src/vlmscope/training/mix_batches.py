"""Batches of a mix of sources: number n follows from the seed and n alone, and is reached without starting over.

The mix is a stream: to have batch n, those before it must be gone through. So its state is kept at some batches, in
memory and in a file of the run folder, and batch n starts from the last state before it. Where no such state is (the
file is lost), the stream starts over: slower, but the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.conversation import Conversation, Sample
from vlmscope.core.errors import UserError
from vlmscope.data.mixing import TokenMix
from vlmscope.data.raw import RawSample
from vlmscope.data.share import WHOLE, Share
from vlmscope.data.shuffled import ShuffledSource
from vlmscope.data.text_packing import TokenPacker
from vlmscope.training.conversation_batches import Forward, stacked
from vlmscope.training.transcoder_data import ENDED, OwnPart

EVERY = 8  # batches between two states that are kept in the file
NEWEST = 16  # the states of so many last batches are at hand
KEPT = 128  # states in the file


class SampleEncoder:
    """A conversation becomes its forwards; plain texts are packed, one sequence a forward."""

    def __init__(
        self,
        encode: Callable[[Sample], list[Forward]],
        text_ids: Callable[[str], list[int]],
        sequence: Callable[[list[int]], Forward],
        packer: TokenPacker,
    ) -> None:
        """Hold nothing yet.

        Args:
            encode: the forwards of a conversation (`vlmscope.models.conversations.encode`).
            text_ids: the tokens of a text, nothing added (`text_ids` there).
            sequence: the forward of tokens (`sequence_forward` there).
            packer: what joins texts.
        """
        self.encode, self.text_ids, self.sequence, self.packer = encode, text_ids, sequence, packer
        self.ready: list[Forward] | None = None

    def add(self, sample: RawSample) -> None:
        """Take a sample in; see `vlmscope.data.mixing.Encoder`."""
        if sample.exchanges:
            self.ready = self.encode(sample.opened())
            return
        try:
            self.packer.add(self.text_ids(sample.text))
        except UserError as error:
            raise UserError(f"{sample.origin}: {error}") from error

    def pop(self) -> list[Forward] | None:
        """The forwards of a conversation, or a packed sequence."""
        if self.ready is not None:
            item, self.ready = self.ready, None
            return item
        return self._forward(self.packer.pop())

    def rest(self) -> list[Forward] | None:
        """The last, shorter sequence."""
        return self._forward(self.packer.rest())

    def tokens(self, item: list[Forward]) -> int:
        """Tokens of the item's forwards, soft tokens included."""
        return sum(one["input_ids"].numel() for one in item)

    def state(self) -> list[int]:
        """Tokens left over from packing."""
        return list(self.packer.left)

    def load(self, state: list[int]) -> None:
        """Go on from tokens left over."""
        self.packer.left, self.ready = list(state), None

    def _forward(self, ids: list[int] | None) -> list[Forward] | None:
        return None if ids is None else [self.sequence(ids)]


class MixBatches:
    """Batch number 0, 1, ... of a mix, each of at least `tokens_per_batch` tokens.

    Where several processes train together, each has the batches of its own share of the sources (`share`), with its
    own states; number n of them all is the joint batch n. One whose share has ended has empty parts.
    """

    def __init__(
        self,
        make: Callable[[], TokenMix[list[Forward]]],
        tokens_per_batch: int,
        file: Path,
        settings: str,
        resume: bool,
        share: Share = WHOLE,
        joint_sum: Callable[[Sequence[float]], Sequence[float]] = list,
    ) -> None:
        """Take up the states of an earlier run.

        Args:
            make: the mix at its beginning; of the share, where there is one.
            tokens_per_batch: items are added until a batch has so many, over all shares.
            file: where states are kept; a share adds its number to the name.
            settings: what batches hang on; states of other settings are not used.
            resume: whether this run goes on with an earlier one; else its states are not used.
            share: which part of the sources `make` reads.
            joint_sum: sums over all shares, for `figures`.

        Raises:
            UserError: the file cannot be read.
        """
        self.share, self.joint_sum, self.settings = share, joint_sum, settings
        self.make, self.tokens_per_batch = make, -(-tokens_per_batch // share.total)
        part = f"_{share.index}_of_{share.total}" if share.total > 1 else ""
        self.file = file = file.with_name(f"{file.stem}{part}{file.suffix}")
        self.states: dict[int, Any] = {}
        if resume and file.is_file():
            kept = read_json(file)
            if kept.get("settings") == settings:
                self.states = {int(number): state for number, state in kept["states"].items()}
        self.mix = make()
        self.number = 0

    def __call__(self, number: int) -> list[Forward]:
        """The forwards of one batch, or this share's part of them.

        Raises:
            UserError: every source has ended before it, and there are no other shares.
        """
        if number != self.number:
            self._seek(number)
        while self.number < number:
            self._next()
        batch = stacked(self._next())
        return OwnPart(batch) if self.share.total > 1 else batch

    def figures(self) -> dict[str, float]:
        """Each source's share of the tokens so far, samples left out, and corrupt shards skipped, over all shares."""
        lanes = self.mix.lanes
        own = [self.mix.tokens[name] for name in lanes] + [lane.samples.skipped for lane in lanes.values()]
        joint = self.joint_sum([*own, sum(lane.samples.bad_shards for lane in lanes.values())])
        tokens, skipped = joint[: len(lanes)], joint[len(lanes) : -1]
        total = sum(tokens)
        figures = {f"data/{n}/tokens_share": t / total if total else 0.0 for n, t in zip(lanes, tokens, strict=True)}
        figures |= {f"data/{name}/skipped": float(count) for name, count in zip(lanes, skipped, strict=True)}
        return figures | {"data/bad_shards": float(joint[-1])}

    def _seek(self, number: int) -> None:
        """Go to the last state at or before a batch."""
        start = max((n for n in self.states if n <= number), default=0)
        if self.number < number and start <= self.number:
            return
        self.mix, self.number = self.make(), start
        if start in self.states:
            self.mix.load_state_dict(self.states[start])

    def _next(self) -> list[Forward]:
        self._note()
        forwards: list[Forward] = []
        tokens = 0
        while tokens < self.tokens_per_batch and (drawn := next(self.mix, None)) is not None:
            forwards += drawn.item
            tokens += drawn.tokens
        if not forwards and self.share.total == 1:
            raise UserError(f"all sources have ended before batch {self.number}: {ENDED}")
        self.number += 1
        return forwards

    def _note(self) -> None:
        """Keep the state before the coming batch."""
        if self.number in self.states:
            return
        self.states[self.number] = self.mix.state_dict()
        self.states = {n: s for n, s in self.states.items() if n % EVERY == 0 or n > self.number - NEWEST}
        if self.number % EVERY == 0:
            kept = sorted(n for n in self.states if n % EVERY == 0)[-KEPT:]
            self.states = {n: s for n, s in self.states.items() if n % EVERY or n in kept}
            states = {str(n): self.states[n] for n in kept}
            write_json(self.file, {"settings": self.settings, "states": states}, indent=None)


class MixValidation(Sequence[list[Forward]]):
    """The first validation samples of every source, one batch each; forwards of pictures are made when gone through."""

    def __init__(self, sources: Mapping[str, tuple[ShuffledSource, SampleEncoder]], examples: int) -> None:
        """Read them.

        Args:
            sources: streams of validation samples, with encoders of their own.
            examples: how many in all; each source gives as many as the others.

        Raises:
            UserError: a source has none.
        """
        self.made: list[Callable[[], list[Forward]]] = []
        for name, (samples, encoder) in sources.items():
            found = _first(samples, encoder, max(1, examples // len(sources)))
            if not found and samples.first_error:
                raise UserError(
                    f"data.sources.{name}: no sample for validation can be used, the first: {samples.first_error}"
                )
            if not found:
                raise UserError(
                    f"data.sources.{name} has no sample for validation; raise data.val_share, or give "
                    f"data.sources.{name}.val_split"
                )
            self.made += found

    def __len__(self) -> int:
        return len(self.made)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        return self.made[index]()


def _first(samples: ShuffledSource, encoder: SampleEncoder, count: int) -> list[Callable[[], list[Forward]]]:
    found: list[Callable[[], list[Forward]]] = []
    while len(found) < count:
        sample = samples.next()
        if sample is None:
            rest = encoder.rest()
            return found if rest is None else [*found, partial(_itself, rest)]
        try:
            encoder.add(sample)
        except UserError as error:
            samples.skip(error)
            continue
        while len(found) < count and (item := encoder.pop()) is not None:
            found.append(partial(_again, encoder, sample) if sample.exchanges else partial(_itself, item))
    return found


def _itself(item: list[Forward]) -> list[Forward]:
    return item


def _again(encoder: SampleEncoder, sample: RawSample) -> list[Forward]:
    opened = sample.opened()
    assert isinstance(opened, Conversation)
    return encoder.encode(opened)
