"""The local replacement model of one input, and its forward replay (Ameisen et al. 2025).

Frozen: attention patterns, norm scales, the supports of the sparse codes, the errors. What is left is affine in the
embeddings, the feature activations, the errors and the biases. One layer is
    h  = x + s2 * (P (sv * (s1 * x W_v^T + b_v)) W_o^T + b_o)
    x' = c (h + s4 * y) + v,    y = a W_dec + b_dec + skip path + error
with P the pattern of each head, s1, s2, s3, s4 the scales of the norms, sv that of the norm of values (1 in most
families), c the layer's constant (1 in most) and v what pictures add after it (0 in most). `replay`, `direct` and
`total` run the model forwards; the attribution engine runs its adjoint backwards, in separate code, so that tests
compare two implementations.

With transcoders of the vision tower (`FrozenTower`) the same holds below the soft tokens: tower, pooling and projector
are affine in the patch embeddings, the tower's feature activations, its errors and its biases.
Legend: L layers, T positions, d model width, n active features, F features of a transcoder, V vocabulary, H heads,
Hkv key/value heads, D head width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vlmscope.activations import ForwardState, capture_state, hooked
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, PatchBox
from vlmscope.models.attention import FrozenVision, Pattern, frozen_vision
from vlmscope.models.base import Adapter, ModelInputs, VisionStack
from vlmscope.models.batching import Entering, entering
from vlmscope.models.boxes import tower_kind
from vlmscope.models.checkpoint import materialised
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope
from vlmscope.transcoders.streaming import hold
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet

# (layer, position, feature index) -> change of activation
FeatureChange = Mapping[tuple[int, int, int], float]


@dataclass(frozen=True)
class FrozenLayer:
    """One decoder layer with attention pattern and norm scales frozen, at one input."""

    pattern: Pattern  # `[H, T, T]`
    value_weight: Tensor  # `[Hkv * D, d]`
    value_bias: Tensor | None  # `[Hkv * D]` or None
    output_weight: Tensor  # `[d, H * D]`
    output_bias: Tensor | None  # `[d]` or None
    attn_in_scale: Tensor  # `[T, d]`, s1
    attn_out_scale: Tensor  # `[T, d]`, s2
    mlp_in_scale: Tensor  # `[T, d]`, s3
    # `[T, d]`, from the transcoder's output to the residual stream: s4, or 1 when it imitates the MLP output after the
    # post norm
    write_scale: Tensor
    n_kv_heads: int  # Hkv
    value_scale: Tensor | None = None  # `[T, Hkv * D]`, sv, or None for 1
    stream_scale: float = 1.0  # c
    injection: Tensor | None = None  # `[T, d]`, v, or None for 0

    def values(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """`[T, Hkv * D]` of the residual stream `x [T, d]`."""
        values = (self.attn_in_scale * x) @ self.value_weight.T
        if with_bias and self.value_bias is not None:
            values = values + self.value_bias
        return values if self.value_scale is None else values * self.value_scale

    def attend(self, x: Tensor, *, with_bias: bool) -> Tensor:
        """What attention adds to the residual stream `x [T, d]`; without biases, the same for a change of `x`."""
        values, groups = self.values(x, with_bias=with_bias), self.pattern.n_heads // self.n_kv_heads
        per_head = values.view(len(x), self.n_kv_heads, -1).repeat_interleave(groups, dim=1)
        parts = [torch.einsum("hqk,khd->qhd", block.values, per_head[block.keys]) for block in self.pattern.blocks]
        z = torch.cat(parts).reshape(len(x), -1)
        out = z @ self.output_weight.T
        if with_bias and self.output_bias is not None:
            out = out + self.output_bias
        return self.attn_out_scale * out

    def leave(self, stream: Tensor, *, with_injection: bool) -> Tensor:
        """The stream before the next layer, from the sum `[T, d]` after the MLP; without injection for a change."""
        out = stream if self.stream_scale == 1.0 else stream * self.stream_scale
        return out + self.injection if with_injection and self.injection is not None else out


@dataclass(frozen=True)
class LayerFeatures:
    """The active features of one layer, sorted by position, then index, with their encoders and decoders."""

    position: Tensor  # `[n]` int64
    index: Tensor  # `[n]` int64
    activation: Tensor  # `[n]`, > 0
    pre_activation: Tensor  # `[n]`, `W_enc[index] . mlp_in[position] + b_enc[index]`
    offsets: list[int]  # T + 1 ints; features of position p are `offsets[p]:offsets[p + 1]`
    w_enc: Tensor  # `[F, d]`
    w_dec: Tensor  # `[F, d]`
    b_enc: Tensor  # `[F]`
    b_dec: Tensor  # `[d]`
    w_skip: Tensor | None  # `[d, d]` applied as `x @ w_skip.T`, or None
    # decoders `[F, d]` to the layers after its own, in order (cross-layer transcoders)
    w_later: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def encoder_bias(self) -> Tensor:
        """`[n]`, the encoder bias of each active feature."""
        return self.b_enc[self.index]

    def read(self, mlp_in: Tensor) -> Tensor:
        """`W_enc` rows of the active features applied to `mlp_in [T, d]` at their positions: `[n]`, without bias."""
        return (self.w_enc[self.index] * mlp_in[self.position]).sum(-1)

    def reaches(self, ahead: int) -> bool:
        """Whether the features write to the layer `ahead` layers above their own."""
        return 0 <= ahead <= len(self.w_later)

    def decoder(self, ahead: int) -> Tensor:
        """Decoder `[F, d]` to the layer `ahead` layers above their own."""
        return self.w_dec if ahead == 0 else self.w_later[ahead - 1]

    def vectors(self, ahead: int) -> Tensor:
        """`[n, d]`, what each active feature writes to the layer `ahead` layers above its own."""
        return self.activation[:, None] * self.decoder(ahead)[self.index]


def written(layers: Sequence[LayerFeatures], activations: Sequence[Tensor], mlp_in: Tensor) -> Tensor:
    """What features write to the last of `layers`, with its skip path of `mlp_in [T, d]`, without decoder biases.

    `activations` has `[n]` per layer; the result is `[T, d]`.
    """
    last = len(layers) - 1
    w_skip = layers[last].w_skip
    out = torch.zeros_like(mlp_in) if w_skip is None else mlp_in @ w_skip.T
    for layer, (features, activation) in enumerate(zip(layers, activations, strict=True)):
        if features.reaches(last - layer):
            out.index_add_(0, features.position, activation[:, None] * features.decoder(last - layer)[features.index])
    return out


@torch.no_grad()
def active_features(transcoder: Transcoder, mlp_in: Tensor) -> LayerFeatures:
    """Encode `mlp_in [T, d]` and keep the features that the transcoder's nonlinearity leaves active."""
    code = transcoder.encode(mlp_in)
    position, slot = torch.nonzero(code.values > 0, as_tuple=True)
    index = code.indices[position, slot]
    activation = code.values[position, slot]
    order = torch.argsort(position * transcoder.W_enc.shape[0] + index)
    position, index, activation = position[order], index[order], activation[order]
    counts = torch.bincount(position, minlength=mlp_in.shape[0])
    w_enc, b_enc = hold(transcoder.W_enc.detach(), index), transcoder.b_enc.detach()
    return LayerFeatures(
        position=position,
        index=index,
        activation=activation.detach(),
        pre_activation=w_enc[index].mul_(mlp_in[position]).sum(-1) + b_enc[index],
        offsets=[0, *np.cumsum(counts.cpu().numpy()).tolist()],
        w_enc=w_enc,
        w_dec=hold(transcoder.W_dec.detach(), index),
        b_enc=b_enc,
        b_dec=transcoder.b_dec.detach(),
        w_skip=None if transcoder.W_skip is None else transcoder.W_skip.detach(),
        w_later=tuple(hold(decoder.detach(), index) for decoder in transcoder.W_later),
    )


@dataclass(frozen=True)
class FeatureTable:
    """The active features of all layers, one row each (`[n]`), sorted by (layer, position, index)."""

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
        """The row of an active feature; raises a `KeyError` where the feature is not active."""
        try:
            return self._rows[(layer, position, index)]
        except KeyError:
            raise KeyError(f"feature L{layer}/{index} is not active at position {position}") from None


def feature_table(layers: Sequence[LayerFeatures], tower: FrozenTower | None = None) -> FeatureTable:
    """Join the layers' active features, those of a tower first; its positions come after those of the prompt."""
    numbers, places, every = np.arange(len(layers)), np.zeros(len(layers), dtype=np.int64), [*layers]
    if tower is not None:
        below = len(tower.features)
        numbers = np.concatenate([TOWER + np.arange(below), numbers])
        places = np.concatenate([np.full(below, tower.first_position), places])
        every = [*tower.features, *layers]
    sizes = [len(layer) for layer in every]
    names = ("position", "index", "activation", "pre_activation")
    columns = [np.concatenate([getattr(layer, name).numpy(force=True) for layer in every]) for name in names]
    columns[0] = columns[0] + np.repeat(places, sizes)
    return FeatureTable(np.repeat(numbers, sizes), *columns)


class PatchEmbedding:
    """A forward hook that replaces the patch embeddings by a leaf `values [N, d_v]`, without the bias."""

    def __init__(self, module: Any, values: Tensor | None = None) -> None:
        self._bias = 0.0 if module.bias is None else module.bias.detach()
        self.values = values  # None: the model's own, of the next forward

    def __call__(self, module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        # Convolutions give [n, d_v, ...], linear maps [.., n, d_v].
        convolves = isinstance(module, nn.Conv2d | nn.Conv3d)
        rows = output.flatten(2).transpose(1, 2) if convolves else output
        values = (rows.detach() - self._bias).flatten(0, -2).requires_grad_() if self.values is None else self.values
        self.values = values
        rows = (values + self._bias).reshape(rows.shape)
        return rows.transpose(1, 2).reshape(output.shape) if convolves else rows


class TowerPass(NamedTuple):
    """One pass through a frozen tower, with its graph for autograd."""

    written: Entering  # what it writes into the decoder
    mlp_in: list[Tensor]  # `[N, d_v]` per layer
    patches: Tensor  # `[N', d_v]`, the embeddings that entered, a leaf
    leaves: list[Tensor]  # `[N, d_v]` zeros per layer, leaves added to the MLP outputs
    outputs: list[Tensor]  # `[N, d_v]` of the MLPs per layer


class FrozenTower:
    """The vision tower at one prompt's pictures, its MLPs replaced by transcoders plus errors, all else frozen.

    It works for every family, since it is the model's own forward with frozen states (`frozen_vision`) and other MLP
    outputs. Legend: N tokens of the tower (class tokens and patches), N' patch embeddings, d_v width.
    """

    def __init__(self, vlm: VLM, inputs: ModelInputs, transcoders: TranscoderSet) -> None:
        """Run the tower once.

        Raises:
            UserError: a set that is not one of this tower, layer by layer.
        """
        self.stack, self.inputs, self.transcoders = VisionStack(vlm.adapter), inputs, transcoders
        self._check()
        self.first_position = len(inputs)  # of its tokens, after those of the prompt
        tower = vlm.adapter.vision_tower()
        self._embedding = tower.get_submodule(tower_kind(tower).patches)
        self.features: list[LayerFeatures] = []  # of each layer, by tower token
        self.errors: list[Tensor] = []  # `[N, d_v]` of each layer
        self._frozen: FrozenVision | None = None
        first = self._pass(None, None)
        self.patches = first.patches.detach()
        for layer, (x, y) in enumerate(zip(first.mlp_in, first.outputs, strict=True)):
            x, y = x.detach(), y.detach()
            active = active_features(transcoders[layer], x)
            self.features.append(active)
            self.errors.append(y - written([active], [active.activation], x) - active.b_dec)
        n_tokens = len(self.errors[0])
        self.boxes: list[PatchBox | None] = [None] * n_tokens  # of each token; None for class tokens and padding
        self.picture = np.full(n_tokens, -1)  # the picture of each token
        # The token of each patch embedding: the same number but for class tokens and windows, which tiles know.
        self.token_of_patch = np.arange(len(self.patches))
        pictures = vlm.adapter.picture_patches(inputs.tensors, inputs.sizes, vlm.processor.image_processor)
        for number, picture in enumerate(pictures):
            for tile in picture.tiles:
                tokens = tile.tokens[tile.n_class :]
                self.token_of_patch[tile.patches] = tokens
                self.picture[tile.tokens] = number
                for token, box in zip(tokens.tolist(), tile.boxes, strict=True):
                    self.boxes[token] = box
        assert self.token_of_patch.max() < n_tokens, "a patch embedding belongs to no token of the tower"

    def __len__(self) -> int:
        """N."""
        return len(self.boxes)

    def _check(self) -> None:
        layers, n_layers = self.transcoders.layers, self.stack.n_layers
        if self.transcoders.site != "tower" or layers != list(range(n_layers)):
            raise UserError(
                f"attribution.tower: the set is of the {self.transcoders.site}'s layers {layers}, not of layers 0 to "
                f"{n_layers - 1} of the vision tower; train one with transcoder.site=tower"
            )
        widths = {transcoder.config.d_model for transcoder in self.transcoders.transcoders.values()}
        if widths != {self.stack.d_model} or self.transcoders.cross_layer:
            raise UserError(
                f"attribution.tower takes transcoders of single layers and width {self.stack.d_model}; load the set "
                "that was trained on this tower"
            )

    def run(self, changes: Sequence[Tensor] | None = None, *, respond: bool = False) -> TowerPass:
        """The affine tower with `changes [n]` of activations per layer, to which active features `respond` or not."""
        changes = [torch.zeros_like(features.activation) for features in self.features] if changes is None else changes

        def write(layer: int, x: Tensor) -> Tensor:
            features = self.features[layer]
            activation = features.activation + changes[layer].to(features.activation)
            if respond:
                activation = activation + features.read(x) + features.encoder_bias - features.pre_activation
            return written([features], [activation], x) + features.b_dec + self.errors[layer]

        return self._pass(self.patches.clone().requires_grad_(), write)

    def constants(self) -> TowerPass:
        """The affine tower without patches, features and errors: its biases are left."""

        def write(layer: int, x: Tensor) -> Tensor:
            features = self.features[layer]
            return written([features], [torch.zeros_like(features.activation)], x) + features.b_dec

        return self._pass(torch.zeros_like(self.patches, requires_grad=True), write)

    def _pass(self, patches: Tensor | None, write: Callable[[int, Tensor], Tensor] | None) -> TowerPass:
        """A pass with these MLP outputs; with None of both the model's own, whose states are frozen for the others."""
        adapter, embedding = self.stack.adapter, PatchEmbedding(self._embedding, patches)
        mlp_in, leaves, outputs = [], [], []

        def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
            def replace(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                x = args[0].flatten(0, -2)
                mlp_in.append(x)
                y = output.flatten(0, -2) if write is None else write(layer, x)
                leaves.append(torch.zeros_like(y, requires_grad=True))
                outputs.append(y)
                return (y + leaves[-1]).reshape(output.shape)

            return replace

        with ExitStack() as opened:
            mlps = {self.stack.mlp(layer): hook(layer) for layer in range(self.stack.n_layers)}
            opened.enter_context(hooked({self._embedding: embedding, **mlps}))
            opened.enter_context(torch.enable_grad())
            self._frozen = opened.enter_context(frozen_vision(adapter, self._frozen))
            entered = entering(adapter, [self.inputs])
        assert embedding.values is not None, "the tower did not embed its patches where it should"
        return TowerPass(entered, mlp_in, embedding.values, leaves, outputs)


@dataclass(frozen=True)
class Replay:
    """A run of the replacement model, or its change: pre-activation and activation `[n]`, logits `[T, V]` or `[1, V]`.

    Features are in the order of `feature_activations`; logits are those before the cap, if the model has one.
    """

    pre_activation: Tensor
    activation: Tensor
    logits: Tensor


@dataclass(frozen=True)
class ReplacementModel:
    """The model at one input, its MLPs replaced by transcoders plus errors, everything else frozen."""

    inputs: ModelInputs  # the prompt
    state: ForwardState  # the recorded forward
    layers: list[FrozenLayer]  # the frozen attention and scales of each layer
    features: list[LayerFeatures]  # the active features of each layer
    # `[L, T, d]`, transcoder target minus reconstruction (with decoder bias, skip path and writes of lower layers)
    errors: Tensor
    unembedding: Tensor  # `[V, d]`
    feature_activations: FeatureTable  # all active features in one table
    # cap c of a model whose logits are `c tanh(u / c)` of the unembedding's output u, or None. Graphs explain u, which
    # is affine; the cap keeps the order of the logits
    logit_softcap: float | None = None
    tower: FrozenTower | None = None  # below the soft tokens, where its MLPs have transcoders

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    def features_of(self, layer: int) -> LayerFeatures:
        """The active features of a layer, of the vision tower from `TOWER` on."""
        if layer >= 0:
            return self.features[layer]
        assert self.tower is not None, "the tower has no transcoders"
        return self.tower.features[layer - TOWER]

    @property
    def n_positions(self) -> int:
        """T."""
        return self.state.embeddings.shape[0]

    @torch.no_grad()
    def replay(self, delta: FeatureChange | None = None, last: bool = False) -> Replay:
        """Run the affine model from the embeddings, piece by piece, without the Hugging Face forward; some activations
        changed by `delta`, all others kept. With `last`, logits are the last position's.
        """
        below, changes = self._changes(delta or {})
        entered, pre = self.state, []
        if self.tower is not None:
            run = self.tower.run(below)
            entered, pre = _entered(run, self.state), self._tower_pre(run)
            below = [one.activation.to(more) + more for one, more in zip(self.tower.features, below, strict=True)]
        activation = [features.activation + change for features, change in zip(self.features, changes, strict=True)]
        x = entered.embeddings
        for layer, (frozen, features) in enumerate(zip(self.layers, self.features, strict=True)):
            h = x + frozen.attend(x, with_bias=True)
            mlp_in = frozen.mlp_in_scale * h
            pre.append(features.read(mlp_in) + features.encoder_bias)
            out = written(self.features[: layer + 1], activation[: layer + 1], mlp_in)
            stream = h + frozen.write_scale * (out + features.b_dec + self.errors[layer])
            x = frozen.leave(stream, with_injection=self.tower is None)
            if self.tower is not None and layer < len(entered.injections):  # those that its features write
                x = x + entered.injections[layer]
        return Replay(torch.cat(pre), torch.cat([*below, *activation]), self._unembed(x[-1:] if last else x))

    def direct(self, delta: FeatureChange) -> Replay:
        """The change of all pre-activations and the last logits when some activations change and no other responds."""
        return self._tangent(delta, respond=False)

    def total(self, delta: FeatureChange) -> Replay:
        """As `direct`, with active features responding linearly: they follow their pre-activations."""
        return self._tangent(delta, respond=True)

    @torch.no_grad()
    def _tangent(self, delta: FeatureChange, *, respond: bool) -> Replay:
        stream = torch.zeros_like(self.state.embeddings)
        injected = torch.zeros_like(self.state.injections)
        below, changes = self._changes(delta)
        below_pre: list[Tensor] = []
        if self.tower is not None:
            moved, still = self.tower.run(below, respond=respond), self.tower.run()
            after, before = _entered(moved, self.state), _entered(still, self.state)
            stream, injected = after.embeddings - before.embeddings, after.injections - before.injections
            pairs = zip(self._tower_pre(moved), self._tower_pre(still), strict=True)
            below_pre = [one - other for one, other in pairs]
            below = [change + pre for change, pre in zip(below, below_pre, strict=True)] if respond else below
        x, pre, activation = self.propagate(stream, injected, changes, respond=respond, n_layers=self.n_layers)
        return Replay(torch.cat([*below_pre, *pre]), torch.cat([*below, *activation]), self._unembed(x[-1:]))

    def _tower_pre(self, run: TowerPass) -> list[Tensor]:
        """Pre-activations `[n]` of the tower's active features per layer in a pass."""
        assert self.tower is not None
        layers = zip(self.tower.features, run.mlp_in, strict=True)
        return [(features.read(x) + features.encoder_bias).to(self.errors.dtype) for features, x in layers]

    def propagate(
        self, stream: Tensor, injected: Tensor, changes: Sequence[Tensor], *, respond: bool, n_layers: int
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Carry a change of the stream, `[T, d]`, from the first layer through `n_layers` layers.

        `injected [m, T, d]` changes what pictures add after the first m layers, `changes` the activations, `[n]` per
        layer; if they `respond`, active features also follow their pre-activations. Returns the change of the stream
        after the last layer, and the changes of pre-activations and activations per layer.
        """
        x, pre, activation = stream, [], []
        for layer in range(n_layers):
            frozen, features = self.layers[layer], self.features[layer]
            h = x + frozen.attend(x, with_bias=False)
            mlp_in = frozen.mlp_in_scale * h
            pre.append(features.read(mlp_in))
            activation.append(changes[layer] + pre[-1] if respond else changes[layer])
            out = written(self.features[: layer + 1], activation, mlp_in)
            x = frozen.leave(h + frozen.write_scale * out, with_injection=False)
            x = x + injected[layer] if layer < len(injected) else x
        return x, pre, activation

    def capped(self, logits: Tensor) -> Tensor:
        """The model's logits from its unembedding's output, any shape."""
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _unembed(self, x: Tensor) -> Tensor:
        return (self.state.final_norm_scale * x) @ self.unembedding.T

    def _changes(self, delta: FeatureChange) -> tuple[list[Tensor], list[Tensor]]:
        """The changes of activations per layer, `[n]` each, of the tower and of the decoder."""
        flat = torch.zeros(len(self.feature_activations), dtype=self.errors.dtype, device=self.errors.device)
        for key, change in delta.items():
            flat[self.feature_activations.row(*key)] += change
        below = [] if self.tower is None else self.tower.features
        parts = flat.split([len(features) for features in (*below, *self.features)])
        return list(parts[: len(below)]), list(parts[len(below) :])


def _entered(run: TowerPass, like: ForwardState) -> ForwardState:
    """`like` with what a pass of the tower writes."""
    embeddings, injections = run.written.embeddings[0].detach(), run.written.injections
    moved = like.injections if injections is None else injections[0].detach().to(like.injections)
    return replace(like, embeddings=embeddings.to(like.embeddings), injections=moved)


@torch.no_grad()
def build_replacement(scope: Scope, inputs: ModelInputs, dtype: torch.dtype | None = None) -> ReplacementModel:
    """Run the model once and freeze it at that input, in float32 or float64; by default in the model's own dtype.

    A wider dtype than the model's makes the sums more exact, not the recorded forward.

    Raises:
        UserError: a narrower dtype, or a model or transcoder set that the affine model cannot represent.
    """
    _check(scope)
    adapter = scope.adapter
    dtype = dtype or adapter.dtype
    if dtype not in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        raise UserError(f"edges cannot be summed in {name}, which has too few digits; set attribution.dtype=float32")
    state = capture_state(adapter, inputs).to(dtype)
    adapter.finite(state.logits)
    layers, features, errors = [], [], []
    for layer in range(adapter.n_layers):
        transcoder = scope.transcoders[layer]
        if transcoder.W_enc.dtype != dtype:
            transcoder = copy.deepcopy(transcoder).to(dtype)
        hook = transcoder.config.output_hook
        active = active_features(transcoder, state.mlp_in[layer])
        target = state.mlp_out[layer] if hook == "mlp_out" else state.norm_scales[layer, 3] * state.mlp_out[layer]
        features.append(active)
        activations = [layer_features.activation for layer_features in features]
        errors.append(target - (written(features, activations, state.mlp_in[layer]) + active.b_dec))
        layers.append(_freeze_layer(adapter, state, layer, hook))
    tower = FrozenTower(scope.vlm, inputs, scope.tower) if scope.tower is not None and inputs.sizes else None
    return ReplacementModel(
        inputs=inputs,
        tower=tower,
        state=state,
        layers=layers,
        features=features,
        errors=torch.stack(errors),
        unembedding=materialised(adapter.lm_head()).detach().to(dtype),
        feature_activations=feature_table(features, tower),
        logit_softcap=adapter.logit_softcap,
    )


def _freeze_layer(adapter: Adapter, state: ForwardState, layer: int, output_hook: str) -> FrozenLayer:
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
        # The number of query heads is the same in all layers; that of key/value heads and widths may differ.
        n_kv_heads=value_weight.shape[0] * state.patterns[layer].n_heads // output_weight.shape[1],
        value_scale=state.value_scales[layer],
        stream_scale=adapter.stream_scale(layer),
        injection=state.injections[layer] if layer < len(state.injections) else None,
    )


def _check(scope: Scope) -> None:
    """Raise a `UserError` that names what the affine model cannot represent."""
    if scope.adapter.lm_head().bias is not None:
        raise UserError("the model's unembedding has a bias, which attribution does not cover; choose another model")
    for layer, transcoder in scope.transcoders.transcoders.items():
        config = transcoder.config
        if config.input_hook != "mlp_in" or config.output_hook not in ("mlp_out", "mlp_out_post"):
            raise UserError(
                f"the transcoder of layer {layer} maps {config.input_hook} to {config.output_hook}; "
                "attribution covers mlp_in to mlp_out or mlp_out_post"
            )
        if config.d_model != scope.adapter.d_model:
            raise UserError(
                f"the transcoder of layer {layer} has width {config.d_model}, the model {scope.adapter.d_model}; "
                "load the set that was trained on this model"
            )
    missing = [layer for layer in range(scope.adapter.n_layers) if layer not in scope.transcoders]
    if missing:
        raise UserError(
            f"the transcoder set has no transcoder for layers {missing} of the model's {scope.adapter.n_layers}; "
            "load a set that covers the model"
        )
