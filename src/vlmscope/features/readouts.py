"""Readouts: logit lenses of features and positions, features that fire on a picture, mean activations by role.

*Logit lens on features*: which answers a feature's decoder row writes towards. With cross-layer transcoders the rows
to all layers that it writes to add up. A row goes through the post-MLP norm's and the final norm's weights at unit
scale (their data-dependent scales are positive, so they change no ranking) and is read by the unembedding minus its
mean row.

*Logit lens on positions* (nostalgebraist 2020): what the residual stream would say if it ended there. The stream before
each layer, and after the last, goes through the model's final norm and unembedding.

Legend: B prompts, T positions, P chosen ones, L layers, K words, V vocabulary, F features, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations import hooked, norm_weight_after
from vlmscope.core.errors import UserError
from vlmscope.core.records import ROLES, FeatureId, Positions
from vlmscope.core.study import Words
from vlmscope.features.study_tables import Logits
from vlmscope.models.base import Adapter, token_strings
from vlmscope.models.batching import InputBatch
from vlmscope.models.checkpoint import materialised
from vlmscope.scope import Scope

_NUMBERS = 1 << 25  # logits in memory at a time
_ROWS = 32  # positions whose logits are in memory at once: 262,144 words in float32 are 1 MiB each


def top_and_bottom_logits(scope: Scope, feature: FeatureId, count: int = 6) -> tuple[Words, Words]:
    """The words that a feature raises most and lowers most, with their (relative) logits."""
    logits = layer_logits(scope, feature.layer, count, torch.tensor([feature.index]))

    def words(ids: np.ndarray, values: np.ndarray) -> Words:
        return tuple(zip(token_strings(scope.vlm.tokenizer, ids[0]), values[0].tolist(), strict=True))

    return words(logits.top_ids, logits.top), words(logits.bottom_ids, logits.bottom)


@torch.no_grad()
def decoder_logits(
    scope: Scope, layer: int, features: Tensor | None = None, tokens: Tensor | None = None
) -> Iterator[Tensor]:
    """What features of a layer (all when None) write to each token's logit minus the mean logit, some features after
    others: [n, V], relative; of some `tokens` alone where they are given.
    """
    transcoder, hook = scope.transcoders[layer], scope.transcoders.config.output_hook
    ahead = range(transcoder.config.writes)
    norms = [norm_weight_after(scope.adapter, layer + n, hook, transcoder.W_dec) for n in ahead]
    weight = materialised(scope.adapter.lm_head())
    scale = scope.adapter.norm_scale(scope.adapter.final_norm(), torch.ones_like(weight[0]))
    read = weight if tokens is None else weight[tokens]
    centred = (read - weight.mean(0)) * scale
    features = torch.arange(transcoder.config.n_features) if features is None else features
    for part in features.to(weight.device).split(max(1, _NUMBERS // len(read))):
        rows = [transcoder.decoder(n)[part] * (1 if norm is None else norm) for n, norm in enumerate(norms)]
        yield (sum(rows[1:], rows[0]).to(centred) @ centred.T).float()


def layer_logits(scope: Scope, layer: int, count: int, features: Tensor | None = None) -> Logits:
    """The tokens that features of a layer (all when None) raise most and lower most, with their relative logits."""
    columns: list[tuple[Tensor, ...]] = []
    for logits in decoder_logits(scope, layer, features):
        top, bottom = logits.topk(count), (-logits).topk(count)
        columns.append((top.indices, top.values, bottom.indices, -bottom.values))
    return Logits(*(torch.cat(column).numpy(force=True) for column in zip(*columns, strict=True)))


@torch.no_grad()
def token_lens(adapter: Adapter, batch: InputBatch, positions: np.ndarray, words: list[int]) -> np.ndarray:
    """How many tokens every state says are more probable than a word: `[B, L + 1, P]` int64, 0 where it is the first.

    States are numbered 0 (before the first layer) to L (after the last) and read at some positions `[P]`; `words` are B
    token ids, one for each prompt. A `UserError` when logits overflow.
    """
    norms = [adapter.norms(layer).attn_in for layer in range(adapter.n_layers)] + [adapter.final_norm()]
    states: dict[int, Tensor] = {}

    def keep(number: int, _module: Any, args: tuple, _out: Any) -> None:
        states[number] = args[0]

    with hooked({norm: partial(keep, number) for number, norm in enumerate(norms)}):
        adapter.forward(batch.tensors, use_cache=False)
    where, target = torch.from_numpy(positions), torch.tensor(words)
    kept = [states[number] for number in range(len(norms))]
    return np.stack([_ranks(adapter, state[:, where.to(state.device)], target) for state in kept], axis=1)


def _ranks(adapter: Adapter, state: Tensor, target: Tensor) -> np.ndarray:
    """The rank of each prompt's target `[B]` in states `[B, P, d]`: `[B, P]`."""
    flat, targets = state.flatten(0, 1), target.to(state.device).repeat_interleave(state.shape[1])
    ranks: list[Tensor] = []
    for start in range(0, len(flat), _ROWS):
        logits = adapter.finite(adapter.lm_head()(adapter.final_norm()(flat[start : start + _ROWS]))).double()
        if adapter.logit_softcap is not None:
            logits = torch.tanh(logits / adapter.logit_softcap) * adapter.logit_softcap
        ranks.append((logits > logits.gather(1, targets[start : start + _ROWS, None])).sum(1))
    return torch.cat(ranks).reshape(state.shape[:2]).numpy(force=True)


@dataclass(frozen=True)
class ImageFeature:
    """How a feature fires on the soft tokens of some prompts."""

    feature: FeatureId
    strength: float  # mean over all prompts of its activations summed over the soft tokens
    fires: float  # share of prompts with at least one soft token where it is active
    tokens: float  # mean share of the soft tokens where it is active, over the prompts where it fires


@torch.no_grad()
def image_features(
    scope: Scope,
    batch: InputBatch,
    count: int,
    least_share: float = 0.0,
    most_tokens: float = 1.0,
    per_layer: int | None = None,
) -> list[ImageFeature]:
    """The strongest features on the soft tokens of some prompts, strongest first; at most `per_layer` of one layer.

    A feature must fire in the share `least_share` of the prompts. One that is active on more than the share
    `most_tokens` of the soft tokens is left out, since it tells nothing about a place.
    """
    soft = torch.from_numpy(batch.is_image)
    features: list[ImageFeature] = []
    for layer, x in scope.capture(batch).items():
        acts = scope.transcoders[layer].encode(x[:, soft]).dense(scope.transcoders[layer].config.n_features)
        active = (acts > 0).double()
        fires = active.amax(1)
        tokens = active.mean(1).sum(0) / fires.sum(0).clamp(min=1)
        strength, share = acts.sum(1).double().mean(0), fires.mean(0)
        strength[(share < least_share) | (share == 0) | (tokens > most_tokens)] = 0
        best = strength.topk(min(count if per_layer is None else per_layer, len(strength))).indices.tolist()
        features += [
            ImageFeature(FeatureId(layer, i), float(strength[i]), float(share[i]), float(tokens[i]))
            for i in best
            if strength[i] > 0
        ]
    return sorted(features, key=lambda feature: (-feature.strength, feature.feature))[:count]


RoleMeans = Mapping[str, Mapping[int, Tensor]]  # role -> layer -> [F], in float32 at least


@torch.no_grad()
def role_means(scope: Scope, batches: Sequence[InputBatch], positions: Positions | None = None) -> RoleMeans:
    """Mean activations over the positions of each role and all prompts of some batches, whose lengths may differ.

    With `positions` only those count; a role without any is left out.
    """
    sums: dict[str, dict[int, Tensor]] = {role: {} for role in ROLES}
    counts: dict[str, int] = dict.fromkeys(ROLES, 0)
    for batch in batches:
        counted = np.ones(batch.length, dtype=bool) if positions is None else positions.mask(batch.places)
        masks = {role: torch.from_numpy((batch.roles == role) & counted) for role in ROLES}
        masks = {role: mask for role, mask in masks.items() if mask.any()}
        for layer, x in scope.capture(batch).items():
            code = scope.transcoders[layer].encode(x)
            for role, mask in masks.items():
                # Half precision cannot count: a running sum stops growing at a few hundred times its terms.
                total = code.values.new_zeros(scope.transcoders[layer].config.n_features, dtype=torch.float64)
                total.index_add_(0, code.indices[:, mask].flatten(), code.values[:, mask].flatten().double())
                sums[role][layer] = sums[role].get(layer, torch.zeros_like(total)) + total
        for role, mask in masks.items():
            counts[role] += batch.size * int(mask.sum())
    if not any(counts.values()):
        raise UserError(f"no prompt has a position in {positions}; choose other positions")

    def mean(total: Tensor, count: int, layer: int) -> Tensor:
        return (total / count).to(torch.promote_types(scope.transcoders[layer].W_dec.dtype, torch.float32))

    seen = [role for role in ROLES if counts[role]]
    layers = scope.transcoders.layers
    return {role: {layer: mean(sums[role][layer], counts[role], layer) for layer in layers} for role in seen}
