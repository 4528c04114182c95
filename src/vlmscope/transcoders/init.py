"""Starting points: random sets for tests, and folding of a standardisation into the weights.

Shapes: d model width, F features.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.seeds import generator
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet


def random_set(
    n_layers: int,
    d_model: int,
    n_features: int,
    k: int,
    skip: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    model_name: str = "random",
    activation: str = "topk",
    cross_layer: bool = False,
) -> TranscoderSet:
    """A set with every weight non-zero, reproducible from `seed`: for tests, which an all-zero set would pass idly."""
    transcoders = {}
    for layer in range(n_layers):
        writes = n_layers - layer if cross_layer else 1
        config = TranscoderConfig(d_model, n_features, k, layer, activation, skip, writes=writes)
        transcoder = Transcoder(config, dtype=dtype)
        scales = {"W_enc": 1.0, "W_dec": 1.0, "W_skip": 0.3, "b_enc": 0.1 * math.sqrt(d_model), "b_dec": 0.3}
        for name, scale in scales.items():
            parameter = getattr(transcoder, name)
            if parameter is not None:
                numbers = generator(seed, "transcoder", layer, name).standard_normal(tuple(parameter.shape))
                set_weight(parameter, numbers * scale / math.sqrt(d_model))
        for ahead, parameter in enumerate(transcoder.W_later, start=1):
            numbers = generator(seed, "transcoder", layer, "W_later", ahead).standard_normal(tuple(parameter.shape))
            set_weight(parameter, numbers / math.sqrt(d_model))
        threshold = getattr(transcoder.activation, "threshold", None)
        if threshold is not None:
            draw = generator(seed, "transcoder", layer, "threshold")
            set_weight(threshold, draw.uniform(0.2, 0.4, tuple(threshold.shape)))
        transcoders[layer] = transcoder
    return TranscoderSet(transcoders, TranscoderSetConfig(n_layers, k, activation, model_name))


def set_weight(parameter: Tensor, value: Tensor | np.ndarray | float) -> None:
    """Overwrite a parameter in place, keeping its dtype and device; shapes must agree."""
    source = torch.as_tensor(value)
    if source.ndim:
        assert source.shape == parameter.shape, (source.shape, parameter.shape)
    with torch.no_grad():
        parameter.copy_(source)


@dataclass(frozen=True)
class Standardisation:
    """Means [d] and scalar scales with which training sees a layer: `x' = (x - x_mean) / x_scale`, `y'` likewise."""

    x_mean: Tensor
    x_scale: float
    y_mean: Tensor
    y_scale: float

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> "Standardisation":
        """Means over the tokens of [N, d] and root mean square deviations over tokens and dimensions."""
        x_mean, y_mean = x.double().mean(0), y.double().mean(0)
        x_scale = float((x - x_mean).double().square().mean().sqrt())
        y_scale = float((y - y_mean).double().square().mean().sqrt())
        return cls(x_mean.to(x.dtype), x_scale or 1.0, y_mean.to(y.dtype), y_scale or 1.0)

    def apply(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised inputs and targets, [.., d] each."""
        return (x - self.x_mean) / self.x_scale, (y - self.y_mean) / self.y_scale


def fold(transcoder: Transcoder, standard: Standardisation, later_scales: Sequence[float] = ()) -> Transcoder:
    """A new transcoder from raw inputs to raw targets, equal to `transcoder` between `standard`'s coordinates.

    W_enc' = W_enc / sx; b_enc' = b_enc - W_enc mx / sx; W_dec' = sy W_dec; W_skip' = sy/sx W_skip;
    b_dec' = sy b_dec + my - W_skip' mx. Activations, and so the choice of the top k, stay as they are. `later_scales`
    are sy of the later layers that it writes to, in order, by which its decoders to them are multiplied.
    """
    out = copy.deepcopy(transcoder)
    mx, my = standard.x_mean.double(), standard.y_mean.double()
    with torch.no_grad():
        w_enc = transcoder.W_enc.double() / standard.x_scale
        set_weight(out.W_enc, w_enc)
        set_weight(out.b_enc, transcoder.b_enc.double() - w_enc @ mx)
        set_weight(out.W_dec, transcoder.W_dec.double() * standard.y_scale)
        for theirs, ours, scale in zip(out.W_later, transcoder.W_later, later_scales, strict=True):
            set_weight(theirs, ours.double() * scale)
        b_dec = transcoder.b_dec.double() * standard.y_scale + my
        if transcoder.W_skip is not None and out.W_skip is not None:
            w_skip = transcoder.W_skip.double() * (standard.y_scale / standard.x_scale)
            set_weight(out.W_skip, w_skip)
            b_dec = b_dec - w_skip @ mx
        set_weight(out.b_dec, b_dec)
    return out
