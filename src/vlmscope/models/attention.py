"""Attention patterns and vision towers, recorded, replaced and frozen.

The implementation "vlmscope" of transformers' attention interface is Hugging Face's eager attention,
`softmax(q k^T * scaling + mask) v` with the softmax in float32, whose patterns can be recorded or replaced. Decoder and
vision tower are switched to it separately.

`frozen_vision` makes vision tower and projector affine at one input, for autograd. Every nonlinearity's state there is
a constant:
    attention     the patterns (softmax);
    norms         the scale; the mean that LayerNorm subtracts is linear and stays;
    GELU, SiLU    the gate phi(z) / z of every unit, so that `phi(z) = gate * z` is exact and linear in z;
    gated MLPs    all of `phi(gate)`, so that the product with `up` is linear in `up`.
The ops themselves are intercepted, so that no module of any family has to be rewritten. A second pass at another input
replays the recorded constants in the order of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from vlmscope.core.errors import NoRoom
from vlmscope.models.base import Adapter

IMPLEMENTATION = "vlmscope"
QUERIES = 256  # of a block of a pattern

# What to do with the pattern of each attention module; a module without an entry only computes it.
_recorders: dict[nn.Module, Callable[[Tensor], Any]] = {}
_replacements: dict[nn.Module, Tensor] = {}
_stopping: dict[nn.Module, bool] = {}


class FoundScores(Exception):  # not an error: it ends a run once the scores are known
    """Raised in place of the softmax by the module of `stopping_at_scores`.

    It holds `query [B, H, Tq, D]`, `key [B, Hkv, Tk, D]`, the scores' factor, and their cap or None.
    """

    def __init__(self, query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> None:
        super().__init__("the scores were found")
        self.query, self.key, self.scaling, self.softcap = query, key, scaling, softcap


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
    """The attention function for transformers' `AttentionInterface`; the mask is additive.

    Shapes: query `[B, H, Tq, D]`, key and value `[B, Hkv, Tk, D]`. Scores are scaled by `D ** -0.5` when `scaling` is
    None.

    Returns:
        The mixed values `[B, Tq, H, D]` and the pattern `[B, H, Tq, Tk]` in the dtype of `query`.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    if module in _stopping:
        raise FoundScores(query, key, float(factor), softcap)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    pattern = _replacements.get(module)
    if pattern is None:
        scores = torch.matmul(query, key.transpose(2, 3)) * factor
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = scores + attention_mask
        pattern = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
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


@contextmanager
def _switched(configs: Iterable[Any]) -> Iterator[None]:
    """Switch all modules with these configurations to this implementation, and back on leaving."""
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
    """Put entries into a table, and on leaving restore those of an enclosing context."""
    before = dict(table)
    try:
        table.update(entries)
        yield
    finally:
        table.clear()
        table.update(before)


@contextmanager
def using_vlmscope_attention(adapter: Adapter) -> Iterator[None]:
    """Switch the decoder to this implementation, and back on leaving."""
    owners: list[Any] = [adapter.decoder(), *(adapter.attention(layer) for layer in range(adapter.n_layers))]
    with _switched([adapter.model.config.get_text_config(), *(owner.config for owner in owners)]):
        yield


class Block(NamedTuple):
    """A part of a pattern: some queries, and the keys from the first to the last that any of them sees."""

    queries: slice
    keys: slice
    values: Tensor  # `[H, q, k]`


@dataclass(frozen=True)
class Pattern:
    """A layer's attention probabilities `[H, T, T]`, query and key last, without keys that no query of a block sees.

    A causal pattern takes half of `T^2`, one with a sliding window a number of keys for each query.
    """

    blocks: list[Block]

    @classmethod
    def of(cls, whole: Tensor) -> Pattern:
        """Cut a pattern `[H, T, T]`; one of few queries stays whole."""
        n_positions = whole.shape[1]
        if n_positions <= QUERIES or whole.is_meta:
            return cls([Block(slice(0, n_positions), slice(0, n_positions), whole)])
        blocks = []
        for first in range(0, n_positions, QUERIES):
            queries = slice(first, min(first + QUERIES, n_positions))
            seen = torch.nonzero((whole[:, queries] != 0).any(0).any(0))[:, 0]
            keys = slice(int(seen[0]), int(seen[-1]) + 1) if len(seen) else slice(0, 0)
            blocks.append(Block(queries, keys, whole[:, queries, keys].clone()))
        return cls(blocks)

    @property
    def n_heads(self) -> int:
        """H."""
        return len(self.blocks[0].values)

    @property
    def n_positions(self) -> int:
        """T."""
        return self.blocks[-1].queries.stop

    def to(self, dtype: torch.dtype) -> Pattern:
        """The same in `dtype`."""
        return Pattern([block._replace(values=block.values.to(dtype)) for block in self.blocks])

    def row(self, head: int, query: int) -> Tensor:
        """What a head's query sees, `[T]`."""
        block = next(block for block in self.blocks if query < block.queries.stop)
        row = block.values.new_zeros(self.n_positions)
        row[block.keys] = block.values[head, query - block.queries.start]
        return row

    def whole(self) -> Tensor:
        """`[H, T, T]`."""
        whole = self.blocks[0].values.new_zeros(self.n_heads, self.n_positions, self.n_positions)
        for block in self.blocks:
            whole[:, block.queries, block.keys] = block.values
        return whole

    def reach(self) -> Tensor:
        """The first and the last position that any head lets each query see, or itself: `[2, T]` int64."""
        spans, every = [], torch.arange(self.n_positions, device=self.blocks[0].values.device)
        for queries, keys, values in self.blocks:
            own = every[queries, None]
            seen = torch.cat([torch.where((values > 0).any(0), every[keys], own), own], 1)
            spans.append(torch.stack(seen.aminmax(dim=1)))
        return torch.cat(spans, 1)

    def back(self, gradient: Tensor, above: Tensor, below: Tensor) -> Tensor:
        """From what heads give queries `above [S]` to the values of keys `below [S']`, both ascending.

        `gradient [S, B, Hkv, G, D]`, G query heads to a key/value head -> `[S', B, Hkv, D]`.
        """
        _, n_targets, n_kv_heads, groups, width = gradient.shape
        values = gradient.new_zeros(n_kv_heads, len(below), n_targets * width)
        for queries, keys, block in self.blocks:
            rows, columns = _within(above, queries), _within(below, keys)
            if rows.start == rows.stop or columns.start == columns.stop:
                continue
            part = block[:, _local(above[rows], queries)][:, :, _local(below[columns], keys)]
            # Query heads that share a key/value head add up, so (group, query) is one contracted axis.
            part = part.reshape(n_kv_heads, -1, part.shape[-1])
            by_head = gradient[rows].permute(2, 3, 0, 1, 4).reshape(n_kv_heads, -1, n_targets * width)
            if len(self.blocks) == 1:
                values = torch.bmm(part.transpose(1, 2), by_head)
            else:
                values[:, columns] += torch.bmm(part.transpose(1, 2), by_head)
        return values.view(n_kv_heads, len(below), n_targets, width).permute(1, 2, 0, 3)


def _within(positions: Tensor, span: slice) -> slice:
    """Which of ascending positions lie in a span."""
    first, last = torch.searchsorted(positions, positions.new_tensor([span.start, span.stop])).tolist()
    return slice(first, last)


def _local(positions: Tensor, span: slice) -> Tensor | slice:
    """Ascending positions counted from the start of a span, as a slice where they follow each other."""
    first, last = int(positions[0]) - span.start, int(positions[-1]) - span.start
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions - span.start


Kept = TypeVar("Kept")


@contextmanager
def recording_patterns(
    adapter: Adapter, keep: Callable[[Tensor], Kept] = lambda pattern: pattern
) -> Iterator[dict[int, Kept]]:
    """What is to `keep` of the decoder's attention patterns `[B, H, Tq, Tk]`, detached, of the latest forward inside:
    by layer, as soon as the layer has run; by default the patterns themselves.
    """
    store: dict[int, Kept] = {}

    def recorder(layer: int) -> Callable[[Tensor], None]:
        return lambda pattern: store.__setitem__(layer, keep(pattern))

    recorders = {adapter.attention(layer): recorder(layer) for layer in range(adapter.n_layers)}
    with using_vlmscope_attention(adapter), _entered(_recorders, recorders):
        yield store


@contextmanager
def recording_vision_patterns(adapter: Adapter, layers: Sequence[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Attention patterns of some layers of `Adapter.vision_attention()` in the forwards inside.

    Layer -> patterns `[B, H, S, S]` (detached), one per call of the attention, in order: a tower with windows calls it
    for each of them.
    """
    modules: list[Any] = adapter.vision_attention()
    store: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    recorders = {modules[layer]: patterns.append for layer, patterns in store.items()}
    # The tower's own configuration decides the form of its mask.
    configs = [adapter.model.config.vision_config, *(module.config for module in modules)]
    with _switched(configs), _entered(_recorders, recorders):
        yield store


@contextmanager
def stopping_at_scores(module: nn.Module) -> Iterator[None]:
    """Let an attention module that uses this implementation raise `FoundScores` instead of its softmax."""
    with _entered(_stopping, {module: True}):
        yield


@contextmanager
def replacing_patterns(adapter: Adapter, patterns: Mapping[int, Tensor]) -> Iterator[None]:
    """Use given attention patterns `[B or 1, H, Tq, Tk]` in these decoder layers; the others compute their own."""
    replacements = {adapter.attention(layer): pattern for layer, pattern in patterns.items()}
    with using_vlmscope_attention(adapter), _entered(_replacements, replacements):
        yield


_functional = nn.functional
# Functions whose whole result is a constant; the factors next to it carry the gradient.
_WHOLE = {getattr(owner, name) for name in ("softmax", "rsqrt", "sigmoid", "tanh", "erf") for owner in (torch, Tensor)}
_WHOLE.add(_functional.softmax)
# Elementwise functions that are 0 at 0: result = (result / input) * input.
_UNITS = {_functional.gelu, _functional.silu, _functional.relu, torch.relu, Tensor.relu, torch.clamp, Tensor.clamp}
_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}


# Constants in memory, in all; large ones beyond it are kept in files. The patterns of one layer of 4,096 patches and 16
# heads take 1 GiB in float32.
KEPT_BYTES, LARGE_BYTES = 1 << 30, 1 << 20


def in_file(value: Tensor) -> Tensor:
    """The same numbers in a file without a name, whose pages the system drops when it needs memory."""
    bits = value.contiguous().view(torch.uint8)
    with TemporaryFile() as file:
        try:
            file.write(bits.numpy().data)
            file.flush()
        except OSError as error:
            raise NoRoom(f"the frozen vision tower needs more room for temporary files: {error}") from error
        return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=tuple(bits.shape))).view(value.dtype)


class FrozenVision(TorchFunctionMode):
    """While active, freezes the states listed above; the first pass records them, those in `replaying` reuse them."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0  # of the constants
        self.constants: list[Tensor] = []  # in the order of calls
        self._next: Iterator[Tensor] | None = None

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Use the recorded constants in the forward inside instead of its own."""
        self._next = iter(self.constants)
        try:
            yield
        finally:
            self._next = None

    def keep(self, compute: Callable[[], Tensor]) -> Tensor:
        """A constant: computed and recorded, or the one recorded at this call of the first pass."""
        if self._next is not None:
            return next(self._next)
        value = compute().detach()
        self._bytes += value.nbytes
        if self._bytes > KEPT_BYTES and value.nbytes >= LARGE_BYTES and value.device.type == "cpu":
            value = in_file(value)
        self.constants.append(value)
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and x.requires_grad):
            return func(*args, **kwargs)
        exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
        is_root = func in _POWERS and isinstance(exponent, float | int) and exponent < 0
        if func in _WHOLE or is_root:
            return self.keep(lambda: func(*args, **kwargs))
        if func in _UNITS:  # the gate is set to 0 where x is 0: the result is 0 there too
            return x * self.keep(lambda: torch.where(x == 0, 0.0, func(*args, **kwargs) / torch.where(x == 0, 1.0, x)))
        if func is _functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        assert func is not _functional.scaled_dot_product_attention, "a fused attention hides its pattern"
        return func(*args, **kwargs)

    # Parameter names are those of `torch.nn.functional.layer_norm`, which is also called with keywords.
    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        assert len(normalized_shape) == 1, "a LayerNorm over several axes"
        centred = input - input.mean(-1, keepdim=True)
        wide = centred if centred.dtype == torch.float64 else centred.float()
        out = centred * self.keep(lambda: torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).to(input.dtype))
        out = out if weight is None else out * weight
        return out if bias is None else out + bias


@contextmanager
def frozen_vision(adapter: Adapter, again: FrozenVision | None = None) -> Iterator[FrozenVision]:
    """Freeze the vision path of a model in the forwards inside; enter it inside `exact_float64` in float64.

    With the constants of an earlier pass if they are given (`again`).
    """
    mode = again or FrozenVision()

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return mode.keep(lambda: output) if output.requires_grad else output

    with ExitStack() as stack:
        stack.enter_context(recording_vision_patterns(adapter, []))  # eager attention: a fused kernel hides its softmax
        for module in adapter.vision_tower().modules():  # gated MLPs: all of phi(gate)
            if hasattr(module, "gate_proj") and hasattr(module, "act_fn"):
                stack.callback(module.act_fn.register_forward_hook(keep).remove)
        stack.enter_context(mode)
        if again is not None:
            stack.enter_context(mode.replaying())
        yield mode
