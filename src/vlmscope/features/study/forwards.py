"""The forwards of a study: rows of data as inputs of the model, each with the record by which it is found again,
and the model with every feature of every layer watched.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.capture import watching_mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.records import Document, PatchBox
from vlmscope.core.study import ANSWER, IMAGE, KINDS, TEXT
from vlmscope.data.folder import NumberedRow
from vlmscope.data.samples import RawSample
from vlmscope.features.study.items import (
    geometry_row,
)
from vlmscope.features.study.tables import LayerStudy, Tokens
from vlmscope.models.conversations import LOSS_MASK, by_shape, encode, joined
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope

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


GATHERED = 64 << 20  # bytes of activations of all layers that wait at most, besides those of one forward


class StudyPass:
    """Counts and kept examples of all layers.

    Attributes:
        layers: by number.
        positions: `[3]` int64, positions gone through by `KINDS`.
        items: inputs gone through.
        own_seconds: spent on codes and on what is made of them, the model's own work not included.
    """

    def __init__(self, scope: Scope, n: int, m: int, window: int, only: Mapping[int, Tensor] | None = None) -> None:
        """Nothing seen yet.

        Args:
            scope: the model and its transcoders.
            n: strongest items a feature.
            m: items a feature drawn at random.
            window: text positions around the peak.
            only: layer -> features [F'], when not all of all layers are wanted.
        """
        self.scope = scope
        chosen = dict.fromkeys(scope.transcoders.layers) if only is None else dict(sorted(only.items()))
        self.layers = {
            layer: LayerStudy(scope.transcoders[layer].config.n_features, n, m, window, scope.adapter.device, features)
            for layer, features in chosen.items()
        }
        self.positions = np.zeros(len(KINDS), dtype=np.int64)
        self.items, self.own_seconds = 0, 0.0
        self.forwards: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # ids, kinds, valid positions
        self.waiting: dict[int, list[Tensor]] = {layer: [] for layer in self.layers}
        self.waiting_bytes = 0

    @torch.no_grad()
    def add(self, inputs: Sequence[StudyInput], forward_tokens: int) -> None:
        """Run the model on some inputs: those of one shape together, at most so many tokens a forward."""
        for group in by_shape([one.tensors for one in inputs]):
            length = len(inputs[group[0]].kinds)
            size = max(1, forward_tokens // length)
            for start in range(0, len(group), size):
                part = [inputs[i] for i in group[start : start + size]]
                ids = np.array([one.id for one in part])
                tensors = joined([one.tensors for one in part])
                with self.watching(ids, np.stack([one.kinds for one in part]), tensors.get("attention_mask")):
                    self.scope.adapter.next_logits(tensors)
        self.settle()

    @contextmanager
    def watching(self, ids: np.ndarray, kinds: np.ndarray, mask: Tensor | None = None) -> Iterator[None]:
        """Around one forward of items, whose activations are looked at when there are enough, or at `settle`.

        Args:
            ids: `[B]` int64, each given once in all.
            kinds: `[B, T]` of `KINDS`.
            mask: `[B, T]`, 0 at padding.
        """
        valid = np.ones(kinds.shape, dtype=bool) if mask is None else mask.bool().numpy(force=True)
        chosen = None if valid.all() else torch.from_numpy(valid).to(self.scope.adapter.device)

        def take(layer: int, x: Tensor) -> None:
            self.waiting[layer].append(x.detach().flatten(0, 1) if chosen is None else x.detach()[chosen])
            self.waiting_bytes += self.waiting[layer][-1].nbytes

        with watching_mlp_inputs(self.scope.adapter, list(self.layers), take):
            yield
        self.forwards.append((ids, kinds, valid))
        self.positions += np.bincount(kinds[valid], minlength=len(KINDS))
        self.items += len(ids)
        if self.waiting_bytes > GATHERED:
            self.settle()

    def settle(self) -> None:
        """Look at the activations that wait: small forwards one by one would cost more than their arithmetic."""
        if not self.forwards:
            return
        began = time.perf_counter()
        ids = np.concatenate([ids for ids, _, _ in self.forwards])
        kinds = [row for _, kinds, _ in self.forwards for row in kinds]
        valid = [row for _, _, valid in self.forwards for row in valid]
        tokens = Tokens.of(ids, kinds, valid, self.scope.adapter.device)
        for layer, study in self.layers.items():
            found = self.waiting.pop(layer)
            study.add(self.scope.transcoders[layer].encode(found[0] if len(found) == 1 else torch.cat(found)), tokens)
            self.waiting[layer] = []
        self.forwards, self.waiting_bytes = [], 0
        self.own_seconds += time.perf_counter() - began
