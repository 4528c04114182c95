"""The linear adjoint of the local replacement model, batched over targets; no autograd.

A target reads the residual stream at one position by a vector g. Going down, with G the gradient at the stream,
    leaving     edge G . v into the soft token's column;  G <- c G
    MLP         edges (s4 * G) . (a W_dec | error | b_dec);  G <- G + s3 * ((s4 * G) W_skip)
                (with cross-layer transcoders the features of all lower layers write here too)
    attention   G <- G + s1 * ((sv * (P^T ((s2 * G) W_o))) W_v)
and the embeddings collect what arrives (Ameisen et al. 2025, with the frozen pieces of `vlmscope.replacement.frozen`).
A soft token is one source, whether the vision tower writes it into the stream once or again after later layers.
Only positions that the frozen patterns let a target see are carried.
Legend: B targets, S carried positions, d width, H heads, Hkv key/value heads, D head width, K features of one position
that write to a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.attribution.columns import Columns
from vlmscope.attribution.sources import SourceVectors
from vlmscope.replacement.frozen import FrozenLayer
from vlmscope.replacement.model import ReplacementModel


@dataclass
class Sweep:
    """State of one sweep: `gradient [S, B, d]` at `positions [S]`, and the rows `out [B, columns + 1]` so far."""

    gradient: Tensor
    positions: Tensor
    out: Tensor

    @property
    def at(self) -> "Tensor | slice":
        """The positions as an index: a slice where they follow each other, which reads without a copy."""
        return _index(self.positions)


class Adjoint:
    """Rows of edges of one replacement model."""

    def __init__(self, replacement: ReplacementModel, sources: SourceVectors | None = None) -> None:
        self.replacement = replacement
        self.sources = SourceVectors(replacement) if sources is None else sources
        self.columns: Columns = self.sources.columns
        # [L, T, T]: does any head of a layer let a query see a key?
        self._sees = torch.stack([(pattern > 0).any(dim=0) for pattern in replacement.state.patterns])
        # Whether a column may get edges at more than one layer.
        self._crosses = any(features.w_later for features in replacement.features)

    @torch.no_grad()
    def feature_rows(self, layer: int, which: Tensor) -> Tensor:
        """Edges into features of one layer.

        Args:
            layer: the layer.
            which: `[B]` int64, numbers among the layer's active features; sorted ones sweep fewest positions.

        Returns:
            `[B, start[layer] + 1]`, the columns that exist below the layer and its own bias.
        """
        features = self.replacement.features[layer]
        position = features.position[which]
        vectors = features.w_enc[features.index[which]] * self.replacement.layers[layer].mlp_in_scale[position]
        return self.stream_rows(layer, vectors, position, features.encoder_bias[which], after_attention=True)

    @torch.no_grad()
    def stream_rows(
        self,
        layer: int,
        vectors: Tensor,
        position: Tensor,
        constants: Tensor | None = None,
        *,
        after_attention: bool = False,
    ) -> Tensor:
        """Edges into read-outs of the stream before a layer's attention, or between it and the MLP.

        Args:
            layer: the layer; L reads what leaves the last one.
            vectors: `[B, d]`, with the scale of the norm that the target reads through.
            position: `[B]` int64.
            constants: `[B]`, what the layer itself adds to each target, for its bias column; not for L.
            after_attention: read after the layer's attention.

        Returns:
            `[B, start[layer] + 1]`, the columns that exist below the layer and its own bias; `[B, columns]` for L.
        """
        inside = layer < self.columns.n_layers
        width = self.columns.bias(layer) + 1 if inside else self.columns.total
        sweep = self._begin(vectors, position, width)
        if inside and constants is not None:
            sweep.out[:, width - 1] = constants
        if after_attention:
            self._attention(layer, sweep)
        self._descend(layer, sweep)
        return sweep.out[:, :width]

    def _begin(self, vectors: Tensor, position: Tensor, width: int) -> Sweep:
        """A sweep that holds each target's vector at its own position."""
        positions, slot = torch.unique(position, return_inverse=True)
        gradient = vectors.new_zeros(len(positions), *vectors.shape)
        gradient[slot, torch.arange(len(vectors), device=vectors.device)] = vectors
        return Sweep(gradient, positions, vectors.new_zeros(len(vectors), width + 1))

    def _descend(self, layer: int, sweep: Sweep) -> None:
        """Go from the stream before `layer` down to the embeddings."""
        for below in range(layer - 1, -1, -1):
            self._leaving(below, sweep)
            self._mlp(below, sweep)
            self._attention(below, sweep)
        self._read_tokens(self.replacement.state.embeddings, sweep)

    def _read_tokens(self, written: Tensor, sweep: Sweep) -> None:
        """Add the edges of what tokens write into the stream here, `written [T, d]`."""
        edges = torch.bmm(sweep.gradient, written[sweep.at][:, :, None])[:, :, 0]
        sweep.out[:, sweep.at] += edges.T

    def _leaving(self, layer: int, sweep: Sweep) -> None:
        frozen = self.replacement.layers[layer]
        if frozen.injection is not None:
            self._read_tokens(frozen.injection, sweep)
        if frozen.stream_scale != 1.0:
            sweep.gradient = sweep.gradient * frozen.stream_scale

    def _mlp(self, layer: int, sweep: Sweep) -> None:
        sources = self.sources.of(layer)
        edges = torch.bmm(sweep.gradient, sources.vectors[sweep.at].transpose(1, 2))  # [S, B, K + 2]
        columns, edges_in = sources.columns[sweep.at].flatten(), edges[:, :, :-1].transpose(0, 1).flatten(1)
        if self._crosses:
            edges_in = edges_in + sweep.out[:, columns]
        sweep.out[:, columns] = edges_in  # padding collides in the scratch column, which nobody reads
        sweep.out[:, self.columns.bias(layer)] += edges[:, :, -1].sum(0)
        skip = self.replacement.features[layer].w_skip
        if skip is not None:
            frozen = self.replacement.layers[layer]
            written = frozen.write_scale[sweep.positions, None] * sweep.gradient
            sweep.gradient = sweep.gradient + frozen.mlp_in_scale[sweep.positions, None] * (written @ skip)

    def _attention(self, layer: int, sweep: Sweep) -> None:
        frozen = self.replacement.layers[layer]
        seen = self._sees[layer, sweep.positions].any(0)
        seen[sweep.positions] = True
        below = torch.nonzero(seen)[:, 0]
        above, keys = sweep.at, _index(below)
        scaled = frozen.attn_out_scale[above, None] * sweep.gradient
        values = _value_gradient(frozen, scaled, above, keys)
        if frozen.value_scale is not None:
            values = values * frozen.value_scale[keys, None]
        if frozen.output_bias is not None:
            sweep.out[:, self.columns.bias(layer)] += (scaled @ frozen.output_bias).sum(0)
        if frozen.value_bias is not None:
            sweep.out[:, self.columns.bias(layer)] += (values @ frozen.value_bias).sum(0)
        gradient = values @ frozen.value_weight
        gradient *= frozen.attn_in_scale[keys, None]
        gradient[_index(torch.searchsorted(below, sweep.positions))] += sweep.gradient
        sweep.gradient, sweep.positions = gradient, below


def _index(positions: Tensor) -> Tensor | slice:
    """Ascending `positions [S]` as a slice if they follow each other."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


def _value_gradient(frozen: FrozenLayer, scaled: Tensor, above: Tensor | slice, below: Tensor | slice) -> Tensor:
    """Back through output projection and pattern: `[S, B, d]` at queries `above` to `[S', B, Hkv * D]` at keys
    `below`.
    """
    n_above, n_targets, _ = scaled.shape
    n_heads, n_kv_heads = frozen.pattern.shape[0], frozen.n_kv_heads
    groups = n_heads // n_kv_heads
    z = (scaled @ frozen.output_weight).view(n_above, n_targets, n_kv_heads, groups, -1)
    head_dim = z.shape[-1]
    # Query heads that share a key/value head add up, so (group, query) is one contracted axis.
    by_head = z.permute(2, 3, 0, 1, 4).reshape(n_kv_heads, groups * n_above, n_targets * head_dim)
    pattern = frozen.pattern[:, above][:, :, below].reshape(n_kv_heads, groups * n_above, -1)
    n_below = pattern.shape[-1]
    values = torch.bmm(pattern.transpose(1, 2), by_head).view(n_kv_heads, n_below, n_targets, head_dim)
    return values.permute(1, 2, 0, 3).reshape(n_below, n_targets, n_kv_heads * head_dim)
