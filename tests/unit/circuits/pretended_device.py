"""A second device that is not there: tensors are marked as lying on it, and what torch would refuse is refused.

Without a GPU no test can run on one. Inside `PretendDevice` tensors that were marked say that they lie on cuda:0, what
is computed from them is marked too, and an operation that mixes marked and unmarked tensors fails as it does there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)


def marked(value: Any) -> bool:
    """Whether it is a tensor on the pretended device."""
    return isinstance(value, Tensor) and getattr(value, "_pretended", False)


def mark(value: Any, on: bool = True) -> Any:
    """The tensors of a structure, now on the pretended device; or off it."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            leaf._pretended = on  # type: ignore[attr-defined]
        return leaf

    return tree_map(one, value)


def move(module: nn.Module) -> nn.Module:
    """A module's parameters and buffers, marked."""
    for tensor in (*module.parameters(), *module.buffers()):
        mark(tensor)
    return module


class PretendDevice(TorchFunctionMode):
    """Inside it, marked tensors behave as if they lay on another device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if marked(args[0]) else func(*args)
        if func is Tensor.cpu:
            return mark(args[0].view_as(args[0]), False)
        if func is Tensor.numpy and marked(args[0]) and not kwargs.get("force"):
            raise TypeError("can't convert a tensor on cuda:0 to numpy")
        if func is Tensor.to or kwargs.get("device") is not None:
            return self._placed(func, args, kwargs)
        self._check(func, args, kwargs)
        found = func(*args, **kwargs)
        there = any(map(marked, tree_leaves((args, kwargs))))
        return mark(found) if there and func is not Tensor.numpy else found

    def _placed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call that says where its result lies."""
        there = marked(args[0]) if func is Tensor.to else False
        given = []
        for place in args[1:] if func is Tensor.to else ():
            named = isinstance(place, torch.device | str)
            if named or isinstance(place, Tensor):
                there = torch.device(place).type == DEVICE.type if named else marked(place)
            given.append(torch.device("cpu") if named else place)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        found = func(*((args[0], *given) if func is Tensor.to else args), **kwargs)
        if func is Tensor.to and found is args[0] and there != marked(found):
            found = found.view_as(found)
        return mark(found, there)

    def _check(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what mixes devices. Scalars may lie anywhere, and indices on the CPU serve every tensor."""
        if func in (Tensor.copy_, Tensor.set_):
            return
        name = getattr(func, "__name__", str(func))
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("__getitem__", "__setitem__") and marked(args[0]):
            leaves = [args[0], *(leaf for leaf in args[2:] if isinstance(leaf, Tensor))]
        places = {marked(leaf) for leaf in leaves if leaf.ndim}
        if len(places) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
