"""Logit lens on features: which answers a feature's decoder row writes towards.

With cross-layer transcoders the rows to all layers that the feature writes to add up. A row goes through the post-MLP
norm's and the final norm's weights at unit scale (their data-dependent scales are positive, so they change no ranking)
and is read by the unembedding minus its mean row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlmscope.activations.hook_points import norm_weight_after
from vlmscope.core.ids import FeatureId
from vlmscope.core.study import Words
from vlmscope.features.study.layer_tables import Logits
from vlmscope.models.base import Adapter
from vlmscope.models.placement import materialised
from vlmscope.models.positions import token_strings
from vlmscope.transcoders.transcoder import TranscoderSet

_NUMBERS = 1 << 25  # logits in memory at a time


@torch.no_grad()
def top_and_bottom_logits(
    adapter: Adapter, transcoders: TranscoderSet, tokenizer: Any, feature: FeatureId, count: int = 6
) -> tuple[Words, Words]:
    """The words that a feature raises most and lowers most, with their (relative) logits."""
    logits = next(_logits(adapter, transcoders, feature.layer, torch.tensor([feature.index])))[0]
    top, bottom = logits.topk(count), (-logits).topk(count)

    def words(indices: torch.Tensor) -> Words:
        return tuple(zip(token_strings(tokenizer, indices.tolist()), logits[indices].tolist(), strict=True))

    return words(top.indices), words(bottom.indices)


@torch.no_grad()
def layer_logits(adapter: Adapter, transcoders: TranscoderSet, layer: int, count: int) -> Logits:
    """The tokens that every feature of a layer raises most and lowers most."""
    features = torch.arange(transcoders[layer].config.n_features)
    found: list[tuple[Tensor, ...]] = []
    for logits in _logits(adapter, transcoders, layer, features):
        top, bottom = logits.float().topk(count), (-logits.float()).topk(count)
        found.append((top.indices, top.values, bottom.indices, -bottom.values))
    return Logits(*(torch.cat(column).numpy(force=True) for column in zip(*found, strict=True)))


def _logits(adapter: Adapter, transcoders: TranscoderSet, layer: int, features: Tensor) -> Iterator[Tensor]:
    """Relative logits [n, V] of some features at a time."""
    transcoder, hook = transcoders[layer], transcoders.config.output_hook
    norms = [
        norm_weight_after(adapter, layer + ahead, hook, transcoder.W_dec) for ahead in range(transcoder.config.writes)
    ]
    weight = materialised(adapter.lm_head())
    final = adapter.final_norm()
    scale = adapter.norm_scale(final, torch.ones_like(weight[0]))
    centred = (weight - weight.mean(0)) * scale
    for part in features.to(weight.device).split(max(1, _NUMBERS // len(weight))):
        rows = [transcoder.decoder(ahead)[part] * (1 if norm is None else norm) for ahead, norm in enumerate(norms)]
        yield sum(rows[1:], rows[0]).to(centred) @ centred.T
