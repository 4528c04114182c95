"""Mean ablation of whole MLP outputs: how much a layer matters at some positions."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from vlmscope.models.base import Adapter
from vlmscope.models.batching import InputBatch


@torch.no_grad()
def mlp_outputs(adapter: Adapter, batch: InputBatch) -> dict[int, Tensor]:
    """Raw MLP outputs by layer [B, T, d] of one unedited forward."""
    found: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for layer in range(adapter.n_layers):

            def hook(_m: Any, _a: Any, out: Tensor, layer: int = layer) -> None:
                found[layer] = out

            stack.callback(adapter.mlp(layer).register_forward_hook(hook).remove)
        adapter.next_logits(batch.tensors)
    return found


@torch.no_grad()
def mean_ablated(adapter: Adapter, batch: InputBatch, layer: int, where: Tensor, mean: Tensor) -> Tensor:
    """Last-position logits [B, V] when the MLP output of `layer` is `mean` [d] at positions `where` [T] bool."""

    def hook(_m: Any, _a: Any, out: Tensor) -> Tensor:
        replaced = out.clone()
        replaced[:, where] = mean.to(out.dtype)
        return replaced

    handle = adapter.mlp(layer).register_forward_hook(hook)
    try:
        return adapter.next_logits(batch.tensors)
    finally:
        handle.remove()
