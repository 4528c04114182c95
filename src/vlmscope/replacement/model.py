"""The local replacement model of one input, and its forward replay.

Frozen: attention patterns, norm scales, the supports of the sparse codes, the errors. What is left is affine in the
embeddings, the feature activations, the errors and the biases. `replay`, `direct` and `total` run it forwards; the
attribution engine runs its adjoint backwards, in code of its own, so that tests compare two implementations.
Legend: L layers, T positions, d model width, n active features of all layers, V vocabulary.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.activations.capture import ForwardState, capture_state
from vlmscope.core.errors import UserError
from vlmscope.models.base import ModelInputs
from vlmscope.models.placement import materialised
from vlmscope.replacement.features import FeatureTable, LayerFeatures, active_features, feature_table, written
from vlmscope.replacement.frozen import FrozenLayer, freeze_layer
from vlmscope.scope import Scope

# (layer, position, feature index) -> change of activation
FeatureChange = Mapping[tuple[int, int, int], float]


@dataclass(frozen=True)
class Replay:
    """A run of the replacement model, or the change of one.

    Attributes:
        pre_activation: `[n]`, of the active features, in the order of `feature_activations`.
        activation: `[n]`.
        logits: `[T, V]`, before the cap of a model that caps its logits.
    """

    pre_activation: Tensor
    activation: Tensor
    logits: Tensor


@dataclass(frozen=True)
class ReplacementModel:
    """The model at one input with its MLPs replaced by transcoders plus errors and everything else frozen.

    Attributes:
        inputs: the prompt that it was made at.
        state: the recorded forward.
        layers: the frozen attention and scales of each layer.
        features: the active features of each layer.
        errors: `[L, T, d]`, transcoder target minus reconstruction (decoder bias, skip path and what features of lower
            layers write here belong to the latter).
        unembedding: `[V, d]`.
        feature_activations: all active features in one table.
        logit_softcap: the cap c of a model that gives `c tanh(u / c)` for its unembedding's output u, or None. What is
            affine, and what graphs explain, is u; the cap keeps the order of the logits.
    """

    inputs: ModelInputs
    state: ForwardState
    layers: list[FrozenLayer]
    features: list[LayerFeatures]
    errors: Tensor
    unembedding: Tensor
    feature_activations: FeatureTable
    logit_softcap: float | None = None

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def n_positions(self) -> int:
        """T."""
        return self.state.embeddings.shape[0]

    @torch.no_grad()
    def replay(self, delta: FeatureChange | None = None) -> Replay:
        """Run the affine model from the embeddings, piece by piece, without the Hugging Face forward.

        Args:
            delta: changes of activations; the other features keep theirs.
        """
        changes = self._changes(delta or {})
        activation = [features.activation + change for features, change in zip(self.features, changes, strict=True)]
        x, pre = self.state.embeddings, []
        for layer, (frozen, features) in enumerate(zip(self.layers, self.features, strict=True)):
            h = x + frozen.attend(x, with_bias=True)
            mlp_in = frozen.mlp_in_scale * h
            pre.append(features.read(mlp_in) + features.encoder_bias)
            out = written(self.features[: layer + 1], activation[: layer + 1], mlp_in)
            stream = h + frozen.write_scale * (out + features.b_dec + self.errors[layer])
            x = frozen.leave(stream, with_injection=True)
        return Replay(torch.cat(pre), torch.cat(activation), self._unembed(x))

    def direct(self, delta: FeatureChange) -> Replay:
        """The change of every pre-activation and logit when the given activations change and no other feature does."""
        return self._tangent(delta, respond=False)

    def total(self, delta: FeatureChange) -> Replay:
        """The same when active features respond linearly: a change of pre-activation is one of activation."""
        return self._tangent(delta, respond=True)

    @torch.no_grad()
    def _tangent(self, delta: FeatureChange, *, respond: bool) -> Replay:
        changes = self._changes(delta)
        x, pre, activation = torch.zeros_like(self.state.embeddings), [], []
        for layer, (frozen, features) in enumerate(zip(self.layers, self.features, strict=True)):
            h = x + frozen.attend(x, with_bias=False)
            mlp_in = frozen.mlp_in_scale * h
            pre.append(features.read(mlp_in))
            activation.append(changes[layer] + pre[-1] if respond else changes[layer])
            out = written(self.features[: layer + 1], activation, mlp_in)
            x = frozen.leave(h + frozen.write_scale * out, with_injection=False)
        return Replay(torch.cat(pre), torch.cat(activation), self._unembed(x))

    def capped(self, logits: Tensor) -> Tensor:
        """The model's logits for its unembedding's output, any shape."""
        cap = self.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _unembed(self, x: Tensor) -> Tensor:
        return (self.state.final_norm_scale * x) @ self.unembedding.T

    def _changes(self, delta: FeatureChange) -> list[Tensor]:
        """Per layer the changes as `[n of the layer]`."""
        flat = torch.zeros(len(self.feature_activations), dtype=self.errors.dtype, device=self.errors.device)
        for key, change in delta.items():
            flat[self.feature_activations.row(*key)] += change
        return list(flat.split([len(features) for features in self.features]))


def _check(scope: Scope) -> None:
    """Refuse, by name, what the affine model could not represent."""
    if scope.adapter.lm_head().bias is not None:
        raise UserError("the model's unembedding has a bias, which attribution does not cover; choose another model")
    missing = [layer for layer in range(scope.adapter.n_layers) if layer not in scope.transcoders]
    if missing:
        raise UserError(
            f"the transcoder set has no transcoder for layers {missing} of the model's {scope.adapter.n_layers}; "
            "load a set that covers the model"
        )
    for layer in range(scope.adapter.n_layers):
        config = scope.transcoders[layer].config
        if config.d_model != scope.adapter.d_model:
            raise UserError(
                f"the transcoder of layer {layer} has width {config.d_model}, the model {scope.adapter.d_model}; "
                "load the set that was trained on this model"
            )
        if config.input_hook != "mlp_in" or config.output_hook not in ("mlp_out", "mlp_out_post"):
            raise UserError(
                f"the transcoder of layer {layer} maps {config.input_hook} to {config.output_hook}; "
                "attribution covers mlp_in to mlp_out or mlp_out_post"
            )


@torch.no_grad()
def build_replacement(scope: Scope, inputs: ModelInputs, dtype: torch.dtype | None = None) -> ReplacementModel:
    """Run the model once and freeze it at that input.

    Args:
        scope: the model and its transcoders, one for every layer.
        inputs: the prompt.
        dtype: float32 or float64, of the replacement model; the model's own when None. A wider one than the model's
            does not make the recorded forward any better.

    Raises:
        UserError: when the model or the set cannot be represented; the message names what.
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
        if transcoder.W_enc.dtype != state.embeddings.dtype:
            transcoder = copy.deepcopy(transcoder).to(state.embeddings.dtype)
        hook = transcoder.config.output_hook
        found = active_features(transcoder, state.mlp_in[layer])
        target = state.mlp_out[layer] if hook == "mlp_out" else state.norm_scales[layer, 3] * state.mlp_out[layer]
        features.append(found)
        reconstruction = written(features, [each.activation for each in features], state.mlp_in[layer]) + found.b_dec
        errors.append(target - reconstruction)
        layers.append(freeze_layer(adapter, state, layer, hook))
    return ReplacementModel(
        inputs=inputs,
        state=state,
        layers=layers,
        features=features,
        errors=torch.stack(errors),
        unembedding=materialised(adapter.lm_head()).detach().to(state.embeddings.dtype),
        feature_activations=feature_table(features),
        logit_softcap=adapter.logit_softcap,
    )
