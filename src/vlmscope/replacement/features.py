"""The active features of one input, layer by layer.

Legend: n active features of a layer, T positions, d model width, F features of a transcoder.
"""

from collections.abc import Sequence
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
        w_later: decoders `[F, d]` to the layers after its own, in order (cross-layer transcoders).
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
    w_later: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def encoder_bias(self) -> Tensor:
        """`[n]`, each active feature's own encoder bias."""
        return self.b_enc[self.index]

    def read(self, mlp_in: Tensor) -> Tensor:
        """`W_enc` rows of the active features applied to `mlp_in [T, d]` at their positions: `[n]`, without bias."""
        return (self.w_enc[self.index] * mlp_in[self.position]).sum(-1)

    def reaches(self, ahead: int) -> bool:
        """Whether the features write to the layer `ahead` of their own."""
        return 0 <= ahead <= len(self.w_later)

    def vectors(self, ahead: int) -> Tensor:
        """`[n, d]`, what each active feature writes to the layer `ahead` of its own, at its own activation."""
        decoder = self.w_dec if ahead == 0 else self.w_later[ahead - 1]
        return self.activation[:, None] * decoder[self.index]

    def add_written(self, out: Tensor, activation: Tensor, ahead: int) -> None:
        """Add to `out [T, d]` what the features write at activations `[n]` to the layer `ahead` of their own."""
        decoder = self.w_dec if ahead == 0 else self.w_later[ahead - 1]
        out.index_add_(0, self.position, activation[:, None] * decoder[self.index])


def written(layers: Sequence[LayerFeatures], activations: Sequence[Tensor], mlp_in: Tensor) -> Tensor:
    """`[T, d]`, what the features of all layers write to the last of `layers`, with its skip path of `mlp_in [T, d]`.

    `activations` has `[n]` a layer. Decoder biases are left out.
    """
    last = len(layers) - 1
    w_skip = layers[last].w_skip
    out = torch.zeros_like(mlp_in) if w_skip is None else mlp_in @ w_skip.T
    for layer, (features, activation) in enumerate(zip(layers, activations, strict=True)):
        if features.reaches(last - layer):
            features.add_written(out, activation, last - layer)
    return out


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
        w_later=tuple(decoder.detach() for decoder in transcoder.W_later),
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
