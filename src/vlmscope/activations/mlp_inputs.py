"""The transcoders' inputs of a batch, for analyses that need no outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch


@contextmanager
def watching_mlp_inputs(adapter: Adapter, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand every layer's MLP input [B, T, d] to `take(layer, x)` while the model runs, layer after layer."""
    with ExitStack() as stack:
        for layer in layers:

            def hook(_module: Any, args: tuple, layer: int = layer) -> None:
                take(layer, args[0])

            stack.callback(adapter.mlp(layer).register_forward_pre_hook(hook).remove)
        yield


def mlp_inputs(adapter: Adapter, batch: InputBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """MLP inputs by layer [B, T, d] of one unedited forward, with the model's fast kernels."""
    return mlp_inputs_and_logits(adapter, batch, layers)[0]


@torch.no_grad()
def mlp_inputs_and_logits(
    adapter: Adapter, batch: InputBatch, layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """The same with the logits [B, V] of the last position."""
    found: dict[int, Tensor] = {}
    with watching_mlp_inputs(adapter, layers, found.__setitem__):
        logits = adapter.next_logits(batch.tensors)
    return found, logits
