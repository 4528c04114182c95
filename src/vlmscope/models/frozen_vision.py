"""The vision tower and projector at one input made affine, for autograd: every nonlinearity's state is a constant.

Frozen are, at the input of the recording pass,
    attention     the patterns (softmax);
    norms         the scale; the mean that LayerNorm subtracts is linear and stays;
    GELU, SiLU    the gate phi(z) / z of every unit, so that `phi(z) = gate * z` is exact and linear in z;
    gated MLPs    all of `phi(gate)`, so that the product with `up` is linear in `up`.
What is left is affine in the patch embeddings, whatever the family, since the ops themselves are caught and no
module is written anew. A second pass at another input replays the recorded constants in the order of calls.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmscope.models.attention import recording_vision_patterns
from vlmscope.models.base import Adapter

_functional = nn.functional
# The whole result is a constant: what it multiplies carries the gradient.
_WHOLE = {
    _functional.softmax,
    torch.softmax,
    Tensor.softmax,
    torch.rsqrt,
    Tensor.rsqrt,
    torch.sigmoid,
    Tensor.sigmoid,
    torch.tanh,
    Tensor.tanh,
    torch.erf,
    Tensor.erf,
}
# Of one number each, and 0 at 0: result = (result / input) * input.
_UNITS = {
    _functional.gelu,
    _functional.silu,
    _functional.relu,
    torch.relu,
    Tensor.relu,
    torch.clamp,
    Tensor.clamp,
}
_POWERS = {torch.pow, Tensor.pow, Tensor.__pow__}


class FrozenVision(TorchFunctionMode):
    """While active, freezes what the module's docstring lists; the first pass records, `replaying` ones reuse.

    Attributes:
        constants: what was frozen, in the order of calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants: list[Tensor] = []
        self._next: Iterator[Tensor] | None = None

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """The forward inside takes the recorded constants instead of its own."""
        self._next = iter(self.constants)
        try:
            yield
        finally:
            self._next = None

    def keep(self, compute: Callable[[], Tensor]) -> Tensor:
        """A constant: computed and recorded, or the one recorded at this place of the first pass."""
        if self._next is not None:
            return next(self._next)
        value = compute().detach()
        self.constants.append(value)
        return value

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else kwargs.get("input")
        if not (isinstance(x, Tensor) and x.requires_grad):
            return func(*args, **kwargs)
        if func in _WHOLE or (func in _POWERS and _negative(args, kwargs)):
            return self.keep(lambda: func(*args, **kwargs))
        if func in _UNITS:
            return x * self.keep(lambda: _secant(x, func(*args, **kwargs)))
        if func is _functional.layer_norm:
            return self._layer_norm(*args, **kwargs)
        assert func is not _functional.scaled_dot_product_attention, "a fused attention hides its pattern"
        return func(*args, **kwargs)

    # The names are those of `torch.nn.functional.layer_norm`, which is called with keywords too.
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


def _negative(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, float | int) and exponent < 0


def _secant(x: Tensor, y: Tensor) -> Tensor:
    """`y / x`, 0 where x is 0 (there y is 0 too)."""
    return torch.where(x == 0, 0.0, y / torch.where(x == 0, 1.0, x))


@contextmanager
def frozen_vision(adapter: Adapter) -> Iterator[FrozenVision]:
    """Freeze the vision path of a model in the forwards inside; enter it inside `exact_float64` in float64.

    Raises:
        UserError: the tower's attention cannot be recorded.
    """
    mode = FrozenVision()

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return mode.keep(lambda: output) if output.requires_grad else output

    with ExitStack() as stack:
        stack.enter_context(recording_vision_patterns(adapter, []))  # patterns by softmax, not by a fused kernel
        for module in adapter.vision_tower().modules():
            if hasattr(module, "gate_proj") and hasattr(module, "act_fn"):
                stack.callback(module.act_fn.register_forward_hook(keep).remove)
        stack.enter_context(mode)
        yield mode
