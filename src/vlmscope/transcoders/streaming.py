"""Matrices whose rows stay in a memory-mapped file, for sets that are too wide for memory.

A block of features is read for the encoder's product, while the kernel already fetches the next one; of decoders only
the rows of active features are read. The pages of what was read are given back at once, so that neither the process nor
the page cache has to hold a set.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vlmscope.core.errors import UserError

BLOCK = 4096  # features whose pre-activations are computed at once: 42 MB of encoder in float32 at a width of 2560
_ROWS = 16  # rows that are gathered at once: each may bring 64 kB of pages around it
_LIBC = ctypes.CDLL(None) if hasattr(mmap, "MADV_WILLNEED") else None  # Windows has no such advice
_ATEN = torch.ops.aten
_BAGS = (_ATEN._embedding_bag.default, _ATEN._embedding_bag_forward_only.default)
_BAG_SLOPES = _ATEN._embedding_bag_per_sample_weights_backward.default
_FRESH = (_ATEN.new_zeros.default, _ATEN.new_empty.default, _ATEN.new_full.default, _ATEN.new_ones.default)


class StreamedRows(Tensor):
    """A matrix [F, d] in a mapped file that is used as a tensor of a dtype and device, without a gradient.

    Slices are views, `rows[index]` and bags of rows read these rows, and any other operation reads the whole matrix.
    """

    # Else results would be of this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    _stored: Tensor
    _start: int
    _held: tuple[Tensor, Tensor] | None

    @staticmethod
    def __new__(
        cls,
        stored: Tensor,
        dtype: torch.dtype,
        device: torch.device | str,
        span: tuple[int, int] | None = None,
        held: tuple[Tensor, Tensor] | None = None,
    ) -> StreamedRows:
        """Rows of the mapped `stored` [.., d], all or those of `span`; `held` are indices, ascending, and their rows.

        A caller that names its rows in advance (`hold`) reads them once; others stay in the file.
        """
        start, stop = span or (0, len(stored))
        rows = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, (stop - start, *stored.shape[1:]), dtype=dtype, device=torch.device(device)
        )
        rows._stored, rows._start, rows._held = stored, start, held
        return rows

    def _like(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        span: tuple[int, int] | None = None,
        held: tuple[Tensor, Tensor] | None = None,
    ) -> StreamedRows:
        dtype, device = dtype or self.dtype, device or self.device
        if (held := held or self._held) is not None:
            held = held[0].to(device), held[1].to(device, dtype)
        return StreamedRows(self._stored, dtype, device, span or (self._start, self._start + len(self)), held)

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedRows:
        return self._like()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"StreamedRows({list(self.shape)}, dtype={self.dtype}, stored={self._stored.dtype})"

    def whole(self, space: Tensor | None = None) -> Tensor:
        """The rows as an ordinary tensor, in memory of its own or in the first rows of `space`."""
        start, size = self._start, len(self)
        stored = self._stored[start : start + size]
        _advise(stored, "MADV_WILLNEED")
        _advise(self._stored[start + size : start + 2 * size], "MADV_WILLNEED")  # read while these are used
        rows = self._space(size) if space is None else space[:size]
        for part, out in zip(stored.split(BLOCK // 8), rows.split(BLOCK // 8), strict=True):
            out.copy_(part)
            _advise(part, "MADV_DONTNEED")
        return self._checked(rows)

    def rows(self, index: Tensor) -> Tensor:
        """Rows [n, d] of indices [n] int64."""
        if self._held is not None:
            ids, rows = self._held
            return rows[torch.searchsorted(ids, index)]
        used, place = index.unique(return_inverse=True)
        return self.distinct(used)[place]

    def distinct(self, index: Tensor) -> Tensor:
        """Rows [n, d] of ascending indices [n] int64, from the file."""
        used = index.cpu() + self._start
        if self._stored.stride(-1) == 1:
            rows = self._space(len(used))
            for some, out in zip(used.split(_ROWS), rows.split(_ROWS), strict=True):
                for row in some.tolist():
                    _advise(self._stored[row : row + 1], "MADV_WILLNEED")
                out.copy_(self._stored[some])
                _advise(self._stored, "MADV_DONTNEED")
        else:  # a feature is a column of the file, and lies in all its pages
            starts = range(0, len(self._stored), BLOCK)
            bounds = torch.searchsorted(used, torch.tensor([*starts, len(self._stored)])).tolist()
            parts = [
                self._like(span=(start, min(start + BLOCK, len(self._stored)))).whole()[
                    (used[first:last] - start).to(self.device)
                ]
                for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True)
                if first < last
            ]
            rows = torch.cat(parts) if parts else self.new_zeros(0, self.shape[1])
        return self._checked(rows)

    def give_back(self) -> None:
        """Give back all pages of the file, also those of other tensors that were copied from it."""
        _advise(torch.empty(0, dtype=torch.uint8).set_(self._stored.untyped_storage()), "MADV_DONTNEED")

    def _space(self, size: int) -> Tensor:
        """Room for rows [size, d]; on a CPU not in the heap, where blocks and kept rows would leave holes."""
        if self.device.type != "cpu" or size == 0:
            return torch.empty(size, *self.shape[1:], dtype=self.dtype, device=self.device)
        memory = mmap.mmap(-1, size * self.shape[1:].numel() * self.element_size())
        return torch.frombuffer(memory, dtype=self.dtype).view(size, *self.shape[1:])

    def _checked(self, rows: Tensor) -> Tensor:
        if not bool(rows.sum(dtype=torch.promote_types(rows.dtype, torch.float32)).isfinite()):
            raise UserError(
                f"a streamed transcoder holds values that are not finite in {self.dtype}; train or copy the set again"
            )
        return rows

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, own = kwargs or {}, args[0] if args else None
        if func in _BAGS and isinstance(own, cls):
            used, place = args[1].unique(return_inverse=True)
            return func(own.rows(used), place, *args[2:], **kwargs)
        if func is _BAG_SLOPES and not isinstance(own, cls):
            used, place = args[2].unique(return_inverse=True)
            return func(own, args[1].rows(used), place, *args[3:], **kwargs)
        if isinstance(own, cls):
            if func in (_ATEN.detach.default, _ATEN.alias.default):
                return own._like()
            if func is _ATEN._to_copy.default:
                return own._like(kwargs.get("dtype"), kwargs.get("device"))
            if func in _FRESH:
                return func(torch.empty(0, dtype=own.dtype, device=own.device), *args[1:], **kwargs)
            if func is _ATEN.slice.Tensor and own._held is None and args[1:2] == (0,) and args[4:] in ((), (1,)):
                start, stop, _ = slice(*args[2:4]).indices(len(own))
                return own._like(span=(own._start + start, own._start + max(start, stop)))
            if func is _ATEN.select.int and args[1] == 0:
                return own.rows(torch.tensor([args[2] % len(own)], device=own.device))[0]
            if func is _ATEN.index.Tensor and len(args[1]) == 1:
                index = args[1][0].to(own.device)
                index = index.nonzero()[:, 0] if index.dtype == torch.bool else index
                return own.rows(index.flatten()).view(*index.shape, own.shape[1])
        read = [own.whole() if isinstance(own, cls) else own for own in pytree.tree_leaves((args, kwargs))]
        args, kwargs = pytree.tree_unflatten(read, pytree.tree_structure((args, kwargs)))
        return func(*args, **kwargs)


def blocks(rows: Tensor, size: int) -> Iterator[Tensor]:
    """All rows, `size` at a time. Streamed ones share their memory: a block is valid until the next one."""
    space = None
    for block in (rows[first : first + size] for first in range(0, len(rows), size)):
        if isinstance(block, StreamedRows):
            space = block.whole(space)
            block = space
        yield block
    if space is not None and _LIBC is not None and hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)  # else what was freed on the way stays with the process, as much as a layer's rows


def whole(tensor: Tensor) -> Tensor:
    """A tensor in memory."""
    return tensor.whole() if isinstance(tensor, StreamedRows) else tensor


def mapped_bytes(path: Path) -> dict[str, Tensor]:
    """The bytes of each tensor of a valid safetensors file, in the mapped file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        heads = json.loads(file.read(size))
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + size :]
    return {name: mapped[slice(*head["data_offsets"])] for name, head in heads.items() if name != "__metadata__"}


def hold(rows: Tensor, index: Tensor) -> Tensor:
    """The same rows, with those of `index` [n] read once if they are streamed; no others may then be read."""
    if not isinstance(rows, StreamedRows):
        return rows
    used = index.unique()
    return rows._like(held=(used, rows.distinct(used)))


class StreamedList(nn.Module):
    """Decoders to later layers, as buffers in order."""

    def __init__(self, decoders: Sequence[Tensor]) -> None:
        super().__init__()
        for number, decoder in enumerate(decoders):
            self.register_buffer(str(number), decoder)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, number: int) -> Tensor:
        return self.get_buffer(str(number))

    def __iter__(self) -> Iterator[Tensor]:
        return self.buffers()


def _advise(part: Tensor, advice: str) -> None:
    """Tell the kernel what will be done with the pages of mapped rows; nothing where the platform cannot."""
    if _LIBC is None or part.numel() == 0 or not hasattr(mmap, advice):
        return
    page, size = mmap.PAGESIZE, part.element_size()
    runs, step, length = 1, 0, 1 + sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
    if advice == "MADV_WILLNEED" and part.stride(-1) != 1:  # each of its columns is a run in the file
        runs, step, length = part.shape[1], part.stride(1), part.shape[0]
    for run in range(runs):
        first = part.data_ptr() + run * step * size
        begin, end = first // page * page, math.ceil((first + length * size) / page) * page
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), getattr(mmap, advice))
