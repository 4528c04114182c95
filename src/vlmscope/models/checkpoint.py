"""The files of a model, checked before anything is loaded, and the devices that hold and compute its weights.

A model is searched for in this order: an existing folder (of eyes: joined with their text model); the hub's cache on
this machine, without a network; a download into that cache at one commit. Only safetensors, configuration and tokenizer
files are fetched, and no code.

With offload the weights stay in CPU memory or on disk and come to the computing device module by module (accelerate's
hooks do that around each forward). In between they are on the `meta` device, so code that reads a weight directly must
get it from `materialised`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from vlmscope.core.artifacts import read_json, refuse_lfs_pointer, tensor_heads
from vlmscope.core.errors import UserError
from vlmscope.core.hub import FilePatterns, cached_folder, fetch, gb, is_commit, is_hub_id
from vlmscope.models.eyes import is_eyes, joined_folder

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_AGAIN = "download it again (a download resumes where it stopped)"
WANTED = FilePatterns(
    ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"),
    ("*/*", "consolidated*"),  # other copies of the weights
)


def read_config(folder: Path) -> dict[str, object]:
    """`config.json` of a model folder; a `UserError` when it is missing, is not JSON, or names no model type."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no model at {folder}: config.json is missing; give the folder of a Hugging Face model")
    refuse_lfs_pointer(path)
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path} names no model_type; it is not the config.json of a Hugging Face model")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, as its index names them; whether they exist is not checked."""
    if (folder / _SINGLE).is_file():  # transformers takes it even where an index names other files
        return [folder / _SINGLE]
    index = folder / _INDEX
    if index.is_file():
        refuse_lfs_pointer(index)
        record = read_json(index)
        names = record.get("weight_map") if isinstance(record, dict) else None
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{index} has no weight_map; {_AGAIN}")
        outside = [name for name in names.values() if Path(name).name != name]
        if outside:
            raise UserError(f"{index} names {outside[0]!r}, which does not lie in the folder; {_AGAIN}")
        return [folder / name for name in sorted(set(names.values()))]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise UserError(f"{index} is missing beside {shards[0].name}; {_AGAIN}")
    pickled = sorted(path for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights as {pickled[0].name}, which is a pickle and never read; convert it to "
            "safetensors (save_pretrained does), or take a revision that has them"
        )
    raise UserError(f"{folder} has no weights{_interrupted(folder)}: {_SINGLE} is missing; {_AGAIN}")


def check_weights(folder: Path) -> None:
    """Raise a `UserError` that names the weight file that is missing, is a Git LFS pointer, or is cut off."""
    files = weight_files(folder)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]} is missing ({len(missing)} of {len(files)} weight files are){_interrupted(folder)}; {_AGAIN}"
        )
    for path in files:
        tensor_heads(path)


def _interrupted(folder: Path) -> str:
    """A phrase for the error where an interrupted download left files, in the folder or in the hub's cache."""
    places = (folder, folder / ".cache" / "huggingface" / "download", folder.parent.parent / "blobs")
    interrupted = any(any(place.glob("*.incomplete")) for place in places if place.is_dir())
    return " (a download of it was interrupted)" if interrupted else ""


def is_complete(folder: Path) -> bool:
    """Whether a folder has a configuration and all its weight files, whole."""
    try:
        read_config(folder)
        check_weights(folder)
    except UserError:
        return False
    return True


def model_folder(path: str, hub: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a model, fetched into the hub's cache, or joined with its text model, if necessary.

    Args:
        path: a folder, or a hub id when there is no such folder.
        hub: the hub id of the model at `path`, if any.
        revision: the commit, 40 hexadecimal digits; only needed without the folder.
    """
    repo = hub or (path if is_hub_id(path) else None)
    if repo is None or Path(path).is_dir():
        return joined_folder(Path(path)) if is_eyes(Path(path)) else Path(path)
    if revision is None or not is_commit(revision):
        reason = "has no pinned revision here" if revision is None else f"is set to {revision!r}, which may change"
        raise UserError(
            f"no folder {path}, and the hub model {repo} {reason}: add model.revision=<commit, 40 hex digits> (the "
            f"model's page lists them under Files, History), or put the model into a folder and give model.path="
        )

    def refusal(reason: str) -> UserError:
        local = f"models/{repo.partition('/')[2]}" if hub is None else path
        advice = f"and give model.path={local}, or put it elsewhere"
        if hub is not None:  # a configuration of conf/model names the place
            advice = "or set VLMSCOPE_MODELS to the folder that has it"
        download = f"hf download {repo} --revision {revision} --local-dir {local}"
        return UserError(f"no model at {local}, and {reason}: run `{download}` {advice}")

    cached = cached_folder(repo, revision)
    return cached if is_complete(cached) else fetch(repo, revision, WANTED, refusal)


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = ("none", "cpu", "disk")
# Memory besides the weights: buffers, allocator waste, and the tensor that is being converted.
_MARGIN = 1.1


def check_device(device: str, dtype: str = "float32") -> None:
    """Raise a `UserError` when a device is unknown, absent, or cannot compute in `dtype`."""
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"unknown device {device!r}; choose cpu, cuda, cuda:N or mps")
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise UserError(f"device {device!r} was requested, but no GPU is usable here; use model.device=cpu")
        index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
        if index >= count:
            raise UserError(f"device {device!r} was requested, but there are {count} GPUs here; the first is cuda:0")
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("device 'mps' was requested, but this is not a Mac with a usable GPU; use device cpu")
        if dtype == "float64":
            raise UserError("device 'mps' cannot compute in float64; use device cpu, or dtype float32")


def free_bytes(device: str) -> int:
    """Free memory of a device, in bytes."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if device == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    free = int(psutil.virtual_memory().available)
    try:  # a container has less: its limit minus its use, without the page cache that can be freed
        group = Path("/sys/fs/cgroup")
        limit, held = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = int(dict(line.split() for line in lines).get("inactive_file", 0))
    except (OSError, ValueError):  # no such files, or the limit is "max"
        return free
    return min(free, limit - held + cached)


def check_memory(model: nn.Module, what: str, dtype: str, device: str, offload: str) -> None:
    """Raise a `UserError` when a model's weights do not fit where they are kept; it may be on the `meta` device.

    Offload moves modules one at a time, so the computing device needs room for the largest.
    """
    size = DTYPES[dtype].itemsize * _MARGIN
    whole = size * sum(p.numel() for p in model.parameters())
    largest = size * max(sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules())
    advice = "choose a smaller dtype (model.dtype=bfloat16), model.offload=cpu or disk, or a smaller model"
    check_room(whole if offload == "none" else largest, f"the weights of {what} in {dtype}", device, advice)
    if offload == "cpu":
        check_room(whole, f"the weights of {what} in {dtype}", "cpu", advice)


def check_room(needed: float, what: str, device: str, advice: str) -> None:
    """Raise a `UserError` with advice when a device has fewer than `needed` bytes free for `what` (a plural)."""
    if needed > (free := free_bytes(device)):
        raise UserError(f"{what} need about {gb(needed)} on {device}, {gb(free)} are free; {advice}")


def offload_to_cpu(model: Any, device: str) -> None:
    """Keep the weights in CPU memory; those of a module are moved to `device` for its forward."""
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device(device))


def compute_on(model: nn.Module, device: str) -> None:
    """Set the device on which the modules of an offloaded model compute."""
    for hook in _hooks(model.modules()):
        hook.execution_device = torch.device(device)


def _hooks(modules: Iterable[nn.Module]) -> Iterator[Any]:
    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and hasattr(hook, "execution_device"):
            yield hook


def is_offloaded(model: nn.Module) -> bool:
    """Whether any weight is stored elsewhere than on the computing device."""
    return any(getattr(hook, "offload", False) for hook in _hooks(model.modules()))


def materialised(module: nn.Module, name: str = "weight") -> Tensor:
    """A parameter on the computing device, wherever it is stored."""
    tensor = module.get_parameter(name)
    if tensor.device.type != "meta" or not is_offloaded(module):
        return tensor
    from accelerate.utils import align_module_device

    # Leaving the context moves the module's own parameter back; this tensor stays with the caller.
    with align_module_device(module):
        return module.get_parameter(name).detach()


def computing_device(module: nn.Module) -> torch.device:
    """The device on which a module with a `weight` computes."""
    for hook in _hooks([module]):
        if getattr(hook, "offload", False):
            return torch.device(hook.execution_device)
    return module.get_parameter("weight").device


def model_fingerprint(model: nn.Module) -> str:
    """Digest of name, shape, dtype and bytes of every parameter and buffer, offloaded ones included."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
            if isinstance(tensor, nn.Parameter):
                module, _, parameter = name.rpartition(".")
                tensor = materialised(model.get_submodule(module), parameter)
            if tensor.is_meta:
                raise UserError(f"weight {name} of the model is not in memory, so the model cannot be told from others")
            yield name, tensor

    return _digest(tensors())


def tensors_fingerprint(forwards: Iterable[Mapping[str, Tensor]]) -> str:
    """Digest of every tensor of every forward, such as the inputs of a model."""
    return _digest(named for tensors in forwards for named in sorted(tensors.items()))


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
