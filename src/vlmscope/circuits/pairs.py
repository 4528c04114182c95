"""Counterfactual pairs as batches, and which features carry a fact: the effect of interchanging each.

Effects are estimated by attribution patching. For a pair with logit difference d = l[y'] - l[y], the effect of setting
feature f at position t to its counterfactual activation is, to first order,

    e[f, t] = (a'[f, t] - a[f, t]) sum over layers m written of W_dec[f -> m] . dd/d(write_m[t])

(Nanda 2023; for features: Marks et al., arXiv 2403.19647). With `steps` > 1 the gradient is the mean over inputs that
go from the original's embeddings to the counterfactual's, as in EAP-IG (Hanna et al., arXiv 2403.17806), which a
saturated nonlinearity misleads less. One backward pass a step serves all features of all layers.

Legend: B pairs, T positions, F features of a layer, k slots of a code, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.results import MODES, CircuitFeature, Rate
from vlmscope.interventions.run import BaseRun, base_run, hook_targets
from vlmscope.metrics.rates import share_rate
from vlmscope.models.base import INJECTIONS, ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, Transcoder, sampled_dots

CHUNK = 32  # pairs whose graph is held at once


@dataclass(frozen=True)
class PairSubject:
    """One question on B pairs."""

    question: str
    rows: Tensor  # [B], which of the pairs given these are
    batch: InputBatch  # the originals
    other: InputBatch  # the counterfactuals, row by row, in the same positions
    base: BaseRun  # the originals' unedited run
    other_logits: Tensor  # [B, V], the counterfactuals' at the last position
    tokens: Tensor  # [B], right answers of the originals, and of the counterfactuals
    other_tokens: Tensor
    inputs: Sequence[ModelInputs]  # the B originals one by one
    other_inputs: Sequence[ModelInputs]
    accuracy: tuple[Rate, Rate, Rate]  # of the originals, the counterfactuals and both, over all pairs given

    @property
    def size(self) -> int:
        """B."""
        return self.batch.size

    @property
    def moves(self) -> bool:
        """Whether the two answers differ in every pair, so that the answer should follow; else they differ in none."""
        return bool((self.tokens != self.other_tokens).all())

    def gaps(self, logits: Tensor) -> Tensor:
        """m [B]: logit of the original's answer minus that of the counterfactual's, from logits [B, V]."""
        rows = torch.arange(self.size, device=logits.device)
        return logits[rows, self.tokens] - logits[rows, self.other_tokens]


@torch.no_grad()
def pair_subject(
    scope: Scope,
    question: str,
    originals: Sequence[ModelInputs],
    others: Sequence[ModelInputs],
    tokens: Tensor,
    other_tokens: Tensor,
    least: int,
    answerable: bool = True,
    modes: Collection[str] = MODES,
    answered: tuple[Tensor, Tensor] | None = None,
) -> PairSubject:
    """Run both sides of n pairs; if `answerable`, keep only those that are answered rightly on both.

    Right answers [n] differ between the sides in all rows or in none; `answered` [n] says of each side whether all of
    a longer answer is right, of which `tokens` are one. The originals' run is recorded for `modes`.

    Raises:
        UserError: the sides do not align, or fewer than `least` pairs are left.
    """
    both = scope.batch([*originals, *others])
    n = len(originals)
    logits = scope.forward(both)
    right, other_right = logits[:n].argmax(-1) == tokens, logits[n:].argmax(-1) == other_tokens
    if answered is not None:
        right, other_right = right & answered[0], other_right & answered[1]
    rows = torch.nonzero(right & other_right).flatten() if answerable else torch.arange(n, device=logits.device)
    if len(rows) < least:
        raise UserError(
            f"question {question!r}: the model answers both sides rightly on {len(rows)} of {n} pairs, too few for an "
            f"interval (interchange.least={least}); give more pairs, or pairs that it can answer"
        )
    batch, other = both.select(rows), both.select(rows + n)
    first, second, share = (share_rate(hits.cpu().numpy()) for hits in (right, other_right, right & other_right))
    return PairSubject(
        question,
        rows,
        batch,
        other,
        base=base_run(scope, batch, modes),
        other_logits=logits[rows + n],
        tokens=tokens[rows],
        other_tokens=other_tokens[rows],
        inputs=[originals[row] for row in rows.tolist()],
        other_inputs=[others[row] for row in rows.tolist()],
        accuracy=(first, second, share),
    )


@dataclass(frozen=True)
class PairEffects:
    """Means over pairs of what is summed over the positions of each of R roles."""

    roles: tuple[str, ...]
    effect: dict[int, Tensor]  # layer -> [R, F], estimated effect on d, in logits
    change: dict[int, Tensor]  # layer -> [R, F], counterfactual minus original activation

    def ranked(self, count: int) -> list[CircuitFeature]:
        """The `count` features of most |effect|, summed over roles, best first; role: where most of it is.

        `contrast` is the change of activation at that role, `influence` the effect in logits over all roles. Features
        without effect are left out, so that fewer may come.
        """
        total = {layer: table.sum(0) for layer, table in self.effect.items()}
        ranked = []
        for feature in best_features({layer: effects.abs() for layer, effects in total.items()}, count):
            layer, index = feature
            role = int(self.effect[layer][:, index].abs().argmax())
            change, effect = float(self.change[layer][role, index]), float(total[layer][index])
            ranked.append(CircuitFeature(feature, self.roles[role], change, effect))
        return ranked


def best_features(scores: Mapping[int, Tensor], count: int) -> list[FeatureId]:
    """The `count` features of the largest scores, layer -> [F], best first; only scores above 0 count."""
    rows: list[tuple[float, FeatureId]] = []
    for layer, score in scores.items():
        best = score.topk(min(count, len(score)))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        rows += [(-value, FeatureId(layer, index)) for value, index in pairs if value > 0]
    return [feature for _, feature in sorted(rows)[:count]]


def pair_effects(scope: Scope, subject: PairSubject, steps: int = 5) -> PairEffects:
    """Estimate every feature's effect on a question's pairs, whose answers must differ; with 1 step gradients are taken
    at the original.
    """
    assert subject.moves, "without a difference of answers there is no effect to estimate"
    gradients, _ = gap_gradients(scope, subject, steps)
    batch = subject.batch
    roles = tuple(dict.fromkeys(batch.roles.tolist()))
    role_of = torch.tensor([roles.index(role) for role in batch.roles.tolist()], device=scope.adapter.device)
    effect: dict[int, Tensor] = {}
    change: dict[int, Tensor] = {}
    with torch.no_grad():
        sides = [scope.capture(side) for side in (subject.other, batch)]
        for layer in scope.transcoders.layers:
            transcoder = scope.transcoders[layer]
            tables = []
            for side in sides:
                code = transcoder.encode(side.pop(layer))
                slopes = code_slopes(transcoder, code, gradients, layer)
                values = torch.stack([code.values.double() * slopes, code.values.double()])
                place = (role_of[:, None] * transcoder.config.n_features + code.indices).flatten()
                table = values.new_zeros(2, len(roles) * transcoder.config.n_features)
                tables.append(table.index_add_(1, place, values.flatten(1)).view(2, len(roles), -1))
            difference = (tables[0] - tables[1]) / batch.size
            effect[layer], change[layer] = difference.to(torch.promote_types(transcoder.W_dec.dtype, torch.float32))
    return PairEffects(roles, effect, change)


@torch.no_grad()
def most_changed(scope: Scope, subject: PairSubject, count: int) -> list[FeatureId]:
    """The `count` features whose activations differ most within the pairs, times the norm of what they write, most
    first: |a' - a| summed over positions and pairs, whatever it does to the answer.
    """
    sides = [scope.capture(side) for side in (subject.batch, subject.other)]
    scores: dict[int, Tensor] = {}
    for layer in scope.transcoders.layers:
        transcoder = scope.transcoders[layer]
        width = transcoder.config.n_features
        score = transcoder.W_dec.new_zeros(width, dtype=torch.float64)
        for first, second in zip(*(side.pop(layer).split(CHUNK) for side in sides), strict=True):
            change = transcoder.encode(first).dense(width) - transcoder.encode(second).dense(width)
            score += change.abs().double().sum((0, 1))
        scores[layer] = score * transcoder.write_norms()
    return best_features(scores, count)


def code_slopes(transcoder: Transcoder, code: SparseCode, writes: Mapping[int, Tensor], layer: int) -> Tensor:
    """[B, T, k]: the slope of each of a code's features, its decoders times the gradients where they write."""
    slots = code.indices.shape[-1]
    rows = code.indices.reshape(-1, slots)
    slope = torch.zeros_like(code.values).view(-1, slots)
    for ahead in range(transcoder.config.writes):
        gradient = writes[layer + ahead].to(transcoder.W_dec.dtype)
        slope = slope + sampled_dots(rows, gradient.reshape(-1, gradient.shape[-1]), transcoder.decoder(ahead))
    return slope.view(code.values.shape)


def gap_gradients(
    scope: Scope, subject: PairSubject, steps: int, inputs: bool = False
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Gradients of l[y'] - l[y], each with respect to its own pair, mean over `steps` inputs between the sides.

    Returns:
        Layer -> [B, T, d], where transcoders write; and with `inputs` those of `inputs_embeds` [B, T, d], what enters
        the first layer, and of `INJECTIONS` [B, n, T, d], what pictures add to the stream later, if they do.
    """
    parts: list[dict[int | str, Tensor]] = []
    for start in range(0, subject.size, CHUNK):
        rows = torch.arange(start, min(start + CHUNK, subject.size), device=subject.tokens.device)
        sides, tokens = (subject.batch.select(rows), subject.other.select(rows)), subject.tokens[rows]
        sums: dict[int | str, Tensor] = {}
        for alpha in interpolation(steps):
            gradients = _gradients(scope, between(*sides, alpha), tokens, subject.other_tokens[rows], inputs)
            for name, gradient in gradients.items():
                sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient / steps
        parts.append(sums)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    writes = {name: gradient for name, gradient in whole.items() if isinstance(name, int)}
    return writes, {name: gradient for name, gradient in whole.items() if isinstance(name, str)}


def _gradients(
    scope: Scope, batch: InputBatch, tokens: Tensor, other_tokens: Tensor, inputs: bool
) -> dict[int | str, Tensor]:
    """Gradients of some pairs' l[y'] - l[y] at a batch: by layer where transcoders write and, if asked, by input."""
    tensors = batch.tensors
    writes: dict[int, Tensor] = {}
    with ExitStack() as stack, torch.enable_grad():
        of_inputs: dict[str, Tensor] = {}
        if inputs:
            names = [name for name in ("inputs_embeds", INJECTIONS) if name in tensors]
            of_inputs = {name: tensors[name].detach().requires_grad_() for name in names}

        def leaf(layer: int, out: Tensor) -> Tensor:
            # With frozen weights nothing below the first write has a gradient: the graph starts there.
            writes[layer] = out if out.requires_grad else out.detach().requires_grad_()
            return writes[layer]

        hook_targets(stack, scope, range(scope.adapter.n_layers), leaf)
        logits = scope.adapter.next_logits(tensors | of_inputs)
        rows = torch.arange(len(tokens), device=logits.device)
        gaps = logits[rows, other_tokens] - logits[rows, tokens]
        leaves: dict[int | str, Tensor] = {**writes, **of_inputs}
        gradients = torch.autograd.grad(gaps.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))


def interpolation(steps: int) -> Sequence[float]:
    """Shares between the sides at which gradients are taken: 0 for 1 step, else midpoints of `steps` equal parts."""
    return [0.0] if steps == 1 else ((np.arange(steps) + 0.5) / steps).tolist()


def between(first: InputBatch, second: InputBatch, share: float) -> InputBatch:
    """A batch whose embeddings are `share` of the way from one to the other."""
    names = [name for name in ("inputs_embeds", INJECTIONS) if name in first.tensors]
    mixed = {name: torch.lerp(first.tensors[name], second.tensors[name], share) for name in names}
    return replace(first, tensors=first.tensors | mixed)
