"""Logit lens on features: which answers a feature's decoder row writes towards.

With cross-layer transcoders the rows to all layers that the feature writes to add up. A row goes through the post-MLP
norm's and the final norm's weights at unit scale (their data-dependent scales are positive, so they change no ranking)
and is read by the unembedding minus its mean row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vlmscope.activations.hook_points import norm_weight_after
from vlmscope.core.ids import FeatureId
from vlmscope.core.study import Words
from vlmscope.features.study.layer_tables import Logits
from vlmscope.models.placement import materialised
from vlmscope.models.positions import token_strings
from vlmscope.scope import Scope

_NUMBERS = 1 << 25  # logits in memory at a time


@torch.no_grad()
def top_and_bottom_logits(scope: Scope, feature: FeatureId, count: int = 6) -> tuple[Words, Words]:
    """The words that a feature raises most and lowers most, with their (relative) logits."""
    logits = next(_logits(scope, feature.layer, torch.tensor([feature.index])))[0]
    top, bottom = logits.topk(count), (-logits).topk(count)

    def words(indices: torch.Tensor) -> Words:
        return tuple(zip(token_strings(scope.vlm.tokenizer, indices.tolist()), logits[indices].tolist(), strict=True))

    return words(top.indices), words(bottom.indices)


@torch.no_grad()
def layer_logits(scope: Scope, layer: int, count: int) -> Logits:
    """The tokens that every feature of a layer raises most and lowers most."""
    features = torch.arange(scope.transcoders[layer].config.n_features)
    found: list[tuple[Tensor, ...]] = []
    for logits in _logits(scope, layer, features):
        top, bottom = logits.float().topk(count), (-logits.float()).topk(count)
        found.append((top.indices, top.values, bottom.indices, -bottom.values))
    return Logits(*(torch.cat(column).numpy(force=True) for column in zip(*found, strict=True)))


def _logits(scope: Scope, layer: int, features: Tensor) -> Iterator[Tensor]:
    """Relative logits [n, V] of some features at a time."""
    transcoder, hook = scope.transcoders[layer], scope.transcoders.config.output_hook
    norms = [
        norm_weight_after(scope.adapter, layer + ahead, hook, transcoder.W_dec)
        for ahead in range(transcoder.config.writes)
    ]
    weight = materialised(scope.adapter.lm_head())
    final = scope.adapter.final_norm()
    scale = scope.adapter.norm_scale(final, torch.ones_like(weight[0]))
    centred = (weight - weight.mean(0)) * scale
    for part in features.to(weight.device).split(max(1, _NUMBERS // len(weight))):
        rows = [transcoder.decoder(ahead)[part] * (1 if norm is None else norm) for ahead, norm in enumerate(norms)]
        yield sum(rows[1:], rows[0]).to(centred) @ centred.T
