"""Short digests by which weights and inputs in memory are known again."""

import hashlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn, uint8

from vlmscope.core.errors import UserError
from vlmscope.models.placement import materialised

_HEX = 16  # hexadecimal digits of a digest


def model_fingerprint(model: nn.Module) -> str:
    """Digest of every parameter and buffer: name, shape, dtype and bytes, wherever offload keeps them.

    Raises:
        UserError: a weight is nowhere.
    """
    digest = hashlib.blake2b(digest_size=_HEX // 2)
    named = sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items())
    for name, tensor in named:
        if isinstance(tensor, nn.Parameter):
            module, _, own = name.rpartition(".")
            tensor = materialised(model.get_submodule(module), own)
        if tensor.is_meta:
            raise UserError(f"weight {name} of the model is not in memory, so the model cannot be told from others")
        _add(digest, name, tensor)
    return digest.hexdigest()


def tensors_fingerprint(forwards: Iterable[Mapping[str, Tensor]]) -> str:
    """Digest of what a model is given: every tensor of every forward."""
    digest = hashlib.blake2b(digest_size=_HEX // 2)
    for one in forwards:
        for name in sorted(one):
            _add(digest, name, one[name])
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(uint8).numpy().data)
