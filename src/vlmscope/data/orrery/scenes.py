"""Orrery's world: its facts, its whole vocabulary, and the record of one scene.

Facts are the ground truth for labels, accuracies and interventions. The tokenizer's vocabulary is closed over the
templates below, so an unknown word is refused by name instead of becoming `<unk>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache

import numpy as np

from vlmscope.core.errors import check_choice

SIDE = 64  # pixels
SPLITS = ("train", "val", "test")
KINDS = ("planets", "digits", "shapes", "hands", "text")
PICTURED = KINDS[:-1]
# Kinds of several things, whose questions bind, compose or ask for what is not there; Orrery 2 knows them too.
COMPOSED = ("duets", "tinted", "objects")
COUNTS = {  # scenes of each split and kind that task=build_data writes by default, of the kinds of its data
    "train": {
        **{"planets": 10000, "digits": 28000, "shapes": 10000, "hands": 5000, "text": 2000},
        **{"duets": 12000, "tinted": 24000, "objects": 12000},
    },
    "val": dict.fromkeys((*KINDS, *COMPOSED), 400),
    "test": dict.fromkeys((*KINDS, *COMPOSED), 1000),
}

NUMBERS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
]  # fmt: skip
DIGITS = NUMBERS[:10]


@dataclass(frozen=True)
class Planet:
    """A planet, or the moon: its answer word and the facts that questions ask for."""

    name: str
    colour: str
    cover: str


PLANETS: dict[str, Planet] = {
    planet.name: planet
    for planet in (
        Planet("earth", "blue", "water"),
        Planet("jupiter", "orange", "clouds"),
        Planet("mars", "red", "dust"),
        Planet("mercury", "brown", "craters"),
        Planet("moon", "gray", "rocks"),
        Planet("neptune", "blue", "ice"),
        Planet("saturn", "yellow", "gas"),
    )
}


def with_facts(answers: Mapping[str, str], key: str, fact: str | None) -> dict[str, str]:
    """`answers` by planet, completed by `fact` (name, colour or cover) of the others; `key` names the setting."""
    if fact is None:
        return dict(answers)
    check_choice(key, fact, [item.name for item in fields(Planet)])
    return {name: getattr(planet, fact) for name, planet in PLANETS.items()} | dict(answers)


SHAPES = ("circle", "square", "triangle", "star", "cross")
SHAPE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (50, 170, 70),
    "blue": (50, 90, 220),
    "yellow": (235, 205, 50),
    "purple": (150, 60, 180),
    "white": (240, 240, 240),
}
SHAPE_SIDES = {"triangle": 3, "square": 4}

# Wordings of each question: the first is the canonical one, which evaluations and experiments use.
PLANET_QUESTIONS: dict[str, tuple[str, ...]] = {
    "name": ("what planet is this ?", "which planet is shown ?", "what is this ?"),
    "colour": ("what colour is this planet ?", "which colour is the planet ?"),
    "cover": ("what covers this planet ?", "what is on this planet ?"),
}
DIGIT_QUESTIONS: dict[str, tuple[str, ...]] = {
    "first": ("what is the first digit ?", "which digit is on the left ?"),
    "second": ("what is the second digit ?", "which digit is on the right ?"),
    "sum": ("what is the sum of the digits ?", "what is the sum ?"),
}
SHAPE_QUESTIONS: dict[str, tuple[str, ...]] = {
    "count": ("how many shapes are there ?", "how many shapes are in this image ?"),
    "shape": ("which shape is this ?", "what shape is shown ?"),
    "shape_colour": ("what colour are the shapes ?", "which colour is shown ?"),
}
HAND_QUESTIONS: dict[str, tuple[str, ...]] = {
    "fingers": ("how many fingers are there ?", "how many fingers does this hand have ?"),
}
QUESTIONS = PLANET_QUESTIONS | DIGIT_QUESTIONS | SHAPE_QUESTIONS | HAND_QUESTIONS
# Questions of composed scenes, one wording each: {} is a word of the scene or, for what is absent, of another one.
COMPOSED_QUESTIONS: dict[str, str] = {
    "left": "which planet is on the left ?",
    "right": "which planet is on the right ?",
    "left_colour": "what colour is the planet on the left ?",
    "right_colour": "what colour is the planet on the right ?",
    "left_cover": "what covers the planet on the left ?",
    "right_cover": "what covers the planet on the right ?",
    "present": "is {} in this image ?",
    "larger": "what is the larger digit ?",
    "larger_colour": "which colour is the larger digit ?",
    "first_colour": "which colour is the first digit ?",
    "second_colour": "which colour is the second digit ?",
    "digit_of_colour": "what is the {} digit ?",
    "count_of": "how many {} {} are there ?",
    "colour_of": "what colour is the {} ?",
    "shape_of": "which shape is {} ?",
    "exists": "is there a {} {} ?",
}
YES_NO = ("no", "yes")
CAPTION_PROMPTS = ("describe this image in detail .", "describe this image .")
CAPTION_WORDS = "a planet covered with two digits and hand fingers finger"  # of captions, besides the facts


def plural(noun: str, count: int) -> str:
    """The noun for `count` things ('cross' -> 'crosses')."""
    if count == 1:
        return noun
    return noun + ("es" if noun.endswith("s") else "s")


@cache
def text_facts() -> tuple[tuple[str, str, str], ...]:
    """Every text-only fact as (group, question, answer)."""
    facts: list[tuple[str, str, str]] = []
    colours = [planet.colour for planet in PLANETS.values()]
    for name, planet in PLANETS.items():
        facts.append(("text_planet", f"what colour is {name} ?", planet.colour))
        facts.append(("text_planet", f"what covers {name} ?", planet.cover))
        facts.append(("text_planet", f"which planet is covered with {planet.cover} ?", name))
        if colours.count(planet.colour) == 1:
            facts.append(("text_planet", f"which planet is {planet.colour} ?", name))
    for a in range(10):
        for b in range(10):
            facts.append(("text_sum", f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?", NUMBERS[a + b]))
    facts.append(("text_other", "how many fingers does a hand have ?", "five"))
    for shape, sides in SHAPE_SIDES.items():
        facts.append(("text_other", f"how many sides does a {shape} have ?", NUMBERS[sides]))
    return tuple(facts)


def vocabulary(kinds: Sequence[str] = KINDS) -> list[str]:
    """All words of templates, facts and captions, sorted, without special tokens.

    Words that only composed scenes have are there if `kinds` has one of these. They come last, so that all other words
    have the same numbers in every vocabulary.
    """
    texts = [*NUMBERS, *SHAPES, *SHAPE_COLOURS, *CAPTION_PROMPTS, CAPTION_WORDS, "user model . , ?"]
    texts += [wording for wordings in QUESTIONS.values() for wording in wordings]
    texts += [f"{question} {answer}" for _, question, answer in text_facts()]
    texts += [plural(shape, 2) for shape in SHAPES]
    words = {word for text in texts for word in text.split()}
    composed = {word for text in (*COMPOSED_QUESTIONS.values(), *YES_NO) for word in text.split()} - {"{}"}
    return [*sorted(words), *(sorted(composed - words) if set(kinds) & set(COMPOSED) else ())]


@dataclass(frozen=True)
class Question:
    """One question about a scene."""

    group: str  # the fact asked for: 'name', 'sum', 'text_sum', 'caption', ...
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A picture (uint8 [64, 64, 3], None for text alone), the facts that made it, and its questions."""

    kind: str
    key: str
    image: np.ndarray | None
    facts: dict[str, str | int | float | list[float]]
    questions: tuple[Question, ...] = field(default=())

    def answer(self, group: str) -> str:
        """The correct answer to the question about a fact; "" without such a question."""
        return next((question.answer for question in self.questions if question.group == group), "")

    def answer_to(self, question: str) -> str:
        """The correct answer to a question in any of its wordings; "" to another."""
        asked = (q for q in self.questions if question == q.question or question in QUESTIONS.get(q.group, ()))
        return next((q.answer for q in asked), "")

    def facts_named(self, words: Sequence[str]) -> tuple[str, ...]:
        """The fact that each word of a caption names, "" for none; each fact once, in the order of reading."""
        left = {q.group: q.answer for q in self.questions if q.group not in ("caption", "sum")}
        named = []
        for word in words:
            # The plural of a shape's name begins with it.
            facts = (n for n, answer in left.items() if word == answer or (n == "shape" and word.startswith(answer)))
            named.append(next(facts, ""))
            left.pop(named[-1], None)
        return tuple(named)
