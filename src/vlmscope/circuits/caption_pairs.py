"""Pairs of pictures with their captions: which features tell the words apart, and what level they have at each word.

A pair's captions are equally long and differ in some words. For each such word the pair is the prompt with the caption
up to there on either side, and the two words are the answers (`pair_effects`). Levels are mean activations over pairs
with the whole caption after the prompt, position by position, so that the n-th generated token has its own.

Legend: B pairs, T prompt positions, S caption tokens that are fed back, n chosen features of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmscope.circuits.pair_effects import pair_effects
from vlmscope.circuits.pair_subject import pair_subject
from vlmscope.core.records import FeatureId
from vlmscope.interventions.edits import Gate, LayerEdit, Plan
from vlmscope.interventions.named import donor_activations
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import InputBatch
from vlmscope.models.conversations import continued
from vlmscope.scope import Scope


@dataclass(frozen=True)
class CaptionPair:
    """The prompt with either picture, and either caption's token ids (the end of the turn left out)."""

    original: ModelInputs
    counterfactual: ModelInputs
    ids: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def differs(self) -> tuple[int, ...]:
        """Which words differ."""
        return tuple(i for i, (a, b) in enumerate(zip(*self.ids, strict=True)) if a != b)


@dataclass(frozen=True)
class Levels:
    """Layer -> mean activations [T + S, n] of chosen features [n] on either side."""

    features: dict[int, Tensor]
    original: dict[int, Tensor]
    counterfactual: dict[int, Tensor]
    prompt: int

    def plan(self, strength: float = 1.0, gate: float | None = None) -> dict[int, LayerEdit]:
        """Set the features to original + strength (counterfactual - original), at least 0, at prompt and caption.

        Args:
            strength: 1 sets them to the counterfactual's mean, 0 to the original's.
            gate: act at each layer and position only as far as the features that are stronger on originals are active
                there, in full from this share of their level; a layer without such features is left alone. None acts
                everywhere.
        """
        plan = {}
        for layer, found in self.features.items():
            start, end = self.original[layer], self.counterfactual[layer]
            found = found.to(start.device)
            value = (start + strength * (end - start)).clamp_min(0)
            where = torch.ones(self.prompt, dtype=torch.bool)
            steps = value[self.prompt :].unsqueeze(1)
            zeros = value.new_zeros(len(found))
            edit = LayerEdit(found, value[: self.prompt], zeros, where, steps if len(steps) else None)
            if gate is not None:
                own = torch.nonzero(start.sum(0) > end.sum(0)).flatten()
                if not len(own):
                    continue
                level = start[:, own]
                edit = replace(edit, gate=Gate(found[own], level[: self.prompt], level[self.prompt :], gate))
            plan[layer] = edit
        return plan


def word_features(scope: Scope, pairs: Sequence[CaptionPair], count: int, steps: int) -> dict[int, list[FeatureId]]:
    """For each word that differs in every pair the `count` features of most estimated effect, best first.

    Args:
        scope: the model and its transcoders.
        pairs: equally long prompts and captions.
        count: features a word.
        steps: inputs at which gradients are taken.
    """
    adapter, tokenizer = scope.adapter, scope.vlm.tokenizer
    common = set.intersection(*(set(pair.differs) for pair in pairs))
    found: dict[int, list[FeatureId]] = {}
    for at in sorted(common):
        originals = [continued(adapter, p.original, p.ids[0][:at], tokenizer) for p in pairs]
        others = [continued(adapter, p.counterfactual, p.ids[1][:at], tokenizer) for p in pairs]
        words, other_words = (torch.tensor([p.ids[side][at] for p in pairs], device=adapter.device) for side in (0, 1))
        name = f"word {at}"
        subject = pair_subject(scope, name, originals, others, words, other_words, least=1, answerable=False, modes=())
        ranked = pair_effects(scope, subject, steps).ranked(count)
        found[at] = [member.feature for member in ranked]
    return found


def whole(scope: Scope, pairs: Sequence[CaptionPair], side: int) -> InputBatch:
    """The prompts of one side (0: original) with all of the caption that is fed back while it is generated."""
    inputs = [(pair.original, pair.counterfactual)[side] for pair in pairs]
    ids = [pair.ids[side] for pair in pairs]
    adapter, tokenizer = scope.adapter, scope.vlm.tokenizer
    return scope.batch([continued(adapter, i, some, tokenizer) for i, some in zip(inputs, ids, strict=True)])


def levels_of(scope: Scope, pairs: Sequence[CaptionPair], features: Mapping[int, Tensor]) -> Levels:
    """Mean activations of features by position, on either side of equally long pairs."""
    sides = []
    for side in (0, 1):
        batch = whole(scope, pairs, side)
        found = donor_activations(scope, batch, features)
        sides.append({layer: values.mean(0) for layer, (_, values) in found.items()})
    return Levels(dict(features), sides[0], sides[1], len(pairs[0].original))


def prompt_only(plan: Plan) -> dict[int, LayerEdit]:
    """The same plan, but generated tokens are left alone."""
    return {layer: replace(edit, generated=None) for layer, edit in plan.items()}
