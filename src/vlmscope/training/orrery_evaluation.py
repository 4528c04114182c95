"""Accuracy of Orrery by question group, beside the accuracy with pictures shuffled between the questions.

An answer is right when every token of it is the argmax (teacher forced; for one-word answers, that is greedy decoding).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlmscope.core.seeds import generator
from vlmscope.data.orrery.facts import NUMBERS
from vlmscope.data.orrery.hands import hand_scene
from vlmscope.data.orrery.scene import Scene
from vlmscope.data.packing import IGNORE, PackedBatch
from vlmscope.models.positions import token_strings

BATCH = 50
ALL = 100  # questions a scene: every one is asked


@torch.no_grad()
def accuracy(module: Any, scenes: list[Scene], shuffle_images: bool = False) -> dict[str, float]:
    """Share of right answers by question group.

    Args:
        module: a `VlmModule`.
        scenes: scenes of one kind.
        shuffle_images: give each question the picture of another scene (a text prior then shows as accuracy).
    """
    right: dict[str, list[bool]] = {}
    for start in range(0, len(scenes), BATCH):
        batch = module.collate(scenes[start : start + BATCH], start, ALL)
        if shuffle_images:
            # A rotation by half leaves no picture in its place.
            batch = replace(batch, pixels=batch.pixels.roll(max(len(batch.pixels) // 2, 1), 0))
        for group, good in _answers(module, batch):
            right.setdefault(group, []).append(good)
    return {group: float(np.mean(values)) for group, values in sorted(right.items())}


def _answers(module: Any, batch: PackedBatch) -> list[tuple[str, bool]]:
    states, labels = module.answer_states(batch)
    hit = module.model.lm_head(states).argmax(-1) == labels
    rows, columns = (batch.labels != IGNORE).nonzero(as_tuple=True)
    good: dict[tuple[int, int], bool] = {}
    for row, column, ok in zip(rows.tolist(), columns.tolist(), hit.tolist(), strict=True):
        key = (row, int(batch.segments[row, column]))
        good[key] = good.get(key, True) and ok
    return [(batch.groups[row][segment - 1], ok) for (row, segment), ok in good.items()]


@torch.no_grad()
def six_finger_answers(module: Any, count: int = 200, seed: int = 0) -> dict[str, float]:
    """What the model says of six-fingered hands, which training never shows: share of each answer."""
    said: dict[str, int] = {}
    scenes = []
    for i in range(count):
        scene = hand_scene(generator(seed, "six", i), 6)
        scenes.append(replace(scene, questions=tuple(q for q in scene.questions if q.group == "fingers")))
    for start in range(0, count, BATCH):
        batch = module.collate(scenes[start : start + BATCH], start, ALL)
        states, labels = module.answer_states(batch)
        six = module.tokenizer.convert_tokens_to_ids(NUMBERS[6])
        top = module.model.lm_head(states[labels == six]).argmax(-1)
        for word in token_strings(module.tokenizer, top.tolist()):
            said[word] = said.get(word, 0) + 1
    return {word: n / count for word, n in sorted(said.items(), key=lambda item: -item[1])}
