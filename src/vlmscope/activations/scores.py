"""How one head's query at one position and its key at another read the stream, with norms frozen and RoPE applied.

Legend: T positions, d model width, H heads, Hkv key/value heads, D head width.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmscope.activations.capture import HasAdapter, adapter_of
from vlmscope.models.attention import AttentionInput, FoundScores, stopping_at_scores, using_vlmscope_attention
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.placement import materialised


@dataclass(frozen=True)
class HeadSide:
    """A query, or a key, of one head at one position: `value = weight @ attn_in + constant`.

    Attributes:
        value: `[D]`, the model's own, norm and RoPE applied.
        weight: `[D, d]`: projection, frozen norm scale and rotation in one.
        constant: `[D]`, of the projection's bias; 0 in most families.
    """

    value: Tensor
    weight: Tensor
    constant: Tensor


@dataclass(frozen=True)
class HeadScore:
    """A head's score `scale * query . key` before the softmax, before the cap of a family that caps scores.

    Attributes:
        query: of the position that looks.
        key: of the position that is looked at.
        scale: the model's factor.
        softcap: the cap of the scores, or None.
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

    The rotation is not computed anew: the attention module is run once more on its own input with the outputs of its
    query and key projections made leaves and its norms replaced by their frozen scales; what it then hands to the
    softmax is linear in the leaves, and its derivative is the map, whatever kind of RoPE a family has.

    Args:
        model: an adapter or a loaded model, in evaluation mode.
        inputs: the prompt.
        layer: decoder layer.
        head: query head.
        query: the position that looks.
        key: the position that is looked at.
        dtype: of the result; the model runs in its own.
    """
    adapter = adapter_of(model)
    module = adapter.attention(layer)
    given = _attention_input(adapter, module, inputs)
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
        found = _scores_of(module, given)
        group = found.query.shape[1] // found.key.shape[1]
        sides = (
            _side(found.query[0, head, query], parts.query, leaves[parts.query], query, head),
            _side(found.key[0, head // group, key], parts.key, leaves[parts.key], key, head // group),
        )
    return HeadScore(*sides, scale=found.scaling, softcap=found.softcap)


def _attention_input(adapter: Adapter, module: nn.Module, inputs: ModelInputs) -> AttentionInput:
    """What an attention module is called with; the forward ends there."""
    kept: list[AttentionInput] = []

    class _Found(Exception):
        """Ends the forward."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(AttentionInput(args, dict(kwargs)))
        raise _Found

    with torch.no_grad(), using_vlmscope_attention(adapter):
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            adapter.forward(inputs.tensors, use_cache=False)
        except _Found:
            pass
        finally:
            handle.remove()
    return kept[0]


def _scores_of(module: Any, given: AttentionInput) -> FoundScores:
    with stopping_at_scores(module):
        try:
            module(*given.args, **given.kwargs)
        except FoundScores as found:
            return found
    raise AssertionError("the attention module did not call its attention function")


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
