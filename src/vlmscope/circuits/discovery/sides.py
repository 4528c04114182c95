"""The two sides of pairs as measured: what enters the model, features, errors and logit differences.

Legend: B pairs, T positions, k slots of a code, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.capture import target_module
from vlmscope.circuits.discovery.nodes import Kind, Nodes, make_nodes, role_numbers
from vlmscope.circuits.pairs import PairSubject
from vlmscope.core.errors import UserError
from vlmscope.interventions.run import watch_inputs
from vlmscope.models.base import INJECTIONS, ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet


@dataclass(frozen=True)
class CircuitSubject:
    """Pairs of one question, with what tracing needs.

    Attributes:
        pairs: the batches, their answers and their unedited runs.
        originals: the prompts of `pairs.batch`, row by row.
        others: those of `pairs.other`.
    """

    pairs: PairSubject
    originals: Sequence[ModelInputs]
    others: Sequence[ModelInputs]

    def __post_init__(self) -> None:
        pairs = self.pairs
        if not pairs.moves:
            raise UserError(
                f"question {pairs.question!r}: the contrast is empty, as both sides of a pair have the same answer; "
                "choose pairs whose answers differ"
            )
        if not len(self.originals) == len(self.others) == pairs.size:
            raise UserError(
                f"question {pairs.question!r}: {len(self.originals)} originals, {len(self.others)} counterfactuals "
                f"and {pairs.size} pairs do not match; give one of each for every pair"
            )

    def gaps(self, logits: Tensor) -> Tensor:
        """m [B]: logit of the original's answer minus that of the counterfactual's, from logits [B, V]."""
        rows = torch.arange(self.pairs.size, device=logits.device)
        return logits[rows, self.pairs.tokens] - logits[rows, self.pairs.other_tokens]


@dataclass(frozen=True)
class Side:
    """One side of all pairs.

    Attributes:
        entering: [B, T, d], what enters the first layer.
        injections: [B, n, T, d] or None, what pictures add after later layers.
        codes: layer -> features [B, T, k].
        errors: layer -> [B, T, d].
        gaps: [B] float64, m of the unedited run.
    """

    entering: Tensor
    injections: Tensor | None
    codes: dict[int, SparseCode]
    errors: dict[int, Tensor]
    gaps: np.ndarray


@dataclass(frozen=True)
class Sides:
    """Clean (originals) and corrupt (counterfactuals)."""

    subject: CircuitSubject
    clean: Side
    corrupt: Side


@torch.no_grad()
def measure(scope: Scope, subject: CircuitSubject) -> Sides:
    """Run both sides once and keep what circuits are made of."""
    pairs = subject.pairs
    return Sides(subject, *(_side(scope, subject, batch) for batch in (pairs.batch, pairs.other)))


def _side(scope: Scope, subject: CircuitSubject, batch: InputBatch) -> Side:
    targets: dict[int, Tensor] = {}
    with ExitStack() as stack:
        inputs = watch_inputs(stack, scope.adapter, scope.transcoders.layers)
        for layer in scope.transcoders.layers:

            def hook(_m: Any, _a: Any, out: Tensor, layer: int = layer) -> None:
                targets[layer] = out

            module = target_module(scope.adapter, layer, scope.transcoders.config.output_hook)
            stack.callback(module.register_forward_hook(hook).remove)
        logits = scope.forward(batch)
    codes = scope.transcoders.encode(inputs)
    errors = {
        layer: out - scope.transcoders.decode(layer, codes, inputs[layer]).to(out) for layer, out in targets.items()
    }
    gaps = subject.gaps(logits).double().cpu().numpy()
    return Side(batch.tensors["inputs_embeds"], batch.tensors.get(INJECTIONS), codes, errors, gaps)


def changing_nodes(sides: Sides, transcoders: TranscoderSet) -> Nodes:
    """All nodes whose value differs between the sides of some pair, by kind, layer, role and index."""
    at = sides.subject.pairs.batch.roles
    roles = tuple(dict.fromkeys(at.tolist()))
    numbers = role_numbers(roles, at)
    keys: list[tuple[int, int, int, int]] = []

    def differing(one: Tensor, other: Tensor) -> list[int]:
        """Roles where two tensors [B, T, d] differ."""
        moved = (one != other).any(-1).any(0).cpu().numpy()
        return np.unique(numbers[moved]).tolist()

    clean, corrupt = sides.clean, sides.corrupt
    entering = differing(clean.entering, corrupt.entering)
    if clean.injections is not None and corrupt.injections is not None:
        swapped = [found.transpose(1, 2).flatten(2) for found in (clean.injections, corrupt.injections)]
        entering = sorted({*entering, *differing(*swapped)})
    keys += [(Kind.EMBEDDING, -1, role, -1) for role in entering]
    for layer in transcoders.layers:
        change = changes(sides, transcoders, layer)
        for role in range(len(roles)):
            here = change[:, torch.from_numpy(numbers == role).to(change.device)]
            found = torch.nonzero((here != 0).flatten(0, 1).any(0)).flatten().tolist()
            keys += [(Kind.FEATURE, layer, role, index) for index in found]
        keys += [(Kind.ERROR, layer, role, -1) for role in differing(clean.errors[layer], corrupt.errors[layer])]
    return make_nodes(roles, keys)


def changes(sides: Sides, transcoders: TranscoderSet, layer: int) -> Tensor:
    """[B, T, F]: clean minus corrupt activation of a layer's features."""
    width = transcoders[layer].config.n_features
    return sides.clean.codes[layer].dense(width) - sides.corrupt.codes[layer].dense(width)
