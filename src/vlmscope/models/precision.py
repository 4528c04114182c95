"""Float64 that stays float64.

Hugging Face computes RMSNorm, the eager softmax and rotary angles in float32 whatever the model's dtype (`x.float()`,
`dtype=torch.float32`), so a float64 model is only good to about 1e-7. `exact_float64` keeps those casts in float64.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# A product of what stayed float64 with a table that was made in float32 (Gemma 4's pooling weights) would be an error.
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm, torch.nn.functional.linear}


class _KeepFloat64(TorchFunctionMode):
    """Turns a cast of a float64 tensor to float32 into none; float32 models are unmoved."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if func in (Tensor.to, Tensor.type):
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        if func in _PRODUCTS and {torch.float32, torch.float64} <= {a.dtype for a in args if isinstance(a, Tensor)}:
            args = tuple(a.to(torch.float64) if isinstance(a, Tensor) else a for a in args)
        return func(*args, **kwargs)


@contextmanager
def exact_float64() -> Iterator[None]:
    """While active, casts of float64 tensors to float32 leave them in float64; float32 models compute as ever.

    For checks that compare two float64 computations to better than float32's accuracy.
    """
    with _KeepFloat64():
        yield
