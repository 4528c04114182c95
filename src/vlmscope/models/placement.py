"""Where a model's weights are: the device that computes, the memory they need, and weights that stay elsewhere.

With offload the weights rest in CPU memory or on disk and come to the computing device module by module (accelerate's
hooks do that around each forward). In between they are on the `meta` device, so that whoever reads a weight directly
asks `materialised` for it.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.core.hub import gb

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "cpu", "disk")
# Beside the weights: buffers, allocator waste, and the tensor that is being converted.
_MARGIN = 1.1


def check_device(device: str, dtype: str = "float32") -> None:
    """Raise a `UserError` when a device is not known, not there, or cannot compute in `dtype`."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"unknown device {device!r}; choose cpu, cuda, cuda:N or mps")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"device {device!r} was asked for but no GPU is usable here; use device cpu")
        index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"device {device!r} was asked for but there are {count} GPUs here; the first is cuda:0")
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps' was asked for but this is no Mac with a usable GPU; use device cpu")
        if dtype == "float64":
            raise UserError("device 'mps' cannot compute in float64; use device cpu, or dtype float32")


def free_bytes(device: str) -> int | None:
    """Memory that a device has left, in bytes; None when that cannot be found out."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    known = [found for found in (_available_memory(), _cgroup_memory()) if found is not None]
    return min(known, default=None)


def _available_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:  # not Linux: all that there is, an upper bound
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _cgroup_memory() -> int | None:
    """What a container may still take: its limit less what it holds, page cache that can go not counted."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        held = int((root / "memory.current").read_text(encoding="ascii"))
        words = dict(line.split() for line in (root / "memory.stat").read_text(encoding="ascii").splitlines())
        return int(limit) - held + int(words.get("inactive_file", 0))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Needs:
    """What a model's weights take.

    Attributes:
        n_parameters: how many, shared ones once.
        largest: of the largest module, which offload moves as a whole.
    """

    n_parameters: int
    largest: int

    @classmethod
    def of(cls, model: nn.Module) -> "Needs":
        """Of any model, on the `meta` device too."""
        largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
        return cls(sum(p.numel() for p in model.parameters()), largest)

    def at(self, dtype: str, device: str, offload: str) -> dict[str, float]:
        """Bytes on each device, with a margin."""
        size = DTYPES[dtype].itemsize * _MARGIN
        everything, one = self.n_parameters * size, self.largest * size
        if offload == "none":
            return {device: everything}
        return {device: one, **({"cpu": everything} if offload == "cpu" else {})}


def check_memory(needs: Needs, what: str, dtype: str, device: str, offload: str) -> None:
    """Raise a `UserError` that says what would fit when the weights do not.

    Args:
        needs: of the model.
        what: its name, for the message.
        dtype: key of `DTYPES`.
        device: the computing device.
        offload: one of `OFFLOADS`.
    """
    short = _short(needs, dtype, device, offload)
    if short is None:
        return
    where, asked, free = short
    narrower = [(d, offload) for d in ("float32", "bfloat16") if DTYPES[d].itemsize < DTYPES[dtype].itemsize]
    elsewhere = [(dtype, o) for o in OFFLOADS if o not in ("none", offload) and (o, device) != ("cpu", "cpu")]
    both = [("bfloat16", o) for _, o in elsewhere if DTYPES[dtype].itemsize > 2]
    fitting = [
        option for option in (*narrower, *elsewhere, *both) if _short(needs, option[0], device, option[1]) is None
    ]
    said = [_option(needs, dtype, device, offload, *option) for option in fitting[:2]]
    advice = ", ".join(said) or "nothing of it fits: choose a smaller model or a larger machine"
    raise UserError(f"{what} needs about {gb(asked)} in {dtype} on {where}, {gb(free)} are free; {advice}")


def check_room(asked: float, what: str, device: str, advice: str) -> None:
    """Raise a `UserError` when a device has fewer than `asked` bytes left.

    Args:
        asked: bytes.
        what: that needs them, in the plural, for the message.
        device: a torch device's name.
        advice: what to do then.
    """
    free = free_bytes(device)
    if free is not None and asked > free:
        raise UserError(f"{what} need about {gb(asked)} on {device}, {gb(free)} are free; {advice}")


def _short(needs: Needs, dtype: str, device: str, offload: str) -> tuple[str, float, float] | None:
    """The first device with too little: its name, the bytes asked for and those that are free."""
    for where, asked in needs.at(dtype, device, offload).items():
        free = free_bytes(where)
        if free is not None and asked > free:
            return where, asked, free
    return None


def _option(needs: Needs, dtype: str, device: str, offload: str, other: str, elsewhere: str) -> str:
    keys = [f"model.dtype={other}"] if other != dtype else []
    keys += [f"model.offload={elsewhere}"] if elsewhere != offload else []
    asked = needs.at(other, device, elsewhere)
    return f"{' '.join(keys)} needs {' and '.join(f'{gb(size)} on {where}' for where, size in asked.items())}"


def offload_to_cpu(model: Any, device: str) -> None:
    """Keep the weights in CPU memory; each module's come to `device` for its forward."""
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device(device))


def compute_on(model: nn.Module, device: str) -> None:
    """Where the modules of an offloaded model compute."""
    for hook in _hooks(model.modules()):
        hook.execution_device = torch.device(device)


def _hooks(modules: Iterable[nn.Module]) -> Iterator[Any]:
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and hasattr(hook, "execution_device"):
            yield hook


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight rests elsewhere than on the computing device."""
    return any(getattr(hook, "offload", False) for hook in _hooks(model.modules()))


def materialised(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter on the computing device, wherever it rests."""
    tensor = module.get_parameter(name)
    if tensor.device.type != "meta" or not is_offloaded(module):
        return tensor
    from accelerate.utils import align_module_device

    # Leaving the context puts the module's own parameter back to rest; this tensor stays with whoever asked.
    with align_module_device(module):
        return module.get_parameter(name).detach()


def computing_device(module: nn.Module) -> torch.device:
    """The device on which a module with a `weight` computes."""
    for hook in _hooks([module]):
        if getattr(hook, "offload", False):
            return torch.device(hook.execution_device)
    return module.get_parameter("weight").device
