"""Eager attention whose patterns can be recorded or replaced, as the implementation "vlmscope" of transformers.

The computation is that of Hugging Face's eager attention, `softmax(q k^T * scaling + mask) v` with the softmax in
float32; grouped key/value heads are repeated. Only the decoder uses it, a vision tower keeps its own implementation.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from vlmscope.models.base import Adapter, adapter_for

IMPLEMENTATION = "vlmscope"

# What to do with each attention module's pattern; a module without an entry just computes.
_recorders: dict[nn.Module, tuple[dict[int, Tensor], int]] = {}
_replacements: dict[nn.Module, Tensor] = {}


def _repeat_heads(states: Tensor, n_repeats: int) -> Tensor:
    return states if n_repeats == 1 else states.repeat_interleave(n_repeats, dim=1)


def _pattern(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    """The attention probabilities `[B, H, Tq, Tk]` in the dtype of `query`."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return nn.functional.dropout(pattern, p=dropout, training=module.training)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The attention function with the signature that transformers' `AttentionInterface` asks for.

    Args:
        module: the attention module, which knows its number of key/value groups.
        query: `[B, H, Tq, D]`.
        key: `[B, Hkv, Tk, D]`.
        value: `[B, Hkv, Tk, D]`.
        attention_mask: additive, broadcastable to `[B, H, Tq, Tk]`.
        dropout: probability, used in training mode only.
        scaling: factor of the scores, `D ** -0.5` when None.
        softcap: cap of the scores, or None.

    Returns:
        The mixed values `[B, Tq, H, D]` and the pattern `[B, H, Tq, Tk]`.
    """
    key = _repeat_heads(key, query.shape[1] // key.shape[1])
    value = _repeat_heads(value, query.shape[1] // value.shape[1])
    pattern = _replacements.get(module)
    if pattern is None:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        pattern = _pattern(module, query, key, attention_mask, dropout, factor, softcap)
    else:
        expected = (query.shape[1], query.shape[2], key.shape[2])
        if tuple(pattern.shape[1:]) != expected:
            raise ValueError(f"replacement pattern has shape {tuple(pattern.shape)}, the run needs [B, *{expected}]")
        pattern = pattern.to(query.dtype)
    if module in _recorders:
        store, layer = _recorders[module]
        store[layer] = pattern.detach()
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def _as_adapter(model: Any) -> Adapter:
    return model if isinstance(model, Adapter) else adapter_for(model)


@contextmanager
def using_vlmscope_attention(model: Any) -> Iterator[None]:
    """Switch the decoder of a model (or of an adapter's model) to this implementation, and back on leaving."""
    adapter = _as_adapter(model)
    owners = [adapter.decoder(), *(adapter.attention(layer) for layer in range(adapter.n_layers))]
    configs: list[Any] = [adapter.model.config.get_text_config(), *(owner.config for owner in owners)]
    unique = list({id(config): config for config in configs}.values())
    before = [config._attn_implementation for config in unique]
    try:
        for config in unique:
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for config, implementation in zip(unique, before, strict=True):
            config._attn_implementation = implementation


@contextmanager
def recording_patterns(model: Any) -> Iterator[dict[int, Tensor]]:
    """Record the decoder's attention patterns.

    Args:
        model: a Hugging Face model or an adapter.

    Yields:
        A dict that each forward fills: layer -> pattern `[B, H, Tq, Tk]` (of the latest forward, detached).
    """
    adapter = _as_adapter(model)
    store: dict[int, Tensor] = {}
    modules = {adapter.attention(layer): layer for layer in range(adapter.n_layers)}
    before = {module: _recorders.get(module) for module in modules}
    with using_vlmscope_attention(adapter):
        try:
            _recorders.update({module: (store, layer) for module, layer in modules.items()})
            yield store
        finally:
            _restore(_recorders, before)


@contextmanager
def replacing_patterns(model: Any, patterns: Mapping[int, Tensor]) -> Iterator[None]:
    """Use given attention patterns in the decoder instead of computed ones.

    Args:
        model: a Hugging Face model or an adapter.
        patterns: layer -> `[B or 1, H, Tq, Tk]`; layers that are not named compute their own.

    Raises:
        ValueError: in the forward, when a pattern does not fit the run.
    """
    adapter = _as_adapter(model)
    given = {adapter.attention(layer): pattern for layer, pattern in patterns.items()}
    before = {module: _replacements.get(module) for module in given}
    with using_vlmscope_attention(adapter):
        try:
            _replacements.update(given)
            yield
        finally:
            _restore(_replacements, before)


def _restore(table: dict[nn.Module, Any], before: Mapping[nn.Module, Any]) -> None:
    """Put back what an enclosing context had, so that contexts nest."""
    for module, value in before.items():
        if value is None:
            table.pop(module, None)
        else:
            table[module] = value
