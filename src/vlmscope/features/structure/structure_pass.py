"""A pass over part of a study's data for what a study does not keep: who fires with whom, and how alike pictures are.

Memory is bounded by the settings: so many items, so many positions of each, drawn at random by the item's id.

Legend: N drawn positions, I items, F features of all layers together, d model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from vlmscope.activations.capture import watching_mlp_inputs
from vlmscope.core.records import generator
from vlmscope.core.study import IMAGE
from vlmscope.features.study.forwards import StudyInput
from vlmscope.models.conversations import by_shape, joined
from vlmscope.scope import Scope


class StructurePass:
    """What fires at drawn positions, each picture's peaks, and its embedding.

    A picture's embedding is the mean of its soft tokens as they enter the decoder: what the model's own tower and
    projector make of it, before any feature reads it.
    """

    def __init__(self, scope: Scope, per_item: int, seed: int = 0) -> None:
        """Nothing seen yet.

        Args:
            scope: the model and its transcoders.
            per_item: positions of an item that are drawn at most.
            seed: of the draw.
        """
        self.scope, self.per_item, self.seed = scope, per_item, seed
        widths = list(scope.transcoders.widths.values())
        self.offsets = dict(zip(scope.transcoders.layers, np.cumsum([0, *widths[:-1]]).tolist(), strict=True))
        self.n_features = sum(widths)
        self._active: list[tuple[np.ndarray, np.ndarray]] = []  # position, feature
        self._peaks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # picture, feature, activation
        self._embeddings: list[np.ndarray] = []
        self._positions = self._pictures = 0

    @torch.no_grad()
    def add(self, inputs: Sequence[StudyInput], forward_tokens: int) -> None:
        """Run the model on some inputs: those of one shape together, at most so many tokens a forward."""
        for group in by_shape([one.tensors for one in inputs]):
            size = max(1, forward_tokens // len(inputs[group[0]].kinds))
            for start in range(0, len(group), size):
                self._forward([inputs[i] for i in group[start : start + size]])

    def active(self) -> Any:
        """[N, F] sparse float32, 1 where a feature fires."""
        return _sparse(self._active, (self._positions, self.n_features))

    def peaks(self) -> Any:
        """[I', F] sparse float32, the largest activation of each feature in each item that has pictures."""
        return _sparse(self._peaks, (self._pictures, self.n_features))

    def embeddings(self) -> np.ndarray:
        """[I', d] float32, of the items that have pictures."""
        return np.concatenate(self._embeddings or [np.zeros((0, self.scope.adapter.d_model), np.float32)])

    def _forward(self, part: Sequence[StudyInput]) -> None:
        kinds = np.stack([one.kinds for one in part])
        soft = np.flatnonzero(kinds[0] == IMAGE)
        rows = [self._drawn(one) for one in part]
        item = np.repeat(np.arange(len(part)), [len(row) for row in rows])
        position = np.concatenate(rows)

        def take(layer: int, x: Tensor) -> None:
            code = self.scope.transcoders[layer].encode(x)
            indices, values = (one.numpy(force=True) for one in (code.indices, code.values.float()))
            at, slot = np.nonzero(values[item, position] > 0)
            self._active.append((self._positions + at, self.offsets[layer] + indices[item, position][at, slot]))
            if len(soft):
                self._add_peaks(layer, indices, values)

        with (
            self._watching_embeddings(soft),
            watching_mlp_inputs(self.scope.adapter, self.scope.transcoders.layers, take),
        ):
            self.scope.adapter.next_logits(joined([one.tensors for one in part]))
        self._positions += len(position)
        self._pictures += len(part) if len(soft) else 0

    def _drawn(self, one: StudyInput) -> np.ndarray:
        """Positions of an item, ascending; the first is left out, where every item begins alike."""
        mask = one.tensors.get("attention_mask")
        valid = np.ones(len(one.kinds), bool) if mask is None else mask[0].bool().numpy(force=True)
        valid[np.flatnonzero(valid)[:1]] = False
        there = np.flatnonzero(valid)
        count = min(self.per_item, len(there))
        return np.sort(generator(self.seed, "positions", one.id).choice(there, count, replace=False))

    def _add_peaks(self, layer: int, indices: np.ndarray, values: np.ndarray) -> None:
        """Largest activations of each item's features, from codes [B, T, k]."""
        size = len(indices)
        width = self.scope.transcoders[layer].config.n_features
        pair = np.arange(size)[:, None, None] * width + indices
        fires = values > 0
        pair, value = pair[fires], values[fires]
        order = np.lexsort((-value, pair))
        pair, first = np.unique(pair[order], return_index=True)
        item, feature = np.divmod(pair, width)
        self._peaks.append((self._pictures + item, self.offsets[layer] + feature, value[order][first]))

    @contextmanager
    def _watching_embeddings(self, soft: np.ndarray) -> Iterator[None]:
        def hook(_module: object, args: tuple, kwargs: dict) -> None:
            if len(soft):
                entering = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
                self._embeddings.append(entering[:, torch.from_numpy(soft)].mean(1).float().numpy(force=True))

        handle = self.scope.adapter.decoder().register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _sparse(parts: Sequence[tuple[np.ndarray, ...]], shape: tuple[int, int]) -> Any:
    if not parts:
        return sparse.csr_array(shape, dtype=np.float32)
    rows, columns = (np.concatenate([part[i] for part in parts]) for i in range(2))
    values = np.concatenate([part[2] for part in parts]) if len(parts[0]) > 2 else np.ones(len(rows))
    return sparse.csr_array((values.astype(np.float32), (rows, columns)), shape=shape)
