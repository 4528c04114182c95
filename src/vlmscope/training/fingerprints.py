"""Short digests by which a model's weights and a batch are known again."""

import hashlib

import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.training.transcoder_data import Batch, forwards

_HEX = 16  # hexadecimal digits of a digest


def model_fingerprint(model: nn.Module) -> str:
    """Digest of every parameter and buffer: name, shape, dtype and bytes.

    Raises:
        UserError: weights are not in memory.
    """
    digest = hashlib.blake2b(digest_size=_HEX // 2)
    named = sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items())
    for name, tensor in named:
        if tensor.is_meta:
            raise UserError("task.cache knows a model by its weights, which must be in memory: model.offload=none")
        _add(digest, name, tensor)
    return digest.hexdigest()


def batch_fingerprint(batch: Batch) -> str:
    """Digest of what the model is given: every tensor of every forward."""
    digest = hashlib.blake2b(digest_size=_HEX // 2)
    for one in forwards(batch):
        for name in sorted(one):
            _add(digest, name, one[name])
    return digest.hexdigest()


def _add(digest: "hashlib.blake2b", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
