"""Text alone: the facts of the pictures (and sums in words), asked without one."""

from __future__ import annotations

from functools import cache

import numpy as np

from vlmscope.data.orrery.scenes import Question, Scene, text_facts

QUESTIONS_A_SCENE = 6


@cache
def _by_group() -> dict[str, list[tuple[str, str, str]]]:
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for fact in text_facts():
        groups.setdefault(fact[0], []).append(fact)
    return groups


def scene(rng: np.random.Generator, split: str) -> Scene:
    """Six facts: half of them about planets, the rest sums, now and then a hand or a shape."""
    del split  # facts are knowledge, not pictures: the same in every split
    questions: list[Question] = []
    for group, count in (("text_planet", 3), ("text_sum", 2), ("text_other", 1)):
        pool = _by_group()[group]
        for i in rng.choice(len(pool), count, replace=False):
            questions.append(Question(*pool[int(i)]))
    assert len(questions) == QUESTIONS_A_SCENE
    return Scene("text", "", None, {}, tuple(questions))
