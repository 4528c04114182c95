"""Activations of a decoder, captured by forward hooks without gradients: MLP inputs and outputs, attention scores.

`capture_mlp` is the fast way for training (batches, the model's own attention kernels); `capture_state` keeps
everything that the local replacement model of one prompt needs, from one forward; `head_score` takes one attention
score apart. Hook points have the names of `docs/glossary.md`.

Shapes: B batch, T positions, d model width, L layers, H heads, Hkv key/value heads, D head width, V vocabulary.

Of the vision tower: what the patches of a picture attend to. Legend: H heads, P tokens of a tile (class tokens, then
patches row by row), S soft tokens of a picture, d_v width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.models.attention import (
    FoundScores,
    recording_patterns,
    recording_vision_patterns,
    stopping_at_scores,
    using_vlmscope_attention,
)
from vlmscope.models.base import Adapter, ModelInputs, all_norms
from vlmscope.models.batching import InputBatch, make_batch, watching_injections
from vlmscope.models.boxes import Tile
from vlmscope.models.checkpoint import materialised
from vlmscope.models.loading import VLM


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


class HasAdapter(Protocol):
    """A loaded model with its adapter, such as `vlmscope.models.loading.VLM`."""

    @property
    def adapter(self) -> Adapter:
        """The family's adapter."""
        ...


def adapter_of(model: Adapter | HasAdapter) -> Adapter:
    """The adapter itself, or that of a loaded model."""
    return model if isinstance(model, Adapter) else model.adapter


@dataclass(frozen=True)
class ForwardState:
    """One forward over one prompt.

    `embeddings` enter the first layer (embedding scale and projected soft tokens included); `patterns` are attention
    probabilities, last two axes query and key; `mlp_in` and `mlp_out` those of the raw MLP; `norm_scales` the factors
    of `attn_in`, `attn_out_post`, `mlp_in`, `mlp_out_post`, 1 for no norm; `logits` what the unembedding gives, before
    the cap of a model that caps its logits; `value_scales` for each layer `[T, Hkv * D]`, factors of the norm of
    values, or None; `injections` what pictures add to the stream after the first n layers, n = 0 in most families.
    """

    embeddings: Float[Tensor, "t d"]
    patterns: Float[Tensor, "layers h t t"]
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
        return ForwardState(**tensors, value_scales=scales)


Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


@contextmanager
def _hooks(pairs: Mapping[nn.Module, Hook]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in pairs.items():
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@torch.no_grad()
def capture_mlp(model: Adapter | HasAdapter, batch: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs and outputs of every layer's MLP for one batch: layer -> ([B, T, d], [B, T, d]) in the model's dtype.

    `batch` holds keyword arguments of the Hugging Face forward; padded positions are returned too.
    """
    adapter = adapter_of(model)
    captured: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> Hook:
        return lambda _module, args, output: captured.update({layer: (args[0].detach(), output.detach())})

    with _hooks({adapter.mlp(layer): keep(layer) for layer in range(adapter.n_layers)}):
        # Only the decoder's insides are wanted: one position of logits instead of [B, T, V].
        adapter.forward(batch, use_cache=False, logits_to_keep=1)
    return captured


@torch.no_grad()
def capture_state(model: Adapter | HasAdapter, inputs: ModelInputs) -> ForwardState:
    """Everything that the local replacement model needs, from one forward with recorded attention.

    The model must be in evaluation mode. In float64 run it under `exact_float64` to be good to more than 1e-7.
    """
    adapter = adapter_of(model)
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
    with recording_patterns(adapter) as patterns, _hooks(hooks), watching_injections(adapter) as injections:
        adapter.forward(inputs.tensors, use_cache=False)

    embeddings = norm_inputs[adapter.norms(0).attn_in]
    ones = torch.ones_like(embeddings)

    def scale(norm: nn.Module | None) -> Tensor:
        return ones if norm is None else adapter.norm_scale(norm, norm_inputs[norm])

    value_norms = [adapter.value_norm(layer) for layer in layers]
    return ForwardState(
        embeddings=embeddings,
        patterns=torch.stack([patterns[layer][0] for layer in layers]),
        mlp_in=torch.stack([mlp[layer][0] for layer in layers]),
        mlp_out=torch.stack([mlp[layer][1] for layer in layers]),
        norm_scales=torch.stack([torch.stack([scale(norm) for norm in adapter.norms(layer)]) for layer in layers]),
        final_norm_scale=scale(adapter.final_norm()),
        logits=logits[0],
        value_scales=[None if norm is None else scale(norm).flatten(1) for norm in value_norms],
        injections=injections[0][0] if injections else embeddings.new_zeros(0, *embeddings.shape),
    )


@contextmanager
def watching_mlp_inputs(adapter: Adapter, layers: Sequence[int], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand every layer's MLP input [B, T, d] to `take(layer, x)` while the model runs, layer after layer."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: take(layer, args[0])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(adapter.mlp(layer).register_forward_pre_hook(hook(layer)).remove)
        yield


def mlp_inputs(adapter: Adapter, batch: InputBatch, layers: Sequence[int]) -> dict[int, Tensor]:
    """MLP inputs by layer [B, T, d] of one unedited forward, with the model's fast kernels."""
    return mlp_inputs_and_logits(adapter, batch, layers)[0]


@torch.no_grad()
def mlp_inputs_and_logits(
    adapter: Adapter, batch: InputBatch, layers: Sequence[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """The same with the logits [B, V] of the last position."""
    inputs: dict[int, Tensor] = {}
    with watching_mlp_inputs(adapter, layers, inputs.__setitem__):
        logits = adapter.next_logits(batch.tensors)
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

    `query` is that of the position that looks, `key` that of the position that is looked at; `softcap` None: no cap.
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
    model: Adapter | HasAdapter,
    inputs: ModelInputs,
    layer: int,
    head: int,
    query: int,
    key: int,
    dtype: torch.dtype,
) -> HeadScore:
    """Run the model up to a layer's attention and take apart one head's score there.

    The rotation is not computed again: the attention module is run once more on its own input with the outputs of its
    query and key projections made leaves and its norms replaced by their frozen scales; what it then hands to the
    softmax is linear in the leaves, and its derivative is the map, whatever kind of RoPE a family has.

    `head` is the query head, `query` the position that looks, `key` that which is looked at. The result is in `dtype`;
    the model runs, in evaluation mode, in its own.
    """
    adapter = adapter_of(model)
    module = adapter.attention(layer)
    attention_args, attention_kwargs = _attention_input(adapter, module, inputs)
    parts = adapter.score_parts(layer)
    leaves: dict[nn.Module, Tensor] = {}

    def leaf(projection: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        leaves[projection] = output.detach().to(dtype).requires_grad_()
        return leaves[projection]

    def frozen(norm: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
        return args[0] * adapter.norm_scale(norm, args[0].detach())

    with torch.enable_grad(), ExitStack() as stack:
        stack.enter_context(using_vlmscope_attention(adapter))
        for projection in (parts.query, parts.key):
            stack.callback(projection.register_forward_hook(leaf).remove)
        for norm in (parts.query_norm, parts.key_norm):
            if norm is not None:
                stack.callback(norm.register_forward_hook(frozen).remove)
        stack.enter_context(stopping_at_scores(module))
        try:
            module(*attention_args, **attention_kwargs)
            raise AssertionError("the attention module did not call its attention function")
        except FoundScores as scores:
            found = scores
        group = found.query.shape[1] // found.key.shape[1]
        sides = (
            _side(found.query[0, head, query], parts.query, leaves[parts.query], query, head),
            _side(found.key[0, head // group, key], parts.key, leaves[parts.key], key, head // group),
        )
    return HeadScore(*sides, scale=found.scaling, softcap=found.softcap)


def _attention_input(adapter: Adapter, module: nn.Module, inputs: ModelInputs) -> tuple[tuple, dict]:
    """What an attention module is called with; the forward ends there."""

    class Reached(Exception):
        """Ends the forward."""

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args, dict(kwargs))

    with torch.no_grad(), using_vlmscope_attention(adapter):
        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            adapter.forward(inputs.tensors, use_cache=False)
        except Reached as reached:
            args, kwargs = reached.args
            return args, kwargs
        finally:
            handle.remove()
    raise AssertionError("the forward did not reach the attention module")


def _side(value: Tensor, projection: nn.Module, leaf: Tensor, position: int, head: int) -> HeadSide:
    """`value [D]` as a map of what `projection` reads, whose output `[1, T, heads * D]` is `leaf`."""
    width = len(value)
    mine = slice(head * width, (head + 1) * width)
    rows = [torch.autograd.grad(value[i], leaf, retain_graph=True)[0][0, position, mine] for i in range(width)]
    turn = torch.stack(rows)
    with torch.no_grad():
        weight = materialised(projection)[mine].to(turn.dtype)
        bias = getattr(projection, "bias", None)
        constant = turn.new_zeros(width)
        if bias is not None:
            constant = turn @ materialised(projection, "bias")[mine].to(turn.dtype)
        return HeadSide(value.detach(), turn @ weight, constant)


@dataclass(frozen=True)
class TileAttention:
    """One tile in the tower.

    `patterns`: layer -> `[H, P, P]`, attention probabilities, last two axes query and key, rows summing to 1 (0 outside
    the window of a layer that attends within windows), or what was made of them. `states` `[P, d_v]`: the tower's last
    states as the decoder's side is given them, where they were asked for.
    """

    tile: Tile
    patterns: dict[int, Tensor]
    states: Tensor | None = None


@dataclass(frozen=True)
class PictureAttention:
    """One picture: its tiles, and `pooling [S, sum of P]` from their tokens to soft tokens (see `PicturePatches`)."""

    tiles: list[TileAttention]
    pooling: sparse.csr_array


@dataclass(frozen=True)
class VisionAttention:
    """The pictures of one prompt in the vision tower, in their order.

    `n_layers` counts the layers of the tower that the decoder is given anything of; `layers` were captured, ascending.
    """

    n_layers: int
    layers: list[int]
    pictures: list[PictureAttention]


Reduce = Callable[[Tensor], Tensor]


@torch.no_grad()
def capture_vision_attention(
    vlm: VLM,
    inputs: ModelInputs,
    layers: Sequence[int] | None = None,
    reduce: Reduce | None = None,
    states: bool = False,
) -> VisionAttention:
    """The attention patterns of the vision tower at one prompt's pictures, from one forward of the tower.

    The model must be in evaluation mode. Patterns of layers that are not asked for are not kept; each that is takes
    `H * P * P` numbers a tile, 1 GiB in float32 for 4096 patches and 16 heads, unless `reduce` makes less of it.

    `layers` are those of the tower, counted from the end when negative (`range(-4, 0)`: the last four); all when None.
    What `reduce` makes takes the place of a tile's pattern `[H, P, P]` as soon as its layer has run, so that no two
    layers' patterns are in memory at once. `states`: whether to keep the tower's last states too.
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
    wanted = range(n_layers) if layers is None else layers
    bad = [layer for layer in wanted if not -n_layers <= layer < n_layers]
    if bad:
        raise UserError(f"the vision tower has no layer {bad[0]}; choose from 0 to {n_layers - 1}")
    chosen = sorted({layer % n_layers for layer in wanted})
    pictures = adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
    tiles = [tile for picture in pictures for tile in picture.tiles]
    with ExitStack() as stack:
        recorded = stack.enter_context(recording_vision_patterns(adapter, chosen))
        reduced = stack.enter_context(_reducing(adapter, recorded, tiles, reduce))
        kept = stack.enter_context(_keeping_states(adapter)) if states else []
        make_batch(adapter, [inputs])  # runs the tower and nothing behind it
    last = torch.cat(kept) if kept else None
    found = []
    for number, tile in enumerate(tiles):
        patterns = {layer: reduced[layer][number] for layer in chosen}
        found.append(TileAttention(tile, patterns, None if last is None else last[torch.from_numpy(tile.tokens)]))
    rest = iter(found)
    return VisionAttention(
        n_layers, chosen, [PictureAttention([next(rest) for _ in p.tiles], p.pooling) for p in pictures]
    )


@contextmanager
def _reducing(
    adapter: Adapter, recorded: Mapping[int, list[Tensor]], tiles: Sequence[Tile], reduce: Reduce | None
) -> Iterator[dict[int, list[Tensor]]]:
    """A dict that the forward fills: layer -> what is made of each tile's pattern; patterns are dropped at once."""
    found: dict[int, list[Tensor]] = {}
    needed = 1 + max(int(tile.tokens.max()) for tile in tiles)

    def taken(layer: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls = recorded[layer]
            if sum(call.shape[0] * call.shape[-1] for call in calls) < needed:
                return  # the tower comes again, with more pictures
            patterns = (tile_pattern(calls, tile) for tile in tiles)
            found[layer] = [pattern if reduce is None else reduce(pattern) for pattern in patterns]
            calls.clear()

        return hook

    modules = adapter.vision_attention()
    with ExitStack() as stack:
        for layer in recorded:
            stack.callback(modules[layer].register_forward_hook(taken(layer)).remove)
        yield found
    assert set(found) == set(recorded), "the tower was given other tokens than the adapter says"


@contextmanager
def _keeping_states(adapter: Adapter) -> Iterator[list[Tensor]]:
    """A list to which the forward adds the tower's last states, `[N, d_v]` a call."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        found.append(states.detach().flatten(0, -2))

    handle = adapter.vision_states().register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def tile_pattern(calls: Sequence[Tensor], tile: Tile) -> Tensor:
    """The pattern `[H, P, P]` of a tile from those of the tower's calls, `[B, H, S, S]` each.

    The tokens of all calls and their batches, in order, are the tower's tokens; those that were not in one call
    together do not see each other.
    """
    pattern, start = None, 0
    for block in (block for call in calls for block in call):
        n_tokens = block.shape[-1]
        where = np.flatnonzero((tile.tokens >= start) & (tile.tokens < start + n_tokens))
        inside = tile.tokens[where] - start
        start += n_tokens
        if np.array_equal(inside, np.arange(n_tokens)) and len(where) == len(tile):
            return block
        if len(where):
            rows, source = (torch.from_numpy(index).to(block.device) for index in (where, inside))
            if pattern is None:
                pattern = block.new_zeros((block.shape[0], len(tile), len(tile)))
            pattern[:, rows[:, None], rows] = block[:, source[:, None], source]
    assert pattern is not None and tile.tokens.max() < start, "the tower was given other tokens than the adapter says"
    return pattern
