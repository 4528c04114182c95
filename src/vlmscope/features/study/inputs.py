"""Rows of data as inputs of the model, each with the record by which it is found again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vlmscope.core.conversation import Document
from vlmscope.core.errors import UserError
from vlmscope.core.images import PatchBox
from vlmscope.core.study import ANSWER, IMAGE, TEXT
from vlmscope.data.numbered import NumberedRow
from vlmscope.data.raw import RawSample
from vlmscope.features.study.items import geometry_row
from vlmscope.models.conversations import LOSS_MASK, encode
from vlmscope.models.loading import VLM

_LOG = logging.getLogger(__name__)
PARTS = 256  # inputs of one row at most, so that an id is row and part


@dataclass(frozen=True)
class StudyInput:
    """One input of the model.

    Attributes:
        id: row number * `PARTS` + part.
        tensors: arguments of the model's forward, batch size 1.
        kinds: `[T]` uint8 of `core.study.KINDS`.
        record: its row of the table of items.
    """

    id: int
    tensors: dict[str, Tensor]
    kinds: np.ndarray
    record: dict[str, Any]


class InputMaker:
    """Makes inputs of rows, counts the rows that give none, and collects where soft tokens lie.

    Attributes:
        geometries: rows of the table of geometries that are new since they were taken out.
        skipped: rows without an input, by source.
    """

    def __init__(self, vlm: VLM, max_tokens: int, max_skipped: int) -> None:
        """Nothing made yet.

        Args:
            vlm: the model.
            max_tokens: what is longer is cut off.
            max_skipped: rows that may be unusable.
        """
        self.vlm, self.max_tokens, self.max_skipped = vlm, max_tokens, max_skipped
        self.geometries: list[dict[str, Any]] = []
        self.known: set[str] = set()
        self.skipped: dict[str, int] = {}

    def __call__(self, rows: Sequence[NumberedRow]) -> list[StudyInput]:
        """The inputs of a batch of rows, in order.

        Raises:
            UserError: more rows cannot be used than may be.
        """
        found: list[StudyInput] = []
        for row in rows:
            try:
                found += self._inputs(row)
            except UserError as error:
                self._skip(row.source, error)
        return found

    def _skip(self, source: str, error: UserError) -> None:
        self.skipped[source] = self.skipped.get(source, 0) + 1
        total = sum(self.skipped.values())
        if total > self.max_skipped:
            raise UserError(
                f"{total} rows of the data cannot be used, the last: {error}; mend the data, or raise "
                f"study.max_skipped={self.max_skipped}"
            ) from error
        if self.skipped[source] == 1:
            _LOG.warning("%s; such rows of %s are left out and counted", error, source)

    def _inputs(self, row: NumberedRow) -> list[StudyInput]:
        raw = row.read()
        sample = raw.opened()
        sizes = [] if isinstance(sample, Document) else [picture.size for picture in sample.images]
        forwards = encode(self.vlm, sample, self.max_tokens)
        if len(forwards) > PARTS:
            raise UserError(f"{raw.origin}: {len(forwards)} inputs of one row, at most {PARTS}; divide it")
        return [self._input(row, part, raw, sizes, forward) for part, forward in enumerate(forwards)]

    def _input(
        self, row: NumberedRow, part: int, raw: RawSample, sizes: Sequence[tuple[int, int]], forward: dict[str, Tensor]
    ) -> StudyInput:
        adapter = self.vlm.adapter
        ids = forward["input_ids"][0].numpy(force=True)
        kinds = np.full(len(ids), TEXT, dtype=np.uint8)
        if raw.exchanges:
            kinds[forward[LOSS_MASK][0].numpy(force=True)] = ANSWER
        kinds[ids == adapter.soft_token_id()] = IMAGE
        tensors = {name: tensor for name, tensor in forward.items() if name != LOSS_MASK}
        boxes = adapter.soft_token_boxes(tensors, sizes, getattr(self.vlm.processor, "image_processor", None))
        if sum(map(len, boxes)) != int((kinds == IMAGE).sum()):
            raise UserError(
                f"{raw.origin}: {int((kinds == IMAGE).sum())} soft tokens where the model's pictures have "
                f"{sum(map(len, boxes))}; use the processor that was saved with the model"
            )
        number = row.number * PARTS + part
        record = {
            "item": number,
            "source": row.source,
            "row": row.source_row,
            "part": part,
            "origin": raw.origin,
            "digest": raw.digest().hex(),
            "users": [turn.user for turn in raw.exchanges],
            "assistants": [turn.assistant for turn in raw.exchanges],
            "text": raw.text,
            "n_pictures": len(sizes),
            "token_ids": ids.astype(np.int32),
            "kinds": kinds,
            "geometry": self._geometry(boxes),
        }
        return StudyInput(number, tensors, kinds, record)

    def _geometry(self, boxes: list[list[PatchBox]]) -> str:
        numbers = np.array([box for found in boxes for box in found], dtype=np.float64)
        key = hashlib.sha256(repr([len(found) for found in boxes]).encode() + numbers.tobytes()).hexdigest()[:16]
        if key not in self.known:
            self.known.add(key)
            self.geometries.append(geometry_row(key, boxes))
        return key
