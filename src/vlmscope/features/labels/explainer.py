"""What an outside explainer is asked and what it answers: a protocol, implemented by `endpoint` and `local`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PROPOSE = (
    "Each example below is an input of a vision-language model on which one feature of it is active. Where it is most "
    "active stands between << and >>; pictures are tinted and framed where it is active on them. Say in one short "
    "phrase, without explanation, what the examples have in common."
)
JUDGE = (
    "A feature of a vision-language model is described as: {label}\n"
    "Is it active on the following input? Answer with one word, yes or no."
)
MOST_CHARACTERS = 120  # of a label


@dataclass(frozen=True)
class Shown:
    """One item for an explainer: its words, and its pictures as PNG bytes."""

    text: str
    pictures: tuple[bytes, ...] = ()


class Explainer(Protocol):
    """Proposes labels from examples and judges items by a label. Both may raise a `UserError`."""

    @property
    def name(self) -> str:
        """What its set of labels is called: letters, digits, `-` and `_`."""
        ...

    def propose(self, examples: Sequence[Shown]) -> str:
        """A label for what these examples, where the feature fires, have in common; "" when it has none."""
        ...

    def judge(self, label: str, items: Sequence[Shown]) -> list[float]:
        """For each item from 0 to 1, how sure it is that the feature fires on it; 0.5 when it does not say."""
        ...


def one_line(answer: str) -> str:
    """An answer as a label: its first line that says something, without quotes and full stop."""
    first = next((line for line in answer.splitlines() if line.strip()), "")
    return " ".join(first.split()).strip(" \"'.*")[:MOST_CHARACTERS]


def yes_or_no(answer: str) -> float:
    """1 for an answer that begins with yes, 0 for no, 0.5 for any other."""
    word = answer.strip().lower().lstrip("\"'*")
    return 1.0 if word.startswith("yes") else 0.0 if word.startswith("no") else 0.5
