"""The transcoder: `a = act(W_enc x + b_enc)`, `y_hat = a W_dec + b_dec (+ W_skip x)`.

One class serves training, attribution, interventions and feature studies (Dunefsky et al., arXiv 2406.11944; the skip
path: arXiv 2501.18823). In a cross-layer set (Ameisen et al. 2025) a feature reads at one layer and writes to that one
and to later ones, by a decoder for each: `y_hat_m = sum over l <= m of a_l W_dec[l -> m] + b_dec_m (+ W_skip_m x_m)`.
Shapes: d model width, F features, k slots for active features; `..` any leading dimensions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.nonlinearities import build_nonlinearity
from vlmscope.transcoders.sparse import FeatureOrder, gather_pre_activations, sparse_decode

__all__ = [
    "SparseCode",
    "Transcoder",
    "TranscoderConfig",
    "TranscoderOutput",
    "TranscoderSet",
    "TranscoderSetConfig",
]


@dataclass(frozen=True)
class SparseCode:
    """Features and activations of each token. An entry with value 0 is not active, whatever its index.

    `indices` [.., k] int64, distinct in a row; `values` [.., k] >= 0, largest first for TopK. With an activation that
    does not fix the number, k is the most that any token of the call has. `order` spares gradients a second sort.
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
        # Everything else falls into one last column, which goes.
        out = self.values.new_zeros(*self.values.shape[:-1], len(features) + 1)
        return out.scatter(-1, column[self.indices], self.values)[..., :-1]


@dataclass(frozen=True)
class TranscoderOutput:
    """What one forward gives.

    `reconstruction` [.., d]; `code`; `pre` [.., F], all pre-activations, detached, in the dtype of the product;
    `at_support` [.., k], those of the code's features, differentiable, in the weights' dtype.
    """

    reconstruction: Tensor
    code: SparseCode
    pre: Tensor
    at_support: Tensor


class Transcoder(nn.Module):
    """One layer's transcoder.

    `W_enc` [F, d] and `W_dec` [F, d], a row a feature; `b_enc` [F], `b_dec` [d]; `W_skip` [d, d] or None. `W_later`:
    decoders [F, d] to the layers after its own, in order, none unless it is cross-layer.

    `product_dtype`: that of the dense product from which the active features are chosen, in training mode alone (None:
    the weights'). Everything else stays in the weights' dtype, the chosen features' pre-activations too.
    """

    product_dtype: torch.dtype | None = None
    W_skip: nn.Parameter | None
    W_later: nn.ParameterList

    def __init__(
        self, config: TranscoderConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> None:
        """All weights start at zero: fill them by `vlmscope.transcoders.init` or from a file."""
        super().__init__()
        self.config = config
        f, d = config.n_features, config.d_model

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=device))

        self.W_enc, self.W_dec = zeros(f, d), zeros(f, d)
        self.b_enc, self.b_dec = zeros(f), zeros(d)
        if config.skip:
            self.W_skip = zeros(d, d)
        else:
            self.register_parameter("W_skip", None)
        # Tensors of their own and not one [layers, F, d], of which every decode would have a gradient as large as all.
        self.W_later = nn.ParameterList([zeros(f, d) for _ in range(config.writes - 1)])
        self.activation = build_nonlinearity(config).to(dtype=dtype, device=device)
        # BatchTopK chooses among a batch in training alone: everywhere else a token's code is its own.
        self.eval()

    def decoder(self, ahead: int) -> Tensor:
        """Decoder [F, d] to the layer `ahead` of its own, 0 for its own; ahead < `config.writes`."""
        return self.W_dec if ahead == 0 else self.W_later[ahead - 1]

    def write_norms(self) -> Tensor:
        """How far a feature of activation 1 moves the residual stream, over all layers that it writes to: [F]."""
        squares = [self.decoder(ahead).square().sum(1) for ahead in range(self.config.writes)]
        return torch.stack(squares).sum(0).sqrt()

    def directions(self, weights: Sequence[Tensor | None]) -> Tensor:
        """The direction that a feature adds to the residual stream, over all layers that it writes to: [F, d].

        `weights` [d] are those of the norm after each of these layers' MLPs, None where nothing follows.
        """
        rows = [self.decoder(ahead) if w is None else self.decoder(ahead) * w for ahead, w in enumerate(weights)]
        return torch.stack(rows).sum(0)

    def pre_activations(self, x: Tensor) -> Tensor:
        """`x W_enc^T + b_enc`: [.., d] -> [.., F]. Differentiable."""
        return functional.linear(x.to(self.W_enc.dtype), self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> SparseCode:
        """The active features at every token: [.., d] -> SparseCode [.., k]. Differentiable in input and weights."""
        return self._encode(x)[0]

    def _encode(self, x: Tensor) -> tuple[SparseCode, Tensor, Tensor]:
        """Code, all pre-activations, and those at the code's features."""
        rows = x.to(self.W_enc.dtype).reshape(math.prod(x.shape[:-1]), x.shape[-1])
        with torch.no_grad():
            pre = self._product(rows)
            indices = self.activation.support(pre)
        order = FeatureOrder()
        at_support = gather_pre_activations(pre, indices, rows, self.W_enc, self.b_enc, order)
        values = self.activation.values(at_support, indices)
        lead = x.shape[:-1]
        shape = (*lead, indices.shape[-1])
        return (
            SparseCode(indices.view(shape), values.view(shape), order),
            pre.view(*lead, pre.shape[-1]),
            at_support.view(shape),
        )

    def _product(self, rows: Tensor) -> Tensor:
        """`pre_activations` of rows [N, d], in `product_dtype` while training."""
        if self.product_dtype is None or not self.training:
            return self.pre_activations(rows)
        half = (one.to(self.product_dtype) for one in (rows, self.W_enc, self.b_enc))
        return functional.linear(*half)

    def write(self, code: SparseCode, ahead: int = 0) -> Tensor:
        """`sum_f a_f W_dec[f]` -> [.., d], what the features add at the layer `ahead` of their own."""
        *lead, k = code.indices.shape
        rows = (math.prod(lead), k)
        summed = sparse_decode(code.indices.reshape(rows), code.values.reshape(rows), self.decoder(ahead), code.order)
        return summed.view(*lead, summed.shape[-1])

    def decode(self, code: SparseCode, x: Tensor | None = None) -> Tensor:
        """`sum_f a_f W_dec[f] + b_dec (+ W_skip x)` -> [.., d], from this layer's features alone.

        Raises:
            ValueError: when the transcoder has a skip path and `x` [.., d] is not given.
        """
        out = self.write(code) + self.b_dec
        if self.W_skip is not None:
            if x is None:
                raise ValueError(f"the transcoder of layer {self.config.layer} has a skip path: decode needs its input")
            out = out + functional.linear(x.to(self.W_skip.dtype), self.W_skip)
        return out

    def forward(self, x: Tensor) -> TranscoderOutput:
        """Reconstruct the MLP output from the MLP input `x` [.., d], by this layer's features alone."""
        code, pre, at_support = self._encode(x)
        return TranscoderOutput(self.decode(code, x), code, pre, at_support)


def written_before(transcoders: Mapping[int, Transcoder], layer: int, codes: Mapping[int, SparseCode]) -> Tensor | None:
    """What features of lower layers add to the reconstruction of `layer`, from their codes: [.., d].

    None when there is none, so always in a set that is not cross-layer.
    """
    found = [
        transcoders[lower].write(code, layer - lower)
        for lower, code in codes.items()
        if 0 < layer - lower < transcoders[lower].config.writes
    ]
    return sum(found[1:], found[0]) if found else None


class TranscoderSet(nn.Module):
    """The transcoders of a model's layers, `set[layer]`. Widths may differ by layer."""

    def __init__(self, transcoders: Mapping[int, Transcoder], config: TranscoderSetConfig) -> None:
        super().__init__()
        self.config = config
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
    def cross_layer(self) -> bool:
        """Whether some feature writes to more than its own layer."""
        return any(one.config.writes > 1 for one in self.transcoders.values())

    def encode(self, inputs: Mapping[int, Tensor]) -> dict[int, SparseCode]:
        """Codes [.., k] of layers from their MLP inputs [.., d]."""
        return {layer: self[layer].encode(x) for layer, x in inputs.items()}

    def decode(self, layer: int, codes: Mapping[int, SparseCode], x: Tensor) -> Tensor:
        """Reconstruction [.., d] of one layer from the codes of all layers that write to it and its own input
        [.., d].
        """
        own = self[layer].decode(codes[layer], x)
        earlier = written_before(self.transcoders, layer, codes)
        return own if earlier is None else own + earlier

    @property
    def widths(self) -> dict[int, int]:
        """How many features each layer has."""
        return {layer: self[layer].config.n_features for layer in self.layers}

    @property
    def layers(self) -> list[int]:
        """The layers that have a transcoder, ascending."""
        return [int(key) for key in self._by_layer]

    @property
    def n_layers(self) -> int:
        """How many layers have a transcoder."""
        return len(self._by_layer)

    @property
    def transcoders(self) -> dict[int, Transcoder]:
        """Layer -> transcoder, ascending."""
        return {layer: self[layer] for layer in self.layers}
