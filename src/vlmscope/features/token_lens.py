"""Logit lens (nostalgebraist 2020) on positions of a prompt: what the residual stream would say if it ended there.

The stream before each layer, and after the last, goes through the model's final norm and unembedding. Legend: B
prompts, P positions, L layers, K words, V vocabulary, d width.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch

_ROWS = 32  # positions whose logits are in memory at once: 262,144 words in float32 are 1 MiB each


@dataclass(frozen=True)
class TokenLens:
    """What every state says at every position. States are numbered 0 (before the first layer) to L (after the last).

    Attributes:
        top: `[B, L + 1, P, K]` int64, the most probable tokens, most probable first.
        probability: `[B, L + 1, P, K]` float64.
        rank: `[B, L + 1, P]` int64, how many tokens are more probable than the word asked for.
        word_probability: `[B, L + 1, P]` float64.
    """

    top: np.ndarray
    probability: np.ndarray
    rank: np.ndarray
    word_probability: np.ndarray

    def first_state(self, within: int = 1) -> np.ndarray:
        """`[B]` int64: the first state with the word among its `within` most probable at any position; -1 for none."""
        seen = self.rank.min(2) < within
        return np.where(seen.max(1), seen.argmax(1), -1)


@torch.no_grad()
def token_lens(
    adapter: Adapter, batch: InputBatch, positions: np.ndarray, words: list[int], count: int = 3
) -> TokenLens:
    """Read every state at some positions.

    Args:
        adapter: of the model.
        batch: B prompts.
        positions: `[P]` int64.
        words: B token ids, the word to look for in each prompt.
        count: K.

    Raises:
        UserError: logits overflow.
    """
    states = _states(adapter, batch)
    where = torch.from_numpy(positions)
    target = torch.tensor(words)
    rows = [_read(adapter, state[:, where.to(state.device)], target.to(state.device), count) for state in states]
    top, probability, rank, word = (np.stack([row[i] for row in rows], axis=1) for i in range(4))
    return TokenLens(top, probability, rank, word)


def _states(adapter: Adapter, batch: InputBatch) -> list[Tensor]:
    """L + 1 states `[B, T, d]` of the residual stream."""
    norms = [adapter.norms(layer).attn_in for layer in range(adapter.n_layers)] + [adapter.final_norm()]
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for number, norm in enumerate(norms):

            def hook(_module: Any, args: tuple, number: int = number) -> None:
                found[number] = args[0]

            stack.callback(norm.register_forward_pre_hook(hook).remove)
        adapter.forward(batch.tensors, use_cache=False)
    return [found[number] for number in range(len(norms))]


def _read(adapter: Adapter, state: Tensor, target: Tensor, count: int) -> tuple[np.ndarray, ...]:
    """Top tokens, their probabilities, the target's rank and probability at `[B, P, d]`."""
    size, length = state.shape[:2]
    flat, wanted = state.flatten(0, 1), target.repeat_interleave(length)
    found: list[tuple[Tensor, ...]] = []
    for start in range(0, len(flat), _ROWS):
        logits = adapter.finite(adapter.lm_head()(adapter.final_norm()(flat[start : start + _ROWS]))).double()
        if adapter.logit_softcap is not None:
            logits = torch.tanh(logits / adapter.logit_softcap) * adapter.logit_softcap
        words = wanted[start : start + _ROWS, None]
        mine = logits.gather(1, words)
        probabilities = logits.softmax(-1)
        best = probabilities.topk(min(count, logits.shape[-1]))
        found.append((best.indices, best.values, (logits > mine).sum(1), probabilities.gather(1, words)[:, 0]))
    parts = (torch.cat(part).numpy(force=True) for part in zip(*found, strict=True))
    return tuple(part.reshape(size, length, *part.shape[1:]) for part in parts)
