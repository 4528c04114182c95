"""Eager attention whose patterns can be recorded or replaced, as the implementation "vlmscope" of transformers.

The computation is that of Hugging Face's eager attention, `softmax(q k^T * scaling + mask) v` with the softmax in
float32; grouped key/value heads are repeated. Decoder and vision tower are switched to it apart from each other.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from vlmscope.models.base import Adapter
from vlmscope.models.families import adapter_for

IMPLEMENTATION = "vlmscope"

# What to do with each attention module's pattern; a module without an entry just computes.
_recorders: dict[nn.Module, Callable[[Tensor], Any]] = {}
_replacements: dict[nn.Module, Tensor] = {}
_stopping: dict[nn.Module, bool] = {}


class AttentionInput(NamedTuple):
    """What an attention module is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class FoundScores(Exception):  # no error: it ends a run that has what it was for
    """Raised by a module that `stopping_at_scores` names, in place of its softmax.

    Attributes:
        query: `[B, H, Tq, D]`.
        key: `[B, Hkv, Tk, D]`.
        scaling: factor of the scores.
        softcap: cap of the scores, or None.
    """

    def __init__(self, query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> None:
        super().__init__("the scores were found")
        self.query, self.key, self.scaling, self.softcap = query, key, scaling, softcap


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
    if module in _stopping:
        raise FoundScores(query, key, query.shape[-1] ** -0.5 if scaling is None else float(scaling), softcap)
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
        _recorders[module](pattern.detach())
    return torch.matmul(pattern, value).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)


def _as_adapter(model: Any) -> Adapter:
    return model if isinstance(model, Adapter) else adapter_for(model)


@contextmanager
def _switched(configs: Iterable[Any]) -> Iterator[None]:
    """Switch all modules that read these configurations to this implementation, and back on leaving."""
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
def _entered(table: dict[nn.Module, Any], entries: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Put entries into a table, and back on leaving what an enclosing context had there."""
    before = {module: table.get(module) for module in entries}
    try:
        table.update(entries)
        yield
    finally:
        for module, value in before.items():
            if value is None:
                table.pop(module, None)
            else:
                table[module] = value


@contextmanager
def using_vlmscope_attention(model: Any) -> Iterator[None]:
    """Switch the decoder of a model (or of an adapter's model) to this implementation, and back on leaving."""
    adapter = _as_adapter(model)
    owners: list[Any] = [adapter.decoder(), *(adapter.attention(layer) for layer in range(adapter.n_layers))]
    with _switched([adapter.model.config.get_text_config(), *(owner.config for owner in owners)]):
        yield


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
    recorders = {adapter.attention(layer): partial(store.__setitem__, layer) for layer in range(adapter.n_layers)}
    with using_vlmscope_attention(adapter), _entered(_recorders, recorders):
        yield store


@contextmanager
def recording_vision_patterns(model: Any, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Record the attention patterns of some layers of the vision tower; the others keep nothing.

    Args:
        model: a Hugging Face model or an adapter.
        layers: indices into `Adapter.vision_attention()`.

    Yields:
        A dict that forwards fill: layer -> patterns `[B, H, S, S]` (detached), one a call of the attention in the order
        of calls. A tower that attends within windows calls it for each of them.

    Raises:
        UserError: the tower's attention cannot be recorded.
    """
    adapter = _as_adapter(model)
    modules: list[Any] = adapter.vision_attention()
    store: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    recorders = {modules[layer]: found.append for layer, found in store.items()}
    # The tower's own configuration decides in which form it makes its mask.
    configs = [adapter.model.config.vision_config, *(module.config for module in modules)]
    with _switched(configs), _entered(_recorders, recorders):
        yield store


@contextmanager
def stopping_at_scores(module: nn.Module) -> Iterator[None]:
    """Let an attention module of a model that uses this implementation raise `FoundScores` with its query and key."""
    with _entered(_stopping, {module: True}):
        yield


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
    with using_vlmscope_attention(adapter), _entered(_replacements, given):
        yield
