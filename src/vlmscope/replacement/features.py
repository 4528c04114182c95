"""The active features of one input, layer by layer.

Legend: n active features of a layer, T positions, d model width, F features of a transcoder.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vlmscope.transcoders.transcoder import Transcoder


@dataclass(frozen=True)
class LayerFeatures:
    """The active features of one layer, sorted by position, then index, with the weights that they read and write by.

    Attributes:
        position: `[n]` int64.
        index: `[n]` int64.
        activation: `[n]`, > 0.
        pre_activation: `[n]`, `W_enc[index] . mlp_in[position] + b_enc[index]`.
        offsets: T + 1 ints; features of position p are `offsets[p]:offsets[p + 1]`.
        w_enc: `[F, d]`.
        w_dec: `[F, d]`.
        b_enc: `[F]`.
        b_dec: `[d]`.
        w_skip: `[d, d]` applied as `x @ w_skip.T`, or None.
    """

    position: Tensor
    index: Tensor
    activation: Tensor
    pre_activation: Tensor
    offsets: list[int]
    w_enc: Tensor
    w_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    w_skip: Tensor | None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def encoder_bias(self) -> Tensor:
        """`[n]`, each active feature's own encoder bias."""
        return self.b_enc[self.index]

    def read(self, mlp_in: Tensor) -> Tensor:
        """`W_enc` rows of the active features applied to `mlp_in [T, d]` at their positions: `[n]`, without bias."""
        return (self.w_enc[self.index] * mlp_in[self.position]).sum(-1)

    def write(self, activation: Tensor, mlp_in: Tensor) -> Tensor:
        """`[T, d]`: the features' decoder rows times `activation [n]`, plus the skip path of `mlp_in [T, d]`."""
        out = torch.zeros_like(mlp_in).index_add_(0, self.position, activation[:, None] * self.w_dec[self.index])
        return out if self.w_skip is None else out + mlp_in @ self.w_skip.T


@torch.no_grad()
def active_features(transcoder: Transcoder, mlp_in: Tensor) -> LayerFeatures:
    """Encode `mlp_in [T, d]` and keep what is active, as the transcoder's own nonlinearity decides."""
    code = transcoder.encode(mlp_in)
    position, slot = torch.nonzero(code.values > 0, as_tuple=True)
    index = code.indices[position, slot]
    activation = code.values[position, slot]
    order = torch.argsort(position * transcoder.W_enc.shape[0] + index)
    position, index, activation = position[order], index[order], activation[order]
    counts = torch.bincount(position, minlength=mlp_in.shape[0])
    w_enc, b_enc = transcoder.W_enc.detach(), transcoder.b_enc.detach()
    return LayerFeatures(
        position=position,
        index=index,
        activation=activation.detach(),
        pre_activation=(w_enc[index] * mlp_in[position]).sum(-1) + b_enc[index],
        offsets=[0, *np.cumsum(counts.cpu().numpy()).tolist()],
        w_enc=w_enc,
        w_dec=transcoder.W_dec.detach(),
        b_enc=b_enc,
        b_dec=transcoder.b_dec.detach(),
        w_skip=None if transcoder.W_skip is None else transcoder.W_skip.detach(),
    )


@dataclass(frozen=True)
class FeatureTable:
    """The active features of all layers, one row each, sorted by (layer, position, index).

    Attributes:
        layer: `[n]` int64.
        position: `[n]` int64.
        index: `[n]` int64.
        activation: `[n]` float.
        pre_activation: `[n]` float.
    """

    layer: np.ndarray
    position: np.ndarray
    index: np.ndarray
    activation: np.ndarray
    pre_activation: np.ndarray

    def __len__(self) -> int:
        return len(self.layer)

    @cached_property
    def _rows(self) -> dict[tuple[int, int, int], int]:
        keys = zip(self.layer.tolist(), self.position.tolist(), self.index.tolist(), strict=True)
        return {key: row for row, key in enumerate(keys)}

    def row(self, layer: int, position: int, index: int) -> int:
        """The row of an active feature.

        Raises:
            KeyError: when the feature is not active there.
        """
        try:
            return self._rows[(layer, position, index)]
        except KeyError:
            raise KeyError(f"feature L{layer}/{index} is not active at position {position}") from None


def feature_table(layers: list[LayerFeatures]) -> FeatureTable:
    """Join the layers' active features."""

    def join(name: str) -> np.ndarray:
        return np.concatenate([getattr(layer, name).cpu().numpy() for layer in layers])

    numbers = np.repeat(np.arange(len(layers)), [len(layer) for layer in layers])
    return FeatureTable(numbers, join("position"), join("index"), join("activation"), join("pre_activation"))
