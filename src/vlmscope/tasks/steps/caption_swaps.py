"""Pairs of pictures with their right captions, texts generated for them, and how good a text is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from vlmscope.circuits.caption_pairs import CaptionPair
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.data.orrery.dataset import scene_pairs
from vlmscope.interventions.run import generate_batch
from vlmscope.metrics.causal import bootstrap_mean, bootstrap_rate
from vlmscope.models.batching import make_batch
from vlmscope.models.conversations import continued

if TYPE_CHECKING:
    from vlmscope.models.base import ModelInputs
    from vlmscope.tasks.steps.bench import Bench


@dataclass(frozen=True)
class Swap:
    """Test pairs of one swap: inputs and right captions of both sides, and where their words differ."""

    name: str
    pairs: list[CaptionPair]
    pictures: list[np.ndarray]
    words: list[tuple[tuple[str, ...], tuple[str, ...]]]
    accuracy: Rate


def right_pairs(bench: Bench, name: str, swap: tuple[str, str, str], split: str) -> Swap:
    """The pairs of a split whose captions the model gives rightly on both sides.

    Raises:
        UserError: it gives too few.
    """
    config, vlm = bench.cfg.captions, bench.vlm
    change, first, second = swap
    wanted = {"train": config.train, "val": config.validation, "test": config.test}[split]
    scenes = scene_pairs(change, split, wanted, config.seed, first, second)
    sides: list[list[ModelInputs]] = []
    said: list[list[list[int]]] = []
    for of in ([pair.original for pair in scenes], [pair.counterfactual for pair in scenes]):
        pictures = [Image.fromarray(scene.image) for scene in of if scene.image is not None]
        sides.append(bench.inputs(pictures, config.prompt))
        said.append(generate_batch(vlm.adapter, sides[-1], config.max_new_tokens))
    texts = [[tuple(text_of(bench, ids).split()) for ids in side] for side in said]
    right = [
        tuple(pair.captions) == (" ".join(a), " ".join(b)) and len(a) == len(b)
        for pair, a, b in zip(scenes, *texts, strict=True)
    ]
    kept = np.flatnonzero(right).tolist()
    if len(kept) < 2:
        raise UserError(f"captions.swaps.{name}: {len(kept)} of {wanted} pairs are captioned rightly on both sides")
    count = len(texts[0][kept[0]])
    kept = [i for i in kept if len(texts[0][i]) == count]  # levels are taken position by position
    pairs = [
        CaptionPair(sides[0][i], sides[1][i], (tuple(said[0][i][:count]), tuple(said[1][i][:count]))) for i in kept
    ]
    pictures = [np.concatenate([s.image for s in (scenes[i].original, scenes[i].counterfactual) if s.image is not None],
                               1) for i in kept]  # fmt: skip
    return Swap(name, pairs, pictures, [(texts[0][i], texts[1][i]) for i in kept], bootstrap_rate(np.array(right)))


def text_of(bench: Bench, ids: Sequence[int]) -> str:
    """The words of generated ids."""
    return bench.vlm.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def generated(
    bench: Bench, inputs: Sequence[ModelInputs], context: AbstractContextManager[None] | None = None
) -> tuple[list[list[int]], list[str]]:
    """Ids without the end of the turn, and texts."""
    ids = generate_batch(bench.vlm.adapter, inputs, bench.cfg.captions.max_new_tokens, context)
    texts = [text_of(bench, some) for some in ids]
    words = [[i for i in some if text_of(bench, [i])] for some in ids]
    return words, texts


def score(swap: Swap, texts: Sequence[str]) -> dict[str, Rate]:
    """Measures of texts, row by row those of the swap's pairs (again and again, if there are more)."""
    right, changed, kept = [], [], []
    for i, text in enumerate(texts):
        before, after = swap.words[i % len(swap.words)]
        said = text.split()
        hits = [place < len(said) and said[place] == word for place, word in enumerate(after)]
        differ = [a != b for a, b in zip(before, after, strict=True)]
        right.append(said == list(after))
        changed.append(np.mean([hit for hit, d in zip(hits, differ, strict=True) if d]))
        kept.append(np.mean([hit for hit, d in zip(hits, differ, strict=True) if not d]))
    return {
        "all_right": bootstrap_rate(right),
        "right_words": bootstrap_mean(changed),
        "kept_words": bootstrap_mean(kept),
    }


@torch.no_grad()
def likelihoods(bench: Bench, swap: Swap, ids: Sequence[Sequence[int]]) -> np.ndarray:
    """[n], mean log-probability of a token of each text under the unedited model, given the counterfactual's picture.

    An empty text counts with the log-probability of the token that the model gives last there: the worst.
    """
    found = np.zeros(len(ids))
    by_length: dict[int, list[int]] = {}
    for i, some in enumerate(ids):
        by_length.setdefault(len(some), []).append(i)
    for length, rows in by_length.items():
        pairs = [swap.pairs[i % len(swap.pairs)] for i in rows]
        kept = max(length, 1)
        inputs = [
            continued(bench.vlm.adapter, pair.counterfactual, list(ids[i][:-1]), bench.vlm.tokenizer)
            for i, pair in zip(rows, pairs, strict=True)
        ]
        batch = make_batch(bench.vlm.adapter, inputs)
        adapter = bench.vlm.adapter
        logits = adapter.forward(batch.tensors, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
        logs = adapter.finite(logits).double().log_softmax(-1)
        if length == 0:
            found[rows] = logs[:, -1].min(-1).values.cpu().numpy()
            continue
        tokens = torch.tensor([list(ids[i]) for i in rows], device=logs.device)
        found[rows] = logs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).mean(-1).cpu().numpy()
    return found
