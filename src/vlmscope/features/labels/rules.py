"""Labels as rules that can be checked: what an item must be for a feature to fire, and at which positions it fires.

A predicate is a key with a value. Facts: `planet = mars`. Words: `"colour" in the question`. Places: `on the picture`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NamedTuple

WORDS = ("answer", "question", "text")  # keys whose values are words: an item has many of each
_PLACES = {"token": "at", "after": "right after"}
_KINDS = {"text": "in the words of the user", "image": "on the picture", "answer": "in the answer"}
MOST_VALUES = 3  # of one key: a longer list is no label


class Predicate(NamedTuple):
    """One thing that is or is not so of an item or of a position."""

    key: str
    value: str


@dataclass(frozen=True)
class Part:
    """Any of some values of one key."""

    key: str
    values: tuple[str, ...]

    @property
    def text(self) -> str:
        """The part in words."""
        if self.key in WORDS:
            return f"{_quoted(self.values)} in the {self.key}"
        return f"{self.key} = {' or '.join(self.values)}"

    @property
    def place(self) -> str:
        """The part in words, of a rule about positions."""
        if self.key == "kind":
            return " or ".join(_KINDS[value] for value in self.values)
        if self.key in ("rows", "columns"):
            return f"in the {' or '.join(self.values)} of the picture"
        return f"{_PLACES[self.key]} {_quoted(self.values)}"


@dataclass(frozen=True)
class Rule:
    """One part, or two that must both hold ("and") or of which one is enough ("or")."""

    parts: tuple[Part, ...]
    joint: str = "and"

    @property
    def text(self) -> str:
        """The rule in words."""
        return f" {self.joint} ".join(part.text for part in self.parts)

    @property
    def length(self) -> int:
        """How many values a reader must keep in mind."""
        return sum(len(part.values) for part in self.parts)

    def to_json(self) -> str:
        """One line from which `from_json` makes the rule again."""
        return json.dumps([self.joint, [[part.key, *part.values] for part in self.parts]], ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Rule:
        """The inverse of `to_json`."""
        joint, parts = json.loads(line)
        return cls(tuple(Part(key, tuple(values)) for key, *values in parts), joint)


def _quoted(words: tuple[str, ...]) -> str:
    return " or ".join(f'"{word}"' for word in words)
