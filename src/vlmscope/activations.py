"""Activations captured by forward hooks: a decoder's MLPs and attention scores, a vision tower's attention.

`capture_mlp` is for training (batches, the model's own attention kernels); `capture_state` keeps everything that the
local replacement model of one prompt needs, from one forward; `head_score` splits one attention score into linear maps;
`capture_vision_attention` gives what the patches of a picture attend to. Hook points are named as in
`docs/glossary.md`.

Legend: B batch, T positions, d model width, L layers, H heads, Hkv key/value heads, D head width, V vocabulary; of the
vision tower P tokens of a tile (class tokens, then patches row by row), S soft tokens of a picture, d_v width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.models.attention import (
    FoundScores,
    Pattern,
    recording_patterns,
    recording_vision_patterns,
    stopping_at_scores,
    using_vlmscope_attention,
)
from vlmscope.models.base import Adapter, ModelInputs, Stack, all_norms
from vlmscope.models.batching import InputBatch, make_batch, watching_injections
from vlmscope.models.boxes import Tile
from vlmscope.models.checkpoint import materialised
from vlmscope.models.loading import VLM


def target_module(stack: Stack, layer: int, hook: str) -> nn.Module:
    """The module whose output a transcoder with this `output_hook` imitates."""
    if hook != "mlp_out_post":
        return stack.mlp(layer)
    norm = stack.after_mlp(layer)
    assert norm is not None, f"hook {hook!r} needs a norm after the MLP"
    return norm


def target_at(stack: Stack, layer: int, hook: str, mlp_out: Tensor) -> Tensor:
    """What a transcoder with this `output_hook` imitates, from the raw MLP's output: [.., d] -> [.., d]."""
    return mlp_out if hook != "mlp_out_post" else target_module(stack, layer, hook)(mlp_out)


def norm_weight_after(stack: Stack, layer: int, hook: str, like: Tensor) -> Tensor | None:
    """Weights [d] of the norm between a transcoder's output and the stream, up to one positive factor.

    In dtype and device of `like`. None where no norm lies between `hook` and the residual stream.
    """
    norm = stack.after_mlp(layer)
    if hook != "mlp_out" or norm is None:
        return None
    assert isinstance(stack, Adapter), "norms after a tower's MLP are not known"
    return stack.norm_scale(norm, torch.ones(stack.d_model, dtype=stack.dtype, device=stack.device)).to(like)


@dataclass(frozen=True)
class ForwardState:
    """One forward over one prompt.

    `embeddings` enter the first layer (embedding scale and projected soft tokens included); `patterns` are each
    layer's attention probabilities; `mlp_in` and `mlp_out` those of the raw MLP; `norm_scales` the factors
    of `attn_in`, `attn_out_post`, `mlp_in`, `mlp_out_post`, 1 for no norm; `logits` what the unembedding gives, before
    the cap of a model that caps its logits; `value_scales` for each layer `[T, Hkv * D]`, factors of the norm of
    values, or None; `injections` what pictures add to the stream after the first n layers, n = 0 in most families.
    """

    embeddings: Float[Tensor, "t d"]
    patterns: list[Pattern]
    mlp_in: Float[Tensor, "layers t d"]
    mlp_out: Float[Tensor, "layers t d"]
    norm_scales: Float[Tensor, "layers 4 t d"]
    final_norm_scale: Float[Tensor, "t d"]
    logits: Float[Tensor, "t v"]
    value_scales: list[Tensor | None]
    injections: Float[Tensor, "n t d"]

    def to(self, dtype: torch.dtype) -> ForwardState:
        """The same state with every tensor in `dtype`."""
        scales = [None if scale is None else scale.to(dtype) for scale in self.value_scales]
        tensors = {name: value.to(dtype) for name, value in vars(self).items() if isinstance(value, Tensor)}
        patterns = [pattern.to(dtype) for pattern in self.patterns]
        return ForwardState(**tensors, patterns=patterns, value_scales=scales)


Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


@contextmanager
def hooked(pairs: Mapping[nn.Module, Hook]) -> Iterator[None]:
    """Forward hooks of some modules, while the context is open."""
    with ExitStack() as stack:
        for module, hook in pairs.items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def capture_mlp(stack: Stack, batch: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs and outputs of each layer's MLP for one batch: layer -> ([B, T, d], [B, T, d]) in the model's dtype.

    `batch` holds keyword arguments of the Hugging Face forward; padded positions are returned too. Towers that join all
    pictures give one row of all patches.
    """
    captured: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x, y = (side.detach() if side.ndim > 2 else side.detach()[None] for side in (args[0], output))
            captured[layer] = x, y

        return hook

    with hooked({stack.mlp(layer): keep(layer) for layer in range(stack.n_layers)}):
        stack.run(batch)
    return captured


@torch.no_grad()
def capture_state(adapter: Adapter, inputs: ModelInputs) -> ForwardState:
    """Everything that the local replacement model needs, from one forward with recorded attention.

    The model must be in evaluation mode. In float64, run it under `exact_float64`: otherwise parts have errors of 1e-7.
    """
    assert not adapter.model.training, "capture needs the model in evaluation mode"
    norm_inputs: dict[nn.Module, Tensor] = {}
    mlp: dict[int, tuple[Tensor, Tensor]] = {}
    logits: list[Tensor] = []

    def keep_input(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        norm_inputs[module] = args[0].detach()[0]

    def keep_mlp(layer: int) -> Hook:
        return lambda _module, args, output: mlp.update({layer: (args[0].detach()[0], output.detach()[0])})

    layers = range(adapter.n_layers)
    hooks: dict[nn.Module, Hook] = {adapter.mlp(layer): keep_mlp(layer) for layer in layers}
    hooks |= dict.fromkeys(all_norms(adapter), keep_input)
    hooks[adapter.lm_head()] = lambda _module, _args, output: logits.append(output.detach()[0])
    with (
        recording_patterns(adapter, lambda pattern: Pattern.of(pattern[0])) as patterns,
        hooked(hooks),
        watching_injections(adapter) as injections,
    ):
        adapter.forward(inputs.tensors, use_cache=False)

    embeddings = norm_inputs[adapter.norms(0).attn_in]
    ones = torch.ones_like(embeddings)

    def scale(norm: nn.Module | None) -> Tensor:
        return ones if norm is None else adapter.norm_scale(norm, norm_inputs[norm])

    value_norms = [adapter.value_norm(layer) for layer in layers]
    return ForwardState(
        embeddings=embeddings,
        patterns=[patterns[layer] for layer in layers],
        mlp_in=torch.stack([mlp[layer][0] for layer in layers]),
        mlp_out=torch.stack([mlp[layer][1] for layer in layers]),
        norm_scales=torch.stack([torch.stack([scale(norm) for norm in adapter.norms(layer)]) for layer in layers]),
        final_norm_scale=scale(adapter.final_norm()),
        logits=logits[0],
        value_scales=[None if norm is None else scale(norm).flatten(1) for norm in value_norms],
        injections=injections[0][0] if injections else embeddings.new_zeros(0, *embeddings.shape),
    )


@contextmanager
def watching_mlp_inputs(stack: Stack, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Pass each layer's MLP input [B, T, d] to `take(layer, x)` while the model runs, layer after layer."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: take(layer, args[0])

    with ExitStack() as opened:
        for layer in layers:
            opened.callback(stack.mlp(layer).register_forward_pre_hook(hook(layer)).remove)
        yield


def mlp_inputs(adapter: Adapter, batch: InputBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """MLP inputs by layer [B, T, d] of one unedited forward, with the model's fast kernels."""
    return mlp_inputs_and_logits(adapter, batch, layers)[0]


@torch.no_grad()
def mlp_inputs_and_logits(
    adapter: Adapter, batch: InputBatch, layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """As `mlp_inputs`, with the logits [B, V] of the last position."""
    inputs: dict[int, Tensor] = {}
    with watching_mlp_inputs(adapter, layers, inputs.__setitem__):
        logits = batch.next_logits(adapter)
    return inputs, logits


@dataclass(frozen=True)
class HeadSide:
    """A query, or a key, of one head at one position: `value = weight @ attn_in + constant`.

    `value` [D] is the model's own, norm and RoPE applied; `weight` [D, d] is projection, frozen norm scale and rotation
    in one; `constant` [D] comes from the projection's bias, 0 in most families.
    """

    value: Tensor
    weight: Tensor
    constant: Tensor


@dataclass(frozen=True)
class HeadScore:
    """A head's score `scale * query . key` before the softmax, and before the cap of a family that caps scores.

    `softcap` is None without a cap.
    """

    query: HeadSide
    key: HeadSide
    scale: float
    softcap: float | None

    @property
    def value(self) -> float:
        """The score."""
        return self.scale * float(self.query.value.double() @ self.key.value.double())


def head_score(
    adapter: Adapter, inputs: ModelInputs, layer: int, head: int, query: int, key: int, dtype: torch.dtype
) -> HeadScore:
    """Run the model up to a layer's attention and split one score of query head `head` into linear maps.

    The rotation is not computed again: the attention module runs once more on its own input with the outputs of its
    query and key projections as leaves and its norms replaced by their frozen scales. What it then passes to the
    softmax is linear in the leaves, and its derivative is the map, whatever kind of RoPE a family has.

    `query` and `key` are positions. The result is in `dtype`; the model runs in its own, in evaluation mode.
    """
    module = adapter.attention(layer)
    with torch.no_grad(), using_vlmscope_attention(adapter):
        attention_args, attention_kwargs = adapter.arguments_of(module, inputs.tensors)
    parts = adapter.score_parts(layer)
    leaves: dict[nn.Module, Tensor] = {}

    def leaf(projection: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaves[projection] = output.detach().to(dtype).requires_grad_()
        return leaves[projection]

    def frozen(norm: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
        return args[0] * adapter.norm_scale(norm, args[0].detach())

    with torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(using_vlmscope_attention(adapter))
        norms = [norm for norm in (parts.query_norm, parts.key_norm) if norm is not None]
        stack.enter_context(hooked({parts.query: leaf, parts.key: leaf} | dict.fromkeys(norms, frozen)))
        stack.enter_context(stopping_at_scores(module))
        try:
            module(*attention_args, **attention_kwargs)
            raise AssertionError("the attention module did not call its attention function")
        except FoundScores as reached:
            scores = reached  # Python unbinds `reached` after the clause
        kv_head = head // (scores.query.shape[1] // scores.key.shape[1])
        sides = (
            _side(scores.query[0, head, query], parts.query, leaves[parts.query], query, head),
            _side(scores.key[0, kv_head, key], parts.key, leaves[parts.key], key, kv_head),
        )
    return HeadScore(*sides, scale=scores.scaling, softcap=scores.softcap)


def _side(value: Tensor, projection: nn.Module, leaf: Tensor, position: int, head: int) -> HeadSide:
    """`value [D]` as a map of the input of `projection`, whose output `[1, T, heads * D]` is `leaf`."""
    width = len(value)
    rows = slice(head * width, (head + 1) * width)
    gradients = [torch.autograd.grad(value[i], leaf, retain_graph=True)[0][0, position, rows] for i in range(width)]
    rotation = torch.stack(gradients)
    with torch.no_grad():
        weight = materialised(projection)[rows].to(rotation.dtype)
        constant = rotation.new_zeros(width)
        if getattr(projection, "bias", None) is not None:
            constant = rotation @ materialised(projection, "bias")[rows].to(rotation.dtype)
        return HeadSide(value.detach(), rotation @ weight, constant)


@dataclass(frozen=True)
class TileAttention:
    """Attention in one tile.

    `patterns`: layer -> `[H, P, P]`, attention probabilities, last two axes query and key, rows summing to 1 (0 outside
    the window of a layer that attends within windows), or their reduction. `states [P, d_v]`: the tower's last states
    as the projector reads them.
    """

    tile: Tile
    patterns: dict[int, Tensor]
    states: Tensor


@dataclass(frozen=True)
class PictureAttention:
    """One picture: its tiles, and `pooling [S, sum of P]` from their tokens to soft tokens (see `PicturePatches`)."""

    tiles: list[TileAttention]
    pooling: sparse.csr_array


Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def capture_vision_attention(
    vlm: VLM,
    inputs: ModelInputs,
    layers: Sequence[int] | None = None,
    reduce: Reduce | None = None,
) -> list[PictureAttention]:
    """The attention patterns of the vision tower at one prompt's pictures, in order, from one forward of the tower.

    The model must be in evaluation mode. `layers` of the tower count from the end when negative (`range(-4, 0)`: the
    last four); all when None. A pattern takes `H * P * P` numbers per tile, 1 GiB in float32 for 4096 patches and 16
    heads; `reduce` replaces it as soon as its layer has run, so that no two layers' patterns are in memory at once.

    Raises:
        UserError: the model takes no pictures, or the prompt has none.
    """
    adapter = vlm.adapter
    assert not adapter.model.training, "capture needs the model in evaluation mode"
    if not adapter.has_vision:
        raise UserError(
            f"the model {vlm.name} takes no pictures, so there is no vision attention; choose another model"
        )
    if not inputs.sizes:
        raise UserError("the prompt has no picture, so there is no vision attention; give one with image=")
    n_layers = len(adapter.vision_attention())
    layers = range(n_layers) if layers is None else layers
    chosen = sorted({layer % n_layers for layer in layers})
    pictures = adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    tiles = [tile for picture in pictures for tile in picture.tiles]
    with ExitStack() as stack:
        recorded = stack.enter_context(recording_vision_patterns(adapter, chosen))
        reduced = stack.enter_context(_reducing(adapter, recorded, tiles, reduce))
        kept = stack.enter_context(_keeping_states(adapter))
        make_batch(adapter, [inputs])  # runs the tower only, not the decoder
    states = torch.cat(kept)
    captured = []
    for number, tile in enumerate(tiles):
        patterns = {layer: reduced[layer][number] for layer in chosen}
        captured.append(TileAttention(tile, patterns, states[torch.from_numpy(tile.tokens)]))
    rest = iter(captured)
    return [PictureAttention([next(rest) for _ in picture.tiles], picture.pooling) for picture in pictures]


@contextmanager
def _reducing(
    adapter: Adapter, recorded: Mapping[int, list[Tensor]], tiles: Sequence[Tile], reduce: Reduce | None
) -> Iterator[dict[int, list[Tensor]]]:
    """A dict that the forward fills: layer -> each tile's reduced pattern; the patterns are dropped at once."""
    reduced: dict[int, list[Tensor]] = {}
    needed = 1 + max(int(tile.tokens.max()) for tile in tiles)

    def after(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls = recorded[layer]
            if sum(call.shape[0] * call.shape[-1] for call in calls) < needed:
                return  # the tower will be called again, with more pictures
            patterns = (tile_pattern(calls, tile) for tile in tiles)
            reduced[layer] = [pattern if reduce is None else reduce(pattern) for pattern in patterns]
            calls.clear()

        return hook

    modules = adapter.vision_attention()
    with hooked({modules[layer]: after(layer) for layer in recorded}):
        yield reduced
    assert set(reduced) == set(recorded), "the tower was given other tokens than the adapter says"


@contextmanager
def _keeping_states(adapter: Adapter) -> Iterator[list[Tensor]]:
    """A list to which the forward adds the tower's last states, `[N, d_v]` per call."""
    kept: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept.append(states.detach().flatten(0, -2))

    with hooked({adapter.vision_states(): hook}):
        yield kept


def tile_pattern(calls: Sequence[Tensor], tile: Tile) -> Tensor:
    """The pattern `[H, P, P]` of a tile from those of the tower's calls, `[B, H, N, N]` each.

    The tokens of all calls and their batches, in order, are the tower's tokens; tokens of different batches or calls do
    not see each other.
    """
    pattern, start = None, 0
    for block in (block for call in calls for block in call):
        n_tokens = block.shape[-1]
        members = np.flatnonzero((tile.tokens >= start) & (tile.tokens < start + n_tokens))
        inside = tile.tokens[members] - start
        start += n_tokens
        if np.array_equal(inside, np.arange(n_tokens)) and len(members) == len(tile):
            return block  # the block is this tile: no copy
        if len(members):
            rows, source = (torch.from_numpy(index).to(block.device) for index in (members, inside))
            if pattern is None:
                pattern = block.new_zeros((block.shape[0], len(tile), len(tile)))
            pattern[:, rows[:, None], rows] = block[:, source[:, None], source]
    assert pattern is not None and tile.tokens.max() < start, "the tower was given other tokens than the adapter says"
    return pattern
