"""Transcoders: `a = act(W_enc x + b_enc)`, `y_hat = a W_dec + b_dec (+ W_skip x)`; their sparse kernels, and sets.

One class serves training, attribution, interventions and feature studies (Dunefsky et al., arXiv 2406.11944; skip path:
arXiv 2501.18823). In a cross-layer set (Ameisen et al. 2025) a feature reads at one layer and writes to that layer and
later ones, with a decoder for each: `y_hat_m = sum over l <= m of a_l W_dec[l -> m] + b_dec_m (+ W_skip_m x_m)`.

A token has k of F active features, and k/F is below 1 %. Dense products would spend 99 % of their work on zeros, and a
plain gather stores [N, k, d]. Forward and backward here are weighted bags of rows instead:

    y[n]     = sum_j v[n, j] W[i[n, j]]                   a bag of decoder rows for each token
    dv[n, j] = g[n] . W[i[n, j]]                          sampled dot products
    dW[f]    = sum over (n, j) with i[n, j] = f of v[n, j] g[n]    a bag of gradient rows for each feature

No [N, k, d] and, in backward, no [N, F] is stored. Measured on one thread with N = 2048, d = 128, F = 2048, k = 16
(forward / dv / dW in ms): bags 0.6 / 1.6 / 2.8; gather + einsum 15 / 13 / -; dense products 33 / 32 / 39; CSR products
1.0 / 1.1 / 3.9; `index_add_` - / - / 4.1. With N = 1024, d = 640, F = 10240, k = 32, where the weights do not fit the
cache: bags 5.7 / 6.2 / 5.3, dv token by token 14, and the dense encoder product 152.

Shapes: N tokens, `..` any leading dimensions, k slots for the active features of a token, F features, d model width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from vlmscope.core.records import generator
from vlmscope.transcoders.config import HOOKS, TranscoderConfig, TranscoderSetConfig, UsualError
from vlmscope.transcoders.nonlinearities import build_nonlinearity
from vlmscope.transcoders.streaming import BLOCK, StreamedList, StreamedRows, blocks

_CACHED = 4 << 20  # bytes of rows that fit a core's cache
_SHRINKAGE = 0.1  # of the mean variance: bounds how much standardised inputs enlarge weak directions


def weighted_bags(indices: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """`out[n] = sum_j weights[n, j] rows[indices[n, j]]`: indices, weights [N, k], rows [R, d] -> [N, d]."""
    if indices.shape[0] == 0:
        return rows.new_zeros(0, rows.shape[1])
    return functional.embedding_bag(indices, rows, per_sample_weights=weights, mode="sum")


class _ByFeature(NamedTuple):
    """The entries (n, j) of indices [N, k] by feature: `entry`, `token` [N k]; `starts` [F], each feature's first."""

    entry: Tensor
    token: Tensor
    starts: Tensor


def _by_feature(indices: Tensor, n_features: int) -> _ByFeature:
    # Stable, so that the order of summation never varies; int32 keys sort twice as fast as int64.
    features, entry = torch.sort(indices.flatten().int(), stable=True)
    starts = torch.searchsorted(features, torch.arange(n_features, device=indices.device, dtype=torch.int32))
    return _ByFeature(entry, torch.div(entry, indices.shape[1], rounding_mode="floor"), starts)


class FeatureOrder:
    """The order of one support's entries by feature, sorted once and only if a gradient needs it.

    The gradients of encoder and decoder sum over the same entries.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, _ByFeature] | None = None

    def entries(self, indices: Tensor, n_features: int) -> _ByFeature:
        """The entries of `indices` [N, k], sorted again only if they are not those of the last call."""
        if self._last is not None:
            last, width, entries = self._last
            same = last.data_ptr() == indices.data_ptr() and last.stride() == indices.stride()
            if same and last.shape == indices.shape and width == n_features:
                return entries
        entries = _by_feature(indices, n_features)
        self._last = indices, n_features, entries
        return entries


def sampled_dots(indices: Tensor, left: Tensor, rows: Tensor, order: FeatureOrder | None = None) -> Tensor:
    """`out[n, j] = left[n] . rows[indices[n, j]]`; indices [N, k] int64, left [N, d], rows [R, d] -> [N, k]."""
    n, k = indices.shape
    if n == 0:
        return left.new_zeros(0, k)
    offsets = torch.arange(0, n * k, k, device=indices.device)
    if rows.device.type == "cpu" and rows.nbytes > _CACHED:
        # Feature by feature: each row is read once, in order, and the random reads are those of the smaller `left`.
        entries = (order if order is not None else FeatureOrder()).entries(indices, rows.shape[0])
        dots = left.new_empty(n * k)
        dots[entries.entry] = _dots(left, rows, indices.flatten()[entries.entry], offsets, entries.token)
    else:
        tokens = torch.arange(n, device=indices.device).repeat_interleave(k)
        dots = _dots(left, rows, indices.flatten(), offsets, tokens)
    return dots.view(n, k)


def _dots(left: Tensor, rows: Tensor, row_index: Tensor, offsets: Tensor, left_index: Tensor) -> Tensor:
    """`left[left_index[i]] . rows[row_index[i]]`, [m]."""
    # This is the kernel that autograd itself runs for `embedding_bag`; mode 0 is "sum", -1 is "no padding row".
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.contiguous(), rows, row_index, offsets, left_index, 0, -1
    )


def transposed_bags(
    indices: Tensor, weights: Tensor, rows: Tensor, n_out: int, order: FeatureOrder | None = None
) -> Tensor:
    """`out[f] = sum over (n, j) with indices[n, j] = f of weights[n, j] rows[n]`; rows [N, d] -> [n_out, d]."""
    if indices.shape[0] == 0:
        return rows.new_zeros(n_out, rows.shape[1])
    entries = (order if order is not None else FeatureOrder()).entries(indices, n_out)
    sorted_weights = weights.flatten()[entries.entry]
    return functional.embedding_bag(
        entries.token, rows.contiguous(), entries.starts, per_sample_weights=sorted_weights, mode="sum"
    )


class _Gather(torch.autograd.Function):
    """Pre-activations at chosen features, as a function of input, encoder rows and encoder bias."""

    @staticmethod
    def forward(
        ctx: Any, chosen: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor, order: FeatureOrder | None
    ) -> Tensor:
        ctx.save_for_backward(indices, x, w_enc)
        ctx.order = order
        if chosen.dtype == w_enc.dtype:
            return chosen
        # Half precision is enough to choose features; the chosen k/F of the product are computed again, exactly.
        return sampled_dots(indices, x, w_enc, order) + b_enc[indices]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        indices, x, w_enc = ctx.saved_tensors
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_x = weighted_bags(indices, grad, w_enc)
        if ctx.needs_input_grad[3]:
            grad_w = transposed_bags(indices, grad, x, w_enc.shape[0], ctx.order)
        if ctx.needs_input_grad[4]:
            grad_b = grad.new_zeros(w_enc.shape[0]).index_add_(0, indices.flatten(), grad.flatten())
        return None, None, grad_x, grad_w, grad_b, None


class _Decode(torch.autograd.Function):
    """Weighted sum of decoder rows."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, w_dec: Tensor, order: FeatureOrder | None) -> Tensor:
        ctx.save_for_backward(indices, values, w_dec)
        ctx.order = order
        return weighted_bags(indices, values, w_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        indices, values, w_dec = ctx.saved_tensors
        grad_values = grad_w = None
        if ctx.needs_input_grad[1]:
            grad_values = sampled_dots(indices, grad, w_dec, ctx.order)
        if ctx.needs_input_grad[2]:
            grad_w = transposed_bags(indices, values, grad, w_dec.shape[0], ctx.order)
        return None, grad_values, grad_w, None


def gather_pre_activations(
    pre: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor, order: FeatureOrder | None = None
) -> Tensor:
    """Values of `pre = x @ w_enc.T + b_enc` at `indices`, with sparse gradients to `x`, `w_enc` and `b_enc`.

    `pre` [N, F] is the product, computed without a gradient; indices [N, k] int64, x [N, d], w_enc [F, d], b_enc [F] ->
    [N, k] in the dtype of `w_enc`: if that of `pre` differs, the values are computed again. Calls with the same indices
    share an `order`.
    """
    chosen = pre.detach().gather(1, indices)
    return _Gather.apply(chosen, indices, x, w_enc, b_enc, order)  # pyright: ignore[reportReturnType]


def sparse_decode(indices: Tensor, values: Tensor, w_dec: Tensor, order: FeatureOrder | None = None) -> Tensor:
    """`sum_j values[n, j] w_dec[indices[n, j]]`; indices [N, k] int64, values [N, k], w_dec [F, d] -> [N, d]."""
    return _Decode.apply(indices, values, w_dec, order)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class SparseCode:
    """Features and activations of each token. An entry with value 0 is not active, whatever its index.

    `indices` [.., k] int64, distinct in a row; `values` [.., k] >= 0, largest first for TopK. With an activation that
    does not fix the number, k is the most that any token of the call has. `order` saves the gradients a second sort.
    """

    indices: Tensor
    values: Tensor
    order: FeatureOrder | None = field(default=None, repr=False, compare=False)

    @property
    def active(self) -> Tensor:
        """[.., k] bool: which entries are active features."""
        return self.values > 0

    def dense(self, n_features: int) -> Tensor:
        """Activations of all features, [.., F]."""
        out = self.values.new_zeros(*self.values.shape[:-1], n_features)
        return out.scatter(-1, self.indices, self.values)

    def select(self, features: Tensor, n_features: int) -> Tensor:
        """Activations [.., n] of distinct features [n], without the dense [.., F]."""
        column = features.new_full((n_features,), len(features))
        column[features] = torch.arange(len(features), device=features.device)
        # All other features share one extra last column, which is dropped.
        out = self.values.new_zeros(*self.values.shape[:-1], len(features) + 1)
        return out.scatter(-1, column[self.indices], self.values)[..., :-1]


@dataclass(frozen=True)
class TranscoderOutput:
    """Result of a forward pass.

    `reconstruction` [.., d]; `code`; `pre` [.., F], all pre-activations, detached, in the dtype of the product;
    `at_support` [.., k], those of the code's features, differentiable, in the weights' dtype.
    """

    reconstruction: Tensor
    code: SparseCode
    pre: Tensor
    at_support: Tensor


class Transcoder(nn.Module):
    """One layer's transcoder.

    `W_enc`, `W_dec` [F, d], one row per feature; `b_enc` [F], `b_dec` [d]; `W_skip` [d, d] or None; `W_later`, decoders
    [F, d] to the layers after its own, in order, none unless it is cross-layer.

    `product_dtype` is that of the dense product that decides which features are active, in training mode only (None:
    the weights'). All else is in the weights' dtype, also the chosen features' pre-activations.
    """

    product_dtype: torch.dtype | None = None
    W_enc: Tensor
    W_dec: Tensor
    W_skip: nn.Parameter | None
    W_later: nn.ParameterList | StreamedList

    def __init__(
        self,
        config: TranscoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        rows: Sequence[Tensor] | None = None,
    ) -> None:
        """All weights start at zero; with `rows` encoder and decoders are these, as buffers without gradient."""
        super().__init__()
        self.config = config
        f, d = config.n_features, config.d_model

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        if rows is None:
            self.W_enc, self.W_dec = zeros(f, d), zeros(f, d)
        else:
            self.register_buffer("W_enc", rows[0])
            self.register_buffer("W_dec", rows[1])
        self.b_enc, self.b_dec = zeros(f), zeros(d)
        if config.skip:
            self.W_skip = zeros(d, d)
        else:
            self.register_parameter("W_skip", None)
        # Separate tensors, since each decode from one [layers, F, d] would have a gradient of that whole size.
        later = range(config.writes - 1)
        self.W_later = nn.ParameterList([zeros(f, d) for _ in later]) if rows is None else StreamedList(rows[2:])
        self.activation = build_nonlinearity(config).to(dtype=dtype, device=device)
        self._norms: Tensor | None = None  # of streamed decoders, once read
        # BatchTopK compares the tokens of a batch only in training; elsewhere a token's code depends on itself alone.
        self.eval()

    def decoder(self, ahead: int) -> Tensor:
        """Decoder [F, d] to the layer `ahead` of its own, 0 for its own; ahead < `config.writes`."""
        return self.W_dec if ahead == 0 else self.W_later[ahead - 1]

    def write_norms(self) -> Tensor:
        """Norm of what a feature of activation 1 writes, over all layers that it writes to: [F]."""
        if self._norms is not None and self._norms.device == self.b_enc.device:
            return self._norms.to(self.b_enc.dtype)
        decoders = [blocks(self.decoder(ahead), BLOCK) for ahead in range(self.config.writes)]
        squares = (torch.stack([rows.square().sum(1) for rows in block]) for block in zip(*decoders, strict=True))
        found = torch.cat([block.sum(0).sqrt() for block in squares])
        if isinstance(self.W_dec, StreamedRows):  # to read all decoders once is enough
            self._norms = found
        return found

    def directions(self, weights: Sequence[Tensor | None]) -> Tensor:
        """The direction that a feature adds to the residual stream, summed over the layers it writes to: [F, d].

        `weights` [d] are those of the norm after each of these layers' MLPs, None without such a norm.
        """
        rows = [self.decoder(ahead) if w is None else self.decoder(ahead) * w for ahead, w in enumerate(weights)]
        return torch.stack(rows).sum(0)

    def pre_activations(self, x: Tensor) -> Tensor:
        """`x W_enc^T + b_enc`: [.., d] -> [.., F]. Differentiable."""
        return functional.linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> SparseCode:
        """The active features at every token: [.., d] -> SparseCode [.., k]. Differentiable in input and weights."""
        rows = self._rows(x)
        indices, chosen = self._choose(rows)
        return self._code(x, rows, indices, chosen)[0]

    def _rows(self, x: Tensor) -> Tensor:
        return x.to(self.W_enc.dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def _code(self, x: Tensor, rows: Tensor, indices: Tensor, chosen: Tensor) -> tuple[SparseCode, Tensor]:
        """Code and its pre-activations in the shape of `x`, from the chosen features of its rows."""
        order, shape = FeatureOrder(), (*x.shape[:-1], indices.shape[-1])
        at_support: Tensor = _Gather.apply(chosen, indices, rows, self.W_enc, self.b_enc, order)  # pyright: ignore
        values = self.activation.values(at_support, indices)
        return SparseCode(indices.view(shape), values.view(shape), order), at_support.view(shape)

    @torch.no_grad()
    def _choose(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The features that may be active and their pre-activations, [N, k]: of rows [N, d], a block after another.

        [N, F] is never stored where F is wide. Blocks are the same whether weights are streamed or not: a product's
        rounding may depend on its shape. A batch of BatchTopK, in training, has one threshold, so it is one block.
        """
        indices = chosen = rows.new_zeros(len(rows), 0)
        block = slice(0, 0)
        for w_enc in blocks(self.W_enc, self.config.n_features if self.training else BLOCK):
            block = slice(block.stop, block.stop + len(w_enc))
            pre = self._product(rows, w_enc, self.b_enc[block])
            local = self.activation.support(pre, block)
            found, pre = local + block.start, pre.gather(1, local)
            if block.start:
                found, pre = torch.cat([indices, found], 1), torch.cat([chosen, pre], 1)
                best = self.activation.support(pre, found)
                found, pre = found.gather(1, best), pre.gather(1, best)
            indices, chosen = found, pre
        return indices, chosen

    def _product(self, rows: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
        """`pre_activations` of rows [N, d] at some features, in `product_dtype` while training."""
        dtype = self.product_dtype if self.training and self.product_dtype else w_enc.dtype
        return functional.linear(rows.to(dtype), w_enc.to(dtype), b_enc.to(dtype))

    def write(self, code: SparseCode, ahead: int = 0) -> Tensor:
        """`sum_f a_f W_dec[f]` -> [.., d], the features' write to the layer `ahead` of their own."""
        *lead, k = code.indices.shape
        rows = (math.prod(lead), k)
        summed = sparse_decode(code.indices.reshape(rows), code.values.reshape(rows), self.decoder(ahead), code.order)
        return summed.view(*lead, summed.shape[-1])

    def decode(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        """`sum_f a_f W_dec[f] + b_dec (+ W_skip x)` -> [.., d], from this layer's features alone."""
        out = self.write(code) + self.b_dec
        if self.W_skip is not None:
            if x is None:
                raise ValueError(f"the transcoder of layer {self.config.layer} has a skip path: decode needs its input")
            out = out + functional.linear(x.to(self.W_skip.dtype), self.W_skip)
        return out

    def forward(self, x: Tensor) -> TranscoderOutput:
        """Reconstruct the MLP output from the MLP input `x` [.., d], by this layer's features alone."""
        rows = self._rows(x)
        with torch.no_grad():
            pre = self._product(rows, self.W_enc, self.b_enc)
            indices = self.activation.support(pre)
        code, at_support = self._code(x, rows, indices, pre.gather(1, indices))
        return TranscoderOutput(self.decode(code, x), code, pre.view(*x.shape[:-1], pre.shape[-1]), at_support)


def written_before(transcoders: Mapping[int, Transcoder], layer: int, codes: Mapping[int, SparseCode]) -> Tensor | None:
    """What features of lower layers add to the reconstruction of `layer`, from their codes: [.., d].

    None if nothing writes there from below, so always in a set that is not cross-layer.
    """
    writes = [
        transcoders[lower].write(code, layer - lower)
        for lower, code in codes.items()
        if 0 < layer - lower < transcoders[lower].config.writes
    ]
    return sum(writes[1:], writes[0]) if writes else None


class TranscoderSet(nn.Module):
    """The transcoders of a model's layers, `set[layer]`. Widths may differ by layer."""

    def __init__(self, transcoders: Mapping[int, Transcoder], config: TranscoderSetConfig) -> None:
        super().__init__()
        self.config = config
        self.usual_error: UsualError | None = None  # on the data that it was trained on, where that is known
        self._by_layer = nn.ModuleDict({str(layer): transcoders[layer] for layer in sorted(transcoders)})

    def __getitem__(self, layer: int) -> Transcoder:
        try:
            transcoder = self._by_layer[str(layer)]
        except KeyError:
            raise KeyError(f"no transcoder for layer {layer}; the set has layers {self.layers}") from None
        assert isinstance(transcoder, Transcoder)
        return transcoder

    def __len__(self) -> int:
        return len(self._by_layer)

    def __contains__(self, layer: object) -> bool:
        return str(layer) in self._by_layer

    @property
    def site(self) -> str:
        """The layers that the transcoders belong to, of `vlmscope.transcoders.config.HOOKS`."""
        return self.config.site

    @property
    def cross_layer(self) -> bool:
        """Whether some feature writes to more than its own layer."""
        return any(transcoder.config.writes > 1 for transcoder in self.transcoders.values())

    def encode(self, inputs: Mapping[int, Tensor]) -> dict[int, SparseCode]:
        """Codes [.., k] of layers from their MLP inputs [.., d]."""
        return {layer: self[layer].encode(x) for layer, x in inputs.items()}

    def decode(self, layer: int, codes: Mapping[int, SparseCode], x: Tensor) -> Tensor:
        """Reconstruction [.., d] of a layer from the codes of all layers that write to it, and its input [.., d]."""
        reconstruction = self[layer].decode(codes[layer], x)
        earlier = written_before(self.transcoders, layer, codes)
        return reconstruction if earlier is None else reconstruction + earlier

    @property
    def widths(self) -> dict[int, int]:
        """How many features each layer has."""
        return {layer: self[layer].config.n_features for layer in self.layers}

    @property
    def layers(self) -> list[int]:
        """The layers that have a transcoder, ascending."""
        return [int(key) for key in self._by_layer]

    @property
    def transcoders(self) -> dict[int, Transcoder]:
        """Layer -> transcoder, ascending."""
        return {layer: self[layer] for layer in self.layers}


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
    site: str = "decoder",
) -> TranscoderSet:
    """A set with every weight non-zero, reproducible from `seed`, for tests that an all-zero set would always pass."""
    transcoders = {}
    for layer in range(n_layers):
        writes = n_layers - layer if cross_layer else 1
        config = TranscoderConfig(d_model, n_features, k, layer, activation, skip, *HOOKS[site], writes=writes)
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
    return TranscoderSet(transcoders, TranscoderSetConfig(n_layers, k, activation, model_name, *HOOKS[site]))


def set_weight(parameter: Tensor, value: Tensor | np.ndarray | float) -> None:
    """Overwrite a parameter in place, keeping its dtype and device; shapes must agree."""
    source = torch.as_tensor(value)
    if source.ndim:
        assert source.shape == parameter.shape, (source.shape, parameter.shape)
    with torch.no_grad():
        parameter.copy_(source)


@dataclass(frozen=True)
class Standardisation:
    """Coordinates of training: `x' = (x - x_mean) x_map`, `y' = (y - y_mean) / y_scale`; x_map [d, d] is symmetric."""

    x_mean: Tensor
    x_map: Tensor
    y_mean: Tensor
    y_scale: float

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> Standardisation:
        """From tokens [N, d], so that x' and y' have means 0 and a mean square of 1 over tokens and dimensions.

        x' is half-way to white: x_map is proportional to (C / c + 0.1)^(-1/4), where C is the covariance and c its
        mean variance. A few directions hold most of the variance of a model's activations; without this an encoder
        learns the others slowly (measured in docs/LOG.md).
        """
        x_mean, y_mean = x.double().mean(0), y.double().mean(0)
        centred = x - x_mean
        y_scale = float((y - y_mean).square().mean().sqrt())
        variances, directions = torch.linalg.eigh(centred.T @ centred / len(x))
        shares = variances / (variances.mean() or 1.0)
        factors = (shares.clamp_min(0) + _SHRINKAGE) ** -0.25
        factors = factors / (float((variances * factors.square()).mean().sqrt()) or 1.0)
        x_map = (directions * factors) @ directions.T
        return cls(x_mean.to(x.dtype), x_map.to(x.dtype), y_mean.to(y.dtype), y_scale or 1.0)

    def apply(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised inputs and targets, [.., d] each."""
        return (x - self.x_mean) @ self.x_map, self.apply_target(y)

    def apply_target(self, y: Tensor) -> Tensor:
        """Standardised targets, [.., d]."""
        return (y - self.y_mean) / self.y_scale


def fold(transcoder: Transcoder, standard: Standardisation, later_scales: Sequence[float] = ()) -> Transcoder:
    """A new transcoder from raw inputs to raw targets, equal to `transcoder` in the coordinates of `standard`.

    W_enc' = W_enc M; b_enc' = b_enc - W_enc' mx; W_dec' = sy W_dec; W_skip' = sy W_skip M, M being `x_map`;
    b_dec' = sy b_dec + my - W_skip' mx. Activations, and so the choice of the top k, do not change. `later_scales` are
    the sy of the later layers that it writes to, in order, by which its decoders to them are multiplied.
    """
    out = copy.deepcopy(transcoder)
    mx, my, x_map = standard.x_mean.double(), standard.y_mean.double(), standard.x_map.double()
    with torch.no_grad():
        w_enc = transcoder.W_enc.double() @ x_map
        set_weight(out.W_enc, w_enc)
        set_weight(out.b_enc, transcoder.b_enc.double() - w_enc @ mx)
        set_weight(out.W_dec, transcoder.W_dec.double() * standard.y_scale)
        for folded, later, scale in zip(out.W_later, transcoder.W_later, later_scales, strict=True):
            set_weight(folded, later.double() * scale)
        b_dec = transcoder.b_dec.double() * standard.y_scale + my
        if transcoder.W_skip is not None and out.W_skip is not None:
            w_skip = transcoder.W_skip.double() @ x_map * standard.y_scale
            set_weight(out.W_skip, w_skip)
            b_dec = b_dec - w_skip @ mx
        set_weight(out.b_dec, b_dec)
    return out
