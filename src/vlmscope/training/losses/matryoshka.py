"""Matryoshka prefixes: the first features must do on their own, so that they stay general (arXiv 2503.17547)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vlmscope.training.losses.joint import Joint, joint_fvu
from vlmscope.transcoders.transcoder import SparseCode, Transcoder


def prefix_sizes(fractions: Sequence[float], n_features: int) -> list[int]:
    """Numbers of features of each prefix shorter than the whole, ascending."""
    sizes = sorted({max(1, round(fraction * n_features)) for fraction in fractions})
    return [size for size in sizes if size < n_features]


def prefix_fvu(
    transcoder: Transcoder, code: SparseCode, x: Tensor, y: Tensor, sizes: Sequence[int], joint: Joint = None
) -> Tensor:
    """Mean FVU of `y` [N, d] over reconstructions by the first features alone, one a size, with the code as it is."""
    terms = []
    for size in sizes:
        values = torch.where(code.indices < size, code.values, 0)
        terms.append(joint_fvu(y, transcoder.decode(replace(code, values=values), x), joint))
    return torch.stack(terms).mean()
