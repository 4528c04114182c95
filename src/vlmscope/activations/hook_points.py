"""The points between which transcoders map, by their names in `docs/glossary.md`."""

import torch
from torch import Tensor, nn

from vlmscope.models.base import Adapter


def target_module(adapter: Adapter, layer: int, hook: str) -> nn.Module:
    """The module whose output a transcoder with this `output_hook` imitates."""
    if hook == "mlp_out":
        return adapter.mlp(layer)
    norm = adapter.norms(layer).mlp_out_post
    assert norm is not None, f"hook {hook!r} needs a norm after the MLP"
    return norm


def target_at(adapter: Adapter, layer: int, hook: str, mlp_out: Tensor) -> Tensor:
    """What a transcoder with this `output_hook` imitates, from the raw MLP's output: [.., d] -> [.., d]."""
    return mlp_out if hook == "mlp_out" else target_module(adapter, layer, hook)(mlp_out)


def norm_weight_after(adapter: Adapter, layer: int, hook: str, like: Tensor) -> Tensor | None:
    """Weights [d] by which the norm after a layer's MLP multiplies what a transcoder writes, up to one positive factor.

    In dtype and place of `like`. None where no norm lies between `hook` and the residual stream.
    """
    norm = adapter.norms(layer).mlp_out_post
    if hook != "mlp_out" or norm is None:
        return None
    return adapter.norm_scale(norm, torch.ones(adapter.d_model, dtype=adapter.dtype, device=adapter.device)).to(like)
