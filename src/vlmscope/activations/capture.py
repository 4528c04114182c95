"""Reading a model's activations with forward hooks, without gradients.

`capture_mlp` is the fast way for training (batches, the model's own attention kernels); `capture_state` keeps
everything that the local replacement model of one prompt needs, from one forward.
Legend: B batch, T positions, d model width, L layers, H heads, Hkv key/value heads, D head width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlmscope.models.attention import recording_patterns
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.batching import watching_injections
from vlmscope.models.norms import all_norms


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

    Attributes:
        embeddings: `[T, d]`, what enters the first layer (embedding scale and projected soft tokens included).
        patterns: `[L, H, T, T]`, attention probabilities, last two axes query and key.
        mlp_in: `[L, T, d]`, input of the raw MLP.
        mlp_out: `[L, T, d]`, output of the raw MLP.
        norm_scales: `[L, 4, T, d]`, factors of `attn_in`, `attn_out_post`, `mlp_in`, `mlp_out_post`; 1 for no norm.
        final_norm_scale: `[T, d]`.
        logits: `[T, V]`, what the unembedding gives: before the cap of a model that caps its logits.
        value_scales: for each layer `[T, Hkv * D]`, factors of the norm of values, or None.
        injections: `[n, T, d]`, what pictures add to the stream after the first n layers; n is 0 in most families.
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

    def to(self, dtype: torch.dtype) -> "ForwardState":
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
    """The MLP inputs and outputs of every layer for one batch.

    Args:
        model: an adapter or a loaded model.
        batch: keyword arguments of the Hugging Face forward; padded positions are returned too.

    Returns:
        layer -> (`mlp_in [B, T, d]`, `mlp_out [B, T, d]`), detached, in the model's dtype.
    """
    adapter = adapter_of(model)
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> Hook:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found[layer] = (args[0].detach(), output.detach())

        return hook

    with _hooks({adapter.mlp(layer): keep(layer) for layer in range(adapter.n_layers)}):
        # Only the decoder's insides are wanted: one position of logits instead of [B, T, V].
        adapter.forward(batch, use_cache=False, logits_to_keep=1)
    return found


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
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            mlp[layer] = (args[0].detach()[0], output.detach()[0])

        return hook

    layers = range(adapter.n_layers)
    hooks: dict[nn.Module, Hook] = {adapter.mlp(layer): keep_mlp(layer) for layer in layers}
    for norm in all_norms(adapter):
        hooks[norm] = keep_input
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
