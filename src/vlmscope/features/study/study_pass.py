"""The model's forward with every feature of every layer watched."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.mlp_inputs import watching_mlp_inputs
from vlmscope.core.study import KINDS
from vlmscope.features.study.inputs import StudyInput
from vlmscope.features.study.layer_study import LayerStudy, Tokens
from vlmscope.models.conversations import by_shape, joined
from vlmscope.scope import Scope

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
