"""A share of a source in a seeded order, endless if wished, whose state is a few JSON values.

Rows are taken in blocks of the buffer's size; each block is shuffled, with the seed of (source, share, epoch, block).
So the state needs no copy of a buffer: the reader's mark at the start of the block, and the place in it, are enough.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import islice
from typing import Any

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.data.raw import RawSample
from vlmscope.data.readers import Mark, Reader, Row, Source
from vlmscope.data.share import WHOLE, Share

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
