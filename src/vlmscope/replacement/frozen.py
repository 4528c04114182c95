"""One decoder layer with attention pattern and norm scales frozen: an affine map.

`h = x + s2 * (P (sv * (s1 * x W_v^T + b_v)) W_o^T + b_o)`, `x' = c (h + s4 * y) + v`, with P the pattern of each head,
s1, s2, s3, s4 the scales of the norms, sv that of the norm of values (1 in most families), c the layer's constant (1 in
most) and v what pictures add after it (0 in most).
Legend: T positions, d model width, H heads, Hkv key/value heads, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.activations.capture import ForwardState
from vlmscope.models.base import Adapter


@dataclass(frozen=True)
class FrozenLayer:
    """The linear pieces of one layer at one input.

    Attributes:
        pattern: `[H, T, T]`, last two axes query and key.
        value_weight: `[Hkv * D, d]`.
        value_bias: `[Hkv * D]` or None.
        output_weight: `[d, H * D]`.
        output_bias: `[d]` or None.
        attn_in_scale: `[T, d]`, s1.
        attn_out_scale: `[T, d]`, s2.
        mlp_in_scale: `[T, d]`, s3.
        write_scale: `[T, d]`, from the transcoder's output to the residual stream: s4, or 1 when it imitates the MLP
            output after the post norm.
        n_kv_heads: Hkv.
        value_scale: `[T, Hkv * D]`, sv, or None for 1.
        stream_scale: c.
        injection: `[T, d]`, v, or None for 0.
    """

    pattern: Tensor
    value_weight: Tensor
    value_bias: Tensor | None
    output_weight: Tensor
    output_bias: Tensor | None
    attn_in_scale: Tensor
    attn_out_scale: Tensor
    mlp_in_scale: Tensor
    write_scale: Tensor
    n_kv_heads: int
    value_scale: Tensor | None = None
    stream_scale: float = 1.0
    injection: Tensor | None = None

    def leave(self, stream: Tensor, *, with_injection: bool) -> Tensor:
        """From the sum `[T, d]` after the MLP to the stream before the next layer; without injection for a change."""
        out = stream if self.stream_scale == 1.0 else stream * self.stream_scale
        return out + self.injection if with_injection and self.injection is not None else out

    def attend(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """What attention adds to the residual stream `x [T, d]`; without biases it is the map of a change of `x`."""
        n_heads, positions, _ = self.pattern.shape
        values = (self.attn_in_scale * x) @ self.value_weight.T
        if with_bias and self.value_bias is not None:
            values = values + self.value_bias
        if self.value_scale is not None:
            values = values * self.value_scale
        per_head = values.view(positions, self.n_kv_heads, -1).repeat_interleave(n_heads // self.n_kv_heads, dim=1)
        z = torch.einsum("hqk,khd->qhd", self.pattern, per_head).reshape(positions, -1)
        out = z @ self.output_weight.T
        if with_bias and self.output_bias is not None:
            out = out + self.output_bias
        return self.attn_out_scale * out


def freeze_layer(adapter: Adapter, state: ForwardState, layer: int, output_hook: str) -> FrozenLayer:
    """The frozen layer of one forward, in the dtype of `state`."""
    dtype = state.embeddings.dtype

    def cast(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.detach().to(dtype)

    scales = state.norm_scales[layer]
    value_weight, output_weight = (weight(layer).detach() for weight in (adapter.value_weight, adapter.output_weight))
    return FrozenLayer(
        pattern=state.patterns[layer],
        value_weight=value_weight.to(dtype),
        value_bias=cast(adapter.value_bias(layer)),
        output_weight=output_weight.to(dtype),
        output_bias=cast(adapter.output_bias(layer)),
        attn_in_scale=scales[0],
        attn_out_scale=scales[1],
        mlp_in_scale=scales[2],
        write_scale=scales[3] if output_hook == "mlp_out" else torch.ones_like(scales[3]),
        # Heads may differ in width and number from layer to layer; query heads do not in number.
        n_kv_heads=value_weight.shape[0] * state.patterns.shape[1] // output_weight.shape[1],
        value_scale=state.value_scales[layer],
        stream_scale=adapter.stream_scale(layer),
        injection=state.injections[layer] if layer < len(state.injections) else None,
    )
