"""Running a circuit of nodes in the real model.

The originals' run, in which everything outside the circuit has the value of the counterfactual's run:

    embeddings   clean at the roles that are kept, else corrupt
    MLP of l     sum over kept f of a_f W_dec[f] + sum over the others of a'_f W_dec[f] + b_dec (+ W_skip x) + error,
                 a_f as the features are in *this* run, a'_f and the error outside as measured in the counterfactual's;
                 a kept error is the clean one

Attention and norms are the model's own (`free`), or the patterns are those of the originals (`frozen_attention`). So a
kept feature has its clean activation only as far as what it reads is kept, too: a circuit without its first half keeps
nothing. The empty circuit is the counterfactual's run, and the one of everything the original's (Marks et al., arXiv
2403.19647, and MIB, arXiv 2504.13151, run circuits in this way).

Legend: B pairs, T positions, d model width, k slots of a code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlmscope.activations.capture import target_module
from vlmscope.circuits.discovery.nodes import Kept
from vlmscope.circuits.discovery.sides import Sides
from vlmscope.interventions.run import watch_inputs
from vlmscope.models.attention import replacing_patterns
from vlmscope.models.base import INJECTIONS
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet


@torch.no_grad()
def run_circuit(scope: Scope, sides: Sides, kept: Kept, mode: str = "free") -> np.ndarray:
    """m [B] float64: the logit differences of the pairs when only `kept` is clean."""
    with circuit(scope, sides, kept, mode) as tensors:
        logits = scope.adapter.next_logits(tensors)
    return sides.subject.gaps(logits).double().cpu().numpy()


@contextmanager
def circuit(scope: Scope, sides: Sides, kept: Kept, mode: str = "free") -> Iterator[dict[str, Tensor]]:
    """Hooks that keep a circuit alone; gives the forward's arguments.

    Args:
        scope: the model and its transcoders.
        sides: the pairs.
        kept: the circuit.
        mode: 'free' or 'frozen_attention'.
    """
    with ExitStack() as stack:
        if mode == "frozen_attention":
            stack.enter_context(replacing_patterns(scope.adapter, sides.subject.pairs.base.patterns))
        inputs = watch_inputs(stack, scope.adapter, scope.transcoders.layers)
        ahead_of: dict[int, list[Tensor]] = {}
        for layer in scope.transcoders.layers:

            def hook(_m: Any, _a: Any, out: Tensor, layer: int = layer) -> Tensor:
                return _written(scope.transcoders, sides, kept, layer, inputs.pop(layer), ahead_of).to(out)

            target = target_module(scope.adapter, layer, scope.transcoders.config.output_hook)
            stack.callback(target.register_forward_hook(hook).remove)
        yield _entering(sides, kept)


def _entering(sides: Sides, kept: Kept) -> dict[str, Tensor]:
    """Arguments of the forward with embeddings mixed by position."""
    clean, corrupt = sides.clean, sides.corrupt
    mask = kept.embeddings[:, None]
    tensors = dict(sides.subject.pairs.batch.tensors)
    tensors["inputs_embeds"] = _mix(mask, clean.entering, corrupt.entering)
    if clean.injections is not None and corrupt.injections is not None:
        tensors[INJECTIONS] = _mix(mask, clean.injections, corrupt.injections)
    return tensors


def _written(
    transcoders: TranscoderSet, sides: Sides, kept: Kept, layer: int, x: Tensor, ahead_of: dict[int, list[Tensor]]
) -> Tensor:
    """What a layer writes, [B, T, d]; what its features write to later layers waits in `ahead_of`."""
    transcoder = transcoders[layer]
    mixed = _mixed(transcoder.encode(x), sides.corrupt.codes[layer], kept, layer)
    out = transcoder.b_dec + transcoder.write(mixed)
    if transcoder.W_skip is not None:
        out = out + functional.linear(x.to(transcoder.W_skip.dtype), transcoder.W_skip)
    for ahead in range(1, transcoder.config.writes):
        ahead_of.setdefault(layer + ahead, []).append(transcoder.write(mixed, ahead))
    for earlier in ahead_of.pop(layer, []):
        out = out + earlier.to(out.device)
    clean, corrupt = (side.errors[layer] for side in (sides.clean, sides.corrupt))
    return out + _mix(kept.errors[layer][:, None], clean, corrupt)


def _mixed(live: SparseCode, corrupt: SparseCode, kept: Kept, layer: int) -> SparseCode:
    """Live activations of kept features beside the counterfactual's of all others."""
    mask, role = kept.features[layer], kept.role_of[:, None]
    one = _mix(mask[role, live.indices], live.values, torch.zeros_like(live.values))
    other = _mix(mask[role, corrupt.indices], torch.zeros_like(corrupt.values), corrupt.values)
    return SparseCode(torch.cat([live.indices, corrupt.indices], -1), torch.cat([one, other], -1))


def _mix(weight: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`one` where `weight` is true, `other` elsewhere; between them for a weight that is a number."""
    return torch.where(weight, one, other) if weight.dtype == torch.bool else other + weight * (one - other)


def mask_effects(scope: Scope, sides: Sides, kept: Kept, steps: int, mode: str = "free") -> Kept:
    """What each member of a circuit is worth to it, in logits, mean over pairs; in the shape of the masks.

    With every mask multiplied by alpha, m goes from the empty circuit to this one. A member's worth is the derivative
    of m by its mask, integrated over alpha by the midpoint rule, so that all members together are worth
    m(circuit) - m(empty), up to that rule (integrated gradients, Sundararajan et al., arXiv 1703.01365, of the masks).
    On the way features of the counterfactual are still on, which a gradient at the circuit itself would not see.

    Args:
        scope: the model and its transcoders.
        sides: the pairs.
        kept: the circuit, boolean masks.
        steps: values of alpha.
        mode: 'free' or 'frozen_attention'.
    """
    dtype = sides.clean.entering.dtype
    names = [("embeddings", -1), *(("errors", i) for i in kept.errors), *(("features", i) for i in kept.features)]
    whole = [kept.embeddings, *kept.errors.values(), *kept.features.values()]
    worth = [torch.zeros(mask.shape, dtype=dtype, device=mask.device) for mask in whole]
    for step in range(steps):
        with torch.enable_grad():
            share = (step + 0.5) / steps
            scaled = [(share * mask.to(dtype)).requires_grad_() for mask in whole]
            found = dict(zip(names, scaled, strict=True))
            partial = Kept(
                found["embeddings", -1],
                {layer: found["errors", layer] for layer in kept.errors},
                {layer: found["features", layer] for layer in kept.features},
                kept.role_of,
            )
            with circuit(scope, sides, partial, mode) as tensors:
                logits = scope.adapter.next_logits(tensors)
            slopes = torch.autograd.grad(sides.subject.gaps(logits).mean(), scaled)
        for total, slope, mask in zip(worth, slopes, whole, strict=True):
            total += torch.where(mask, slope, 0.0) / steps
    found = dict(zip(names, worth, strict=True))
    return Kept(
        found["embeddings", -1],
        {layer: found["errors", layer] for layer in kept.errors},
        {layer: found["features", layer] for layer in kept.features},
        kept.role_of,
    )
