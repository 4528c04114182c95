"""Logit lens on features: which answers a feature's decoder row writes towards.

With cross-layer transcoders the rows to all layers that the feature writes to add up. A row goes through the post-MLP
norm's and the final norm's weights at unit scale (their data-dependent scales are positive, so they change no ranking)
and is read by the unembedding minus its mean row.
"""

from __future__ import annotations

from typing import Any

import torch

from vlmscope.core.ids import FeatureId
from vlmscope.models.base import Adapter
from vlmscope.models.placement import materialised
from vlmscope.transcoders.transcoder import TranscoderSet

Words = tuple[tuple[str, float], ...]


@torch.no_grad()
def top_and_bottom_logits(
    adapter: Adapter, transcoders: TranscoderSet, tokenizer: Any, feature: FeatureId, count: int = 6
) -> tuple[Words, Words]:
    """The words that a feature raises most and lowers most, with their (relative) logits."""
    transcoder, rows = transcoders[feature.layer], []
    for ahead in range(transcoder.config.writes):
        row = transcoder.decoder(ahead)[feature.index]
        if transcoders.config.output_hook == "mlp_out":
            row = _through(adapter, adapter.norms(feature.layer + ahead).mlp_out_post, row)
        rows.append(row)
    weight = materialised(adapter.lm_head())
    logits = (weight - weight.mean(0)) @ _through(adapter, adapter.final_norm(), torch.stack(rows).sum(0))
    top, bottom = logits.topk(count), (-logits).topk(count)

    def words(indices: torch.Tensor) -> Words:
        return tuple((tokenizer.convert_ids_to_tokens(int(i)), float(logits[i])) for i in indices)

    return words(top.indices), words(bottom.indices)


def _through(adapter: Adapter, norm: Any, row: torch.Tensor) -> torch.Tensor:
    if norm is None:
        return row
    ones = torch.ones_like(row)
    return row * adapter.norm_scale(norm, ones)  # the norm's weight, up to one positive factor
